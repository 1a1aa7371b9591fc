// Adapters that peft saved (corpus/adapters), and what peft itself made of them when it loaded them
// again (expected.json): properties/adapter_testing.py writes both.

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "harness/base/json.h"
#include "harness/base/lora_rules.h"
#include "harness/base/peft.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

const fs::path kAdapters = fs::path(TP_SOURCE_DIR) / "harness/base/corpus/adapters";

double number(const Json& value) {
  const std::int64_t* whole = value.as<std::int64_t>();
  return whole ? double(*whole) : *value.as<double>();
}

void expect_tensor(const StoredTensor& t, const Json& expected, const std::string& dtype) {
  EXPECT_EQ(t.dtype, dtype) << t.name;
  std::vector<std::int64_t> shape;
  for (const Json& size : *expected.find("shape")->as<Json::Array>())
    shape.push_back(*size.as<std::int64_t>());
  ASSERT_EQ(t.shape, shape) << t.name;
  const Json::Array& values = *expected.find("values")->as<Json::Array>();
  ASSERT_EQ(std::int64_t(values.size()), t.elements());
  const std::int64_t width = size_of(*t.type());
  for (std::int64_t i = 0; i < t.elements(); ++i) {
    alignas(8) std::byte copy[8];
    std::memcpy(copy, t.data + i * width, std::size_t(width));
    EXPECT_EQ(load(*t.type(), copy, 0), number(values[std::size_t(i)])) << t.name << ", " << i;
  }
}

class PeftFixture : public testing::TestWithParam<const char*> {};

TEST_P(PeftFixture, IsReadAsPeftReadsIt) {
  const fs::path folder = kAdapters / GetParam();
  std::ifstream in(folder / "expected.json");
  const Json expected = parse_json(std::string(std::istreambuf_iterator<char>(in), {}));
  const std::string& dtype = *expected.find("dtype")->as<std::string>();
  const Json::Object& modules = *expected.find("modules")->as<Json::Object>();
  const PeftAdapter adapter(folder.string());
  EXPECT_EQ(adapter.modules().size(), modules.size());
  for (const auto& [name, want] : modules) {
    const PeftModule* m = adapter.find(name);
    ASSERT_NE(m, nullptr) << name;
    EXPECT_EQ(double(m->rank), number(*want.find("rank"))) << name;
    EXPECT_EQ(m->alpha, number(*want.find("alpha"))) << name;
    EXPECT_EQ(LoraRules().scale(m->alpha, m->rank, adapter.max_rank(), adapter.config().use_rslora),
              number(*want.find("scale")))
        << name;
    expect_tensor(*m->a, *want.find("a"), dtype);
    expect_tensor(*m->b, *want.find("b"), dtype);
    ASSERT_EQ(m->bias != nullptr, want.find("bias") != nullptr) << name;
    if (m->bias) expect_tensor(*m->bias, *want.find("bias"), dtype);
  }
  for (const Json& other : *expected.find("others")->as<Json::Array>())
    EXPECT_FALSE(is_target(adapter.config(), *other.as<std::string>())) << *other.as<std::string>();
  EXPECT_TRUE(adapter.config().base_model.starts_with("tiny-"));
}

INSTANTIATE_TEST_SUITE_P(All, PeftFixture,
                         testing::Values("split_qkv", "q_and_v", "fused_qkv", "gate_up", "rslora",
                                         "patterns", "lora_bias", "all_linear", "regex", "layers",
                                         "excluded"),
                         [](const auto& info) { return std::string(info.param); });

TEST(PeftFixtures, AllAreRead) {
  EXPECT_EQ(std::distance(fs::directory_iterator(kAdapters), {}), 11);
}

}  // namespace
}  // namespace tp

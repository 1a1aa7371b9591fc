// Our side of safetensors_testing.py: reads the files of the reference implementation in a folder
// ("read FOLDER"), writes one for it ("write FILE"), or says as JSON what is in each file of a
// folder that we accept ("describe FOLDER").

#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "harness/base/check.h"
#include "harness/base/checkpoint.h"
#include "harness/base/json.h"

namespace {

namespace fs = std::filesystem;
using namespace tp;

int failures = 0;

void expect(bool is_so, const std::string& what) {
  if (is_so) return;
  fmt::print(stderr, "wrong: {}\n", what);
  ++failures;
}

// What element i of a tensor is; both sides know.
double known(std::string_view dtype, std::int64_t i) {
  if (dtype == "U8") return double((37 * i + 11) % 256);
  if (dtype == "I32") return double(-65537 * i + 1);
  if (dtype == "I64") return double(-(std::int64_t(1) << 33) * i + 1);
  if (dtype == "BOOL") return i % 3 == 0;
  return double(i % 13 - 6) / 4;
}

double element(const StoredTensor& t, std::int64_t i) {
  if (const auto type = t.type()) {
    // Aligned, as load wants it.
    alignas(8) std::byte copy[8];
    std::memcpy(copy, t.data + i * size_of(*type), std::size_t(size_of(*type)));
    return load(*type, copy, 0);
  }
  if (t.dtype == "BOOL") return double(t.data[i]);
  std::int64_t whole;
  std::memcpy(&whole, t.data + 8 * i, 8);
  return double(whole);
}

void expect_known(const Checkpoint& checkpoint, const std::string& name, const std::string& dtype,
                  const std::vector<std::int64_t>& shape) {
  const StoredTensor& t = checkpoint.at(name);
  expect(t.dtype == dtype, fmt::format("{} is {}", name, t.dtype));
  expect(t.shape == shape, fmt::format("{} is {}", name, shape_text(t.shape)));
  for (std::int64_t i = 0; i < t.elements(); ++i) {
    expect(element(t, i) == known(dtype, i), fmt::format("{}[{}] is {}", name, i, element(t, i)));
  }
}

void read_all(const fs::path& folder) {
  const Checkpoint types((folder / "types.safetensors").string());
  for (const char* dtype : {"F32", "F16", "BF16", "F8_E4M3", "U8", "I32", "I64", "BOOL"}) {
    std::string name = dtype;
    for (char& c : name) c = char(std::tolower(c));
    expect_known(types, name, dtype, {3, 5});
  }
  const Checkpoint shapes((folder / "shapes.safetensors").string());
  expect_known(shapes, "scalar", "F32", {});
  expect_known(shapes, "one", "F32", {1});
  expect_known(shapes, "empty", "BF16", {0, 4});
  expect_known(shapes, "odd", "U8", {3});
  expect_known(shapes, "four", "F16", {1, 2, 3, 4});
  expect_known(shapes, "behind", "I64", {2});
  expect(shapes.files()[0].tensors().size() == 6, "shapes has other tensors");
  const Safetensors metadata((folder / "metadata.safetensors").string());
  expect(
      metadata.metadata() ==
          std::map<std::string, std::string>{{"format", "pt"}, {"\u00e9 \"quoted\"\n", "\\\u4e2d"}},
      "metadata");
  expect(Safetensors((folder / "nothing.safetensors").string()).tensors().empty(), "nothing");
  const Checkpoint sharded((folder / "sharded").string());
  expect(sharded.files().size() == 2, "two shards");
  expect_known(sharded, "model.embed.weight", "BF16", {7, 4});
  expect_known(sharded, "model.q.weight", "F8_E4M3", {4, 4});
  expect_known(sharded, "model.q.weight_scale", "F32", {});
  expect_known(sharded, "lm_head.weight", "BF16", {7, 4});
}

void write_ours(const std::string& path) {
  std::vector<StoredTensor> tensors;
  std::vector<std::vector<std::byte>> data;
  const auto add = [&](const std::string& name, const std::string& dtype,
                       const std::vector<std::int64_t>& shape, std::size_t bytes_each) {
    StoredTensor t{.name = name, .dtype = dtype, .shape = shape};
    t.bytes = std::size_t(t.elements()) * bytes_each;
    std::vector<std::byte>& bytes = data.emplace_back(t.bytes);
    for (std::int64_t i = 0; i < t.elements(); ++i) {
      std::byte* to = bytes.data() + std::size_t(i) * bytes_each;
      alignas(8) std::byte value[8] = {};
      const auto whole = std::int64_t(known(dtype, i));
      if (const auto type = t.type()) {
        store(*type, value, 0, known(dtype, i));
      } else {
        std::memcpy(value, &whole, 8);
      }
      std::memcpy(to, value, bytes_each);
    }
    t.data = bytes.data();
    tensors.push_back(t);
  };
  add("b", "BF16", {3, 5}, 2);
  add("a", "F32", {}, 4);
  add("none", "I64", {2, 0}, 8);
  add("odd", "U8", {3}, 1);
  add("\u00e9 \"q\"", "F8_E4M3", {13}, 1);
  add("half", "F16", {2, 2}, 2);
  add("flag", "BOOL", {4}, 1);
  add("whole", "I32", {5}, 4);
  add("long", "I64", {2}, 8);
  write_safetensors(path, tensors, {{"format", "pt"}, {"\u00e9", "\"\\\n"}});
}

void describe(const fs::path& folder) {
  std::string json;
  for (const auto& entry : fs::directory_iterator(folder)) {
    std::string members;
    try {
      const Safetensors file(entry.path().string());
      for (const StoredTensor& t : file.tensors()) {
        std::string hex;
        for (std::size_t i = 0; i < t.bytes; ++i) hex += fmt::format("{:02x}", unsigned(t.data[i]));
        members += fmt::format("{}{}:[\"{}\",[{}],\"{}\"]", members.empty() ? "" : ",",
                               json_quoted(t.name), t.dtype, fmt::join(t.shape, ","), hex);
      }
    } catch (const BadInput&) {
      continue;
    }
    json += fmt::format("{}\"{}\":{{{}}}", json.empty() ? "" : ",",
                        entry.path().filename().string(), members);
  }
  fmt::print("{{{}}}\n", json);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view command = argc == 3 ? argv[1] : "";
  try {
    if (command == "read") {
      read_all(argv[2]);
    } else if (command == "write") {
      write_ours(argv[2]);
    } else if (command == "describe") {
      describe(argv[2]);
    } else {
      fmt::print(stderr, "usage: read FOLDER | write FILE | describe FOLDER\n");
      return 2;
    }
  } catch (const BadInput& e) {
    fmt::print(stderr, "{}\n", e.what());
    return 2;
  }
  return failures > 0;
}

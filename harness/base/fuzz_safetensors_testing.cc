// libFuzzer: bytes of a safetensors file. What is accepted can be read to the last byte, and comes
// back from our writer.

#include <cstdlib>

#include "harness/base/check.h"
#include "harness/base/safetensors.h"

namespace {

void require(bool is_so) {
  if (!is_so) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace tp;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  SafetensorsContents contents;
  try {
    contents = parse_safetensors(bytes, "f");
  } catch (const BadInput&) {
    return 0;
  }
  const std::vector<std::byte> written = safetensors_bytes(contents.tensors, contents.metadata);
  const SafetensorsContents again = parse_safetensors(written, "written");
  require(again.metadata == contents.metadata);
  require(again.tensors.size() == contents.tensors.size());
  for (std::size_t i = 0; i < again.tensors.size(); ++i) {
    const StoredTensor &a = contents.tensors[i], &b = again.tensors[i];
    require(a.name == b.name && a.dtype == b.dtype && a.shape == b.shape);
    require(std::equal(a.data, a.data + a.bytes, b.data, b.data + b.bytes));
    require(!a.type() || std::uint64_t(a.elements()) * size_of(*a.type()) == a.bytes);
  }
  return 0;
}

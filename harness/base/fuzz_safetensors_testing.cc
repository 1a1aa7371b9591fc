// libFuzzer: bytes of a safetensors file. What is accepted can be read to the last byte, and comes
// back from our writer.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <span>

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
  // Side by side, from behind the header to the end.
  const std::byte* next = contents.tensors.empty() ? bytes.data() + size : contents.tensors[0].data;
  std::uint64_t header = 0;
  std::memcpy(&header, data, 8);
  require(next == bytes.data() + 8 + header);
  for (const StoredTensor& t : contents.tensors) {
    require(t.data == next);
    next += t.bytes;
  }
  require(next == bytes.data() + size);

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

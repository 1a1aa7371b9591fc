#pragma once
// safetensors: the file format of checkpoints (huggingface/safetensors). 8 bytes of header length,
// little-endian; a JSON object of tensors, {"dtype", "shape", "data_offsets": [begin, end]}; then
// their data, row-major, without holes.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/dtype.h"

namespace tp {

class MappedFile;  // harness/base/mapped_file.h

// A tensor as a file holds it.
struct StoredTensor {
  std::string name;
  std::string dtype;                // the format's own word: F32, F8_E4M3, I64, ...
  std::vector<std::int64_t> shape;  // empty: one element without dimensions
  const std::byte* data = nullptr;  // within the mapping; at no particular alignment
  std::size_t bytes = 0;

  std::int64_t elements() const;  // of a shape that has been checked
  // The type that kernels know; nothing for the others, which files may contain all the same.
  std::optional<DType> type() const;
};

// The format's word for a type of ours: F8_E4M3 for e4m3.
std::string_view safetensors_word(DType type);

// A tensor's name as sentences have it: printable, and at most 160 characters of it.
std::string quoted_name(std::string_view name);

// "[4096, 128]"; of a shape with very many dimensions only the first.
std::string shape_text(const std::vector<std::int64_t>& shape);

struct SafetensorsContents {
  std::vector<StoredTensor> tensors;  // in the order of the data
  std::map<std::string, std::string> metadata;
};

// What a file with these bytes contains; `path` is for sentences. Throws BadInput naming the file,
// the tensor and the numbers.
SafetensorsContents parse_safetensors(std::span<const std::byte> bytes, const std::string& path);

// A file that is open, mapped and has been checked: the tensors lie within it, side by side, with
// as many bytes as their shapes need.
class Safetensors {
 public:
  // Throws BadInput naming the file, the tensor and the numbers.
  explicit Safetensors(const std::string& path);
  Safetensors(Safetensors&&) noexcept;
  Safetensors& operator=(Safetensors&&) noexcept;
  ~Safetensors();

  const std::string& path() const;
  const std::vector<StoredTensor>& tensors() const { return contents_.tensors; }
  const std::map<std::string, std::string>& metadata() const { return contents_.metadata; }
  // Throws BadInput if the file is no longer what was opened (MappedFile::check_unchanged).
  void check_unchanged() const;

 private:
  std::unique_ptr<MappedFile> file_;
  SafetensorsContents contents_;
};

// The bytes of a file with these tensors, in this order. The data begin at a multiple of 8 bytes,
// as the reference implementation has it. Throws BadInput: `bytes` of a tensor do not fit its dtype
// and shape, a name is given twice or cannot be one, a text is not UTF-8.
std::vector<std::byte> safetensors_bytes(const std::vector<StoredTensor>& tensors,
                                         const std::map<std::string, std::string>& metadata = {});

// Writes them beside `path` first and renames then, so that nobody ever sees half a file. Throws
// BadInput likewise, and if it cannot be written.
void write_safetensors(const std::string& path, const std::vector<StoredTensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace tp

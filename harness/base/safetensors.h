#pragma once
// safetensors: the file format of checkpoints (huggingface/safetensors). 8 bytes of header length,
// little-endian; a JSON object of tensors, {"dtype", "shape", "data_offsets": [begin, end]}; then
// their data, row-major, without holes.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
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

  std::int64_t elements() const;
  // The type that kernels know; nothing for the others, which files may contain all the same.
  std::optional<DType> type() const;
};

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
  const std::vector<StoredTensor>& tensors() const { return tensors_; }  // in the order of the data
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Throws BadInput if the file is no longer what was opened (another size or time of change).
  void check_unchanged() const;

 private:
  std::unique_ptr<MappedFile> file_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// The bytes of a file with these tensors, in this order; `bytes` and `dtype` of each must fit its
// shape. Data are aligned to 8 bytes, as the reference implementation does.
std::vector<std::byte> safetensors_bytes(const std::vector<StoredTensor>& tensors,
                                         const std::map<std::string, std::string>& metadata = {});

// Writes them beside `path` first and renames then, so that nobody ever sees half a file. Throws
// BadInput if it cannot be written.
void write_safetensors(const std::string& path, const std::vector<StoredTensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace tp

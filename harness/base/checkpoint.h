#pragma once
// A checkpoint: the tensors of one or several safetensors files, found by name.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/safetensors.h"

namespace tp {

// The weight_map of a model.safetensors.index.json: which file has which tensor. `path` is for
// sentences. Throws BadInput.
std::map<std::string, std::string> parse_safetensors_index(std::string_view text,
                                                           const std::string& path);

class Checkpoint {
 public:
  // A directory (model.safetensors.index.json if there is one, else every *.safetensors in it), or
  // one .safetensors file. Throws BadInput: nothing there, a file of the index that is missing, a
  // tensor that is in another file than the index says, or in two files. Tensors that the index
  // does not know belong to the checkpoint all the same: engines load whatever is in its files.
  explicit Checkpoint(const std::string& path);
  // These files. Throws BadInput likewise.
  explicit Checkpoint(const std::vector<std::string>& paths);

  const std::string& path() const { return path_; }  // what it was opened as, for sentences
  const std::vector<Safetensors>& files() const { return files_; }
  // nullptr: there is none.
  const StoredTensor* find(std::string_view name) const;
  // Throws BadInput naming the checkpoint, the tensor, and what looks like it.
  const StoredTensor& at(std::string_view name) const;
  // at(name), which must have this type and shape (a scalar may be [], [1] or [1, 1]): throws
  // BadInput naming file, tensor and the numbers.
  const StoredTensor& at(std::string_view name, DType type,
                         const std::vector<std::int64_t>& shape) const;
  // The file that has it, for sentences.
  const std::string& path_of(const StoredTensor& tensor) const;
  // Throws BadInput if one of the files is no longer what was opened.
  void check_unchanged() const;

 private:
  std::string path_;
  std::vector<Safetensors> files_;
  struct Found {
    std::size_t file;
    std::size_t tensor;
  };
  std::map<std::string, Found, std::less<>> found_;

  void add(const std::string& path);
  void open_indexed(const std::string& directory, const std::string& index);
};

}  // namespace tp

#include "harness/base/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/mapped_file.h"
#include "harness/base/text.h"

namespace tp {

namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMaxIndexValues = 1 << 22;

// The name of a file beside the index, and nothing that leads elsewhere.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == name.npos &&
         name.find('\0') == name.npos;
}

std::map<std::string, std::string> weight_map_of(std::string_view text) {
  const Json root = parse_json(text, kMaxIndexValues);
  const Json* map = root.find("weight_map");
  if (map == nullptr) throw BadInput("it has no weight_map");
  const Json::Object* members = map->as<Json::Object>();
  if (members == nullptr) {
    throw BadInput(fmt::format("weight_map is {}, not an object", map->describe()));
  }
  if (members->empty()) throw BadInput("weight_map is empty");
  std::map<std::string, std::string> file_of;
  for (const auto& [name, value] : *members) {
    const std::string* file = value.as<std::string>();
    if (file == nullptr || !is_plain_name(*file)) {
      throw BadInput(fmt::format("weight_map has {} for {}, not the name of a file beside it",
                                 value.describe(), quoted_name(name)));
    }
    file_of.emplace(name, *file);
  }
  return file_of;
}

std::vector<std::string> safetensors_in(const std::string& directory) {
  std::vector<std::string> paths;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    if (it->path().extension() == ".safetensors") paths.push_back(it->path().string());
  }
  if (error) throw BadInput(fmt::format("{}: {}", directory, error.message()));
  std::sort(paths.begin(), paths.end());
  return paths;
}

// A scalar may be [], [1] or [1, 1].
bool is_shape(const StoredTensor& tensor, const std::vector<std::int64_t>& wanted) {
  const auto is_scalar = [](const std::vector<std::int64_t>& shape) {
    return shape.size() <= 2 &&
           std::all_of(shape.begin(), shape.end(), [](std::int64_t size) { return size == 1; });
  };
  return tensor.shape == wanted || (is_scalar(tensor.shape) && is_scalar(wanted));
}

}  // namespace

std::map<std::string, std::string> parse_safetensors_index(std::string_view text,
                                                           const std::string& path) {
  try {
    return weight_map_of(text);
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
}

Checkpoint::Checkpoint(const std::string& path) : path_(path) {
  std::error_code error;
  const std::string index = (fs::path(path) / "model.safetensors.index.json").string();
  if (!fs::is_directory(path, error)) {
    add(path);
  } else if (fs::exists(index, error)) {
    open_indexed(path, index);
  } else {
    const std::vector<std::string> paths = safetensors_in(path);
    if (paths.empty()) {
      throw BadInput(fmt::format(
          "{}: there is neither model.safetensors.index.json nor any *.safetensors in it", path));
    }
    for (const std::string& file : paths) add(file);
  }
}

Checkpoint::Checkpoint(const std::vector<std::string>& paths) {
  if (paths.empty()) throw BadInput("a checkpoint of no files");
  path_ = paths.size() == 1 ? paths[0] : fmt::format("{} and {} more", paths[0], paths.size() - 1);
  for (const std::string& file : paths) add(file);
}

void Checkpoint::add(const std::string& path) {
  const std::size_t file = files_.size();
  files_.emplace_back(path);
  const std::vector<StoredTensor>& tensors = files_.back().tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto [it, added] = found_.try_emplace(tensors[i].name, Found{file, i});
    if (!added) {
      throw BadInput(fmt::format("tensor {} is in two files, {} and {}",
                                 quoted_name(tensors[i].name), files_[it->second.file].path(),
                                 path));
    }
  }
}

void Checkpoint::open_indexed(const std::string& directory, const std::string& index) {
  const MappedFile mapped(index);
  const std::span<const std::byte> bytes = mapped.bytes();
  const auto file_of =
      parse_safetensors_index({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, index);
  std::set<std::string> names;
  for (const auto& [tensor, file] : file_of) names.insert(file);
  for (const std::string& name : names) {
    const std::string path = (fs::path(directory) / name).string();
    std::error_code error;
    if (!fs::exists(path, error)) {
      throw BadInput(fmt::format("{}: it names the file {}, and there is none", index, path));
    }
    add(path);
  }
  for (const auto& [tensor, file] : file_of) {
    const StoredTensor* stored = find(tensor);
    if (stored == nullptr) {
      throw BadInput(fmt::format("{}: it says that tensor {} is in {}, and no file has it", index,
                                 quoted_name(tensor), file));
    }
    const std::string actual = fs::path(path_of(*stored)).filename().string();
    if (actual != file) {
      throw BadInput(fmt::format("{}: it says that tensor {} is in {}, and {} has it", index,
                                 quoted_name(tensor), file, actual));
    }
  }
}

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const auto it = found_.find(name);
  return it == found_.end() ? nullptr : &files_[it->second.file].tensors()[it->second.tensor];
}

const StoredTensor& Checkpoint::at(std::string_view name) const {
  if (const StoredTensor* tensor = find(name)) return *tensor;
  std::vector<std::string> names;
  for (const auto& [known, found] : found_) names.push_back(known);
  std::vector<std::string> near = near_misses(name, names);
  for (std::string& other : near) other = quoted_name(other);
  const std::string hint = near.empty() ? fmt::format("it has {} others", names.size())
                                        : fmt::format("did you mean {}?", fmt::join(near, ", "));
  throw BadInput(fmt::format("{}: there is no tensor {} ({})", path_, quoted_name(name), hint));
}

const StoredTensor& Checkpoint::at(std::string_view name, DType type,
                                   const std::vector<std::int64_t>& shape) const {
  const StoredTensor& tensor = at(name);
  if (tensor.type() != type || !is_shape(tensor, shape)) {
    throw BadInput(fmt::format("{}: tensor {} is {} {}, not {} {}", path_of(tensor),
                               quoted_name(name), tensor.dtype, shape_text(tensor.shape),
                               safetensors_word(type), shape_text(shape)));
  }
  return tensor;
}

const std::string& Checkpoint::path_of(const StoredTensor& tensor) const {
  return files_[found_.find(tensor.name)->second.file].path();
}

void Checkpoint::check_unchanged() const {
  for (const Safetensors& file : files_) file.check_unchanged();
}

}  // namespace tp

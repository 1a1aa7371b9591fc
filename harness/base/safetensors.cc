#include "harness/base/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>
#include <tuple>
#include <utility>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/mapped_file.h"
#include "harness/base/text.h"

namespace tp {

namespace {

constexpr std::uint64_t kMaxHeader = 100'000'000;  // the reference implementation's
// Half a million tensors. Hundred million bytes could be fifty million values, and gigabytes here.
constexpr std::size_t kMaxValues = 1 << 22;
constexpr std::string_view kMetadata = "__metadata__";

struct Word {
  std::string_view name;
  int bits;
};
constexpr Word kWords[] = {
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
};
constexpr DType kTypes[] = {DType::f32,  DType::f16, DType::bf16,
                            DType::e4m3, DType::u8,  DType::i32};

// Why a tensor's dtype, shape and size in bytes do not go together; nothing if they do.
std::optional<std::string> mismatch(const StoredTensor& t) {
  const auto* word = std::find_if(std::begin(kWords), std::end(kWords),
                                  [&](const Word& w) { return w.name == t.dtype; });
  if (word == std::end(kWords)) return fmt::format("unknown dtype \"{}\"", printable(t.dtype));
  // Zeros last: a shape is no better for containing one.
  std::int64_t bits = word->bits;
  bool empty = false;
  for (std::size_t i = 0; i < t.shape.size(); ++i) {
    if (t.shape[i] < 0) return fmt::format("shape[{}] is {}", i, t.shape[i]);
    empty |= t.shape[i] == 0;
    if (t.shape[i] != 0 && __builtin_mul_overflow(bits, t.shape[i], &bits)) {
      return fmt::format("shape {} of {} is more than {} bits", shape_text(t.shape), t.dtype,
                         std::numeric_limits<std::int64_t>::max());
    }
  }
  if (empty) bits = 0;
  if (bits % 8 != 0) {
    return fmt::format("shape {} of {} comes to {} bits, not to whole bytes", shape_text(t.shape),
                       t.dtype, bits);
  }
  if (std::uint64_t(bits / 8) != t.bytes) {
    return fmt::format("shape {} of {} needs {} bytes, and there are {}", shape_text(t.shape),
                       t.dtype, bits / 8, t.bytes);
  }
  return std::nullopt;
}

// The whole number of at least 0 that `value` is.
std::int64_t size_of_json(const Json& value, std::string_view what, std::size_t index) {
  const std::int64_t* number = value.as<std::int64_t>();
  if (number == nullptr || *number < 0) {
    throw BadInput(fmt::format("{}[{}] is {}, not a whole number in 0..{}", what, index,
                               value.describe(), std::numeric_limits<std::int64_t>::max()));
  }
  return *number;
}

const Json::Array& array_at(const Json& entry, std::string_view key) {
  const Json* value = entry.find(key);
  if (value == nullptr) throw BadInput(fmt::format("{} is missing", key));
  const Json::Array* array = value->as<Json::Array>();
  if (array == nullptr) {
    throw BadInput(fmt::format("{} is {}, not an array", key, value->describe()));
  }
  return *array;
}

// A tensor as the header has it; `data` are the bytes behind the header.
StoredTensor tensor_from(std::string name, const Json& entry, std::span<const std::byte> data) {
  const Json::Object* object = entry.as<Json::Object>();
  if (object == nullptr) throw BadInput(fmt::format("it is {}, not an object", entry.describe()));
  for (const auto& [key, value] : *object) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      throw BadInput(fmt::format("unknown key \"{}\"", printable(key)));
    }
  }
  StoredTensor tensor;
  tensor.name = std::move(name);
  const Json* dtype = entry.find("dtype");
  if (dtype == nullptr) throw BadInput("dtype is missing");
  const std::string* word = dtype->as<std::string>();
  if (word == nullptr) throw BadInput(fmt::format("dtype is {}, not a word", dtype->describe()));
  tensor.dtype = *word;
  const Json::Array& shape = array_at(entry, "shape");
  tensor.shape.reserve(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    tensor.shape.push_back(size_of_json(shape[i], "shape", i));
  }
  const Json::Array& offsets = array_at(entry, "data_offsets");
  if (offsets.size() != 2) {
    throw BadInput(fmt::format("data_offsets has {} numbers, not 2", offsets.size()));
  }
  const std::int64_t begin = size_of_json(offsets[0], "data_offsets", 0);
  const std::int64_t end = size_of_json(offsets[1], "data_offsets", 1);
  if (end < begin) throw BadInput(fmt::format("data_offsets [{}, {}] are reversed", begin, end));
  if (std::uint64_t(end) > data.size()) {
    throw BadInput(fmt::format("data_offsets [{}, {}] reach beyond the {} bytes of data", begin,
                               end, data.size()));
  }
  tensor.data = data.data() + begin;
  tensor.bytes = std::size_t(end - begin);
  if (const auto why = mismatch(tensor)) throw BadInput(*why);
  return tensor;
}

std::map<std::string, std::string> metadata_from(const Json& value) {
  const Json::Object* object = value.as<Json::Object>();
  if (object == nullptr) {
    throw BadInput(fmt::format("{} is {}, not an object", kMetadata, value.describe()));
  }
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : *object) {
    const std::string* string = text.as<std::string>();
    if (string == nullptr) {
      throw BadInput(
          fmt::format("{}: \"{}\" is {}, not a text", kMetadata, printable(key), text.describe()));
    }
    metadata.emplace(key, *string);
  }
  return metadata;
}

// That the tensors, sorted by where they lie, cover the data without holes and overlaps.
void check_cover(const std::vector<StoredTensor>& tensors, std::span<const std::byte> data) {
  const std::byte* covered = data.data();
  const StoredTensor* previous = nullptr;
  for (const StoredTensor& t : tensors) {
    const std::size_t begin = std::size_t(t.data - data.data());
    if (t.data < covered) {
      throw BadInput(fmt::format("tensor {} begins at byte {} of the data, within tensor {}",
                                 quoted_name(t.name), begin, quoted_name(previous->name)));
    }
    if (t.data > covered) {
      throw BadInput(fmt::format("bytes {} to {} of the data, before tensor {}, are no tensor's",
                                 covered - data.data(), begin, quoted_name(t.name)));
    }
    covered = t.data + t.bytes;
    previous = &t;
  }
  if (std::size_t(covered - data.data()) != data.size()) {
    throw BadInput(fmt::format("the tensors end at byte {} of the data, and there are {}",
                               covered - data.data(), data.size()));
  }
}

SafetensorsContents contents_of(std::span<const std::byte> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.starts_with("version https://git-lfs.github.com/")) {
    throw BadInput("it is a Git LFS pointer, not the file itself (git lfs pull fetches that)");
  }
  if (bytes.size() < 8) {
    throw BadInput(fmt::format(
        "it has {} bytes, and a safetensors file begins with 8 of header length", bytes.size()));
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | std::uint64_t(bytes[std::size_t(i)]);
  if (length > kMaxHeader) {
    throw BadInput(fmt::format("its header length, {}, is above {}; is it a safetensors file?",
                               length, kMaxHeader));
  }
  if (length > bytes.size() - 8) {
    throw BadInput(
        fmt::format("its header length is {}, and only {} bytes follow", length, bytes.size() - 8));
  }
  const std::string_view header = text.substr(8, length);
  if (!header.starts_with('{')) throw BadInput("its header does not begin with '{'");
  Json root;
  try {
    root = parse_json(header, kMaxValues);
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("header: {}", e.what()));
  }
  const std::span<const std::byte> data = bytes.subspan(8 + length);

  SafetensorsContents contents;
  auto& members = std::get<Json::Object>(root.value);
  contents.tensors.reserve(members.size());
  for (auto& [name, value] : members) {
    if (name == kMetadata) {
      contents.metadata = metadata_from(value);
      continue;
    }
    try {
      contents.tensors.push_back(tensor_from(name, value, data));
    } catch (const BadInput& e) {
      throw BadInput(fmt::format("tensor {}: {}", quoted_name(name), e.what()));
    }
  }
  // Empty tensors come before the one that begins where they lie.
  std::stable_sort(contents.tensors.begin(), contents.tensors.end(),
                   [](const StoredTensor& a, const StoredTensor& b) {
                     return std::tie(a.data, a.bytes) < std::tie(b.data, b.bytes);
                   });
  check_cover(contents.tensors, data);
  return contents;
}

std::string json_of(std::string_view text) {
  std::string quoted = json_quoted(text);
  // What is not UTF-8 would silently become another text.
  if (*parse_json(quoted).as<std::string>() != text) {
    throw BadInput(fmt::format("\"{}\" is not UTF-8", printable(text)));
  }
  return quoted;
}

// Length, JSON and padding.
std::string head_of(const std::vector<StoredTensor>& tensors,
                    const std::map<std::string, std::string>& metadata) {
  std::string json = "{";
  const auto comma = [&] { return json.size() > 1 ? "," : ""; };
  if (!metadata.empty()) {
    json += fmt::format("\"{}\":{{", kMetadata);
    const char* between = "";
    for (const auto& [key, text] : metadata) {
      json += fmt::format("{}{}:{}", std::exchange(between, ","), json_of(key), json_of(text));
    }
    json += "}";
  }
  std::set<std::string_view> names;
  std::size_t offset = 0;
  for (const StoredTensor& t : tensors) {
    if (t.name == kMetadata || !names.insert(t.name).second) {
      throw BadInput(fmt::format("tensor {}: {}", quoted_name(t.name),
                                 t.name == kMetadata ? "that is what the metadata are called"
                                                     : "the name is given twice"));
    }
    if (const auto why = mismatch(t)) {
      throw BadInput(fmt::format("tensor {}: {}", quoted_name(t.name), *why));
    }
    json +=
        fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", comma(),
                    json_of(t.name), t.dtype, fmt::join(t.shape, ","), offset, offset + t.bytes);
    offset += t.bytes;
  }
  json += "}";
  json.append((8 - json.size() % 8) % 8, ' ');
  if (json.size() > kMaxHeader) {
    throw BadInput(fmt::format("a header of {} bytes is above {}", json.size(), kMaxHeader));
  }
  std::string head;
  for (int i = 0; i < 8; ++i) head += char(std::uint64_t(json.size()) >> (8 * i) & 0xFF);
  return head + json;
}

// A file that is not there unless keep() is called.
class NewFile {
 public:
  explicit NewFile(std::string path)
      : path_(std::move(path)),
        temporary_(fmt::format("{}.{}.tmp", path_, getpid())),
        fd_(open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)) {
    if (fd_ < 0) fail();
  }
  ~NewFile() {
    if (fd_ >= 0) close(fd_);
    if (!kept_) unlink(temporary_.c_str());
  }
  void write(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::byte*>(data);
    while (size > 0) {
      const ssize_t n = ::write(fd_, bytes, size);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail();
      bytes += n;
      size -= std::size_t(n);
    }
  }
  void keep() {
    if (close(std::exchange(fd_, -1)) != 0) fail();
    if (rename(temporary_.c_str(), path_.c_str()) != 0) fail();
    kept_ = true;
  }

 private:
  const std::string path_;
  const std::string temporary_;
  int fd_;
  bool kept_ = false;

  [[noreturn]] void fail() const {
    throw BadInput(fmt::format("{}: cannot be written: {}", path_, std::strerror(errno)));
  }
};

}  // namespace

std::int64_t StoredTensor::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n = size == 0 ? 0 : n * size;
  return n;
}

std::optional<DType> StoredTensor::type() const {
  for (const DType t : kTypes) {
    if (dtype == safetensors_word(t)) return t;
  }
  return std::nullopt;
}

std::string_view safetensors_word(DType type) {
  constexpr std::string_view kOurs[] = {"F32", "F16", "BF16", "F8_E4M3", "U8", "I32"};
  return kOurs[int(type)];
}

std::string quoted_name(std::string_view name) { return '"' + printable(name, 160) + '"'; }

std::string shape_text(const std::vector<std::int64_t>& shape) {
  constexpr std::size_t kShown = 8;
  const auto shown = shape.begin() + std::ptrdiff_t(std::min(shape.size(), kShown));
  return fmt::format("[{}{}]", fmt::join(shape.begin(), shown, ", "),
                     shown == shape.end() ? "" : ", ...");
}

SafetensorsContents parse_safetensors(std::span<const std::byte> bytes, const std::string& path) {
  try {
    return contents_of(bytes);
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
}

Safetensors::Safetensors(const std::string& path)
    : file_(std::make_unique<MappedFile>(path)),
      contents_(parse_safetensors(file_->bytes(), path)) {}
Safetensors::Safetensors(Safetensors&&) noexcept = default;
Safetensors& Safetensors::operator=(Safetensors&&) noexcept = default;
Safetensors::~Safetensors() = default;

const std::string& Safetensors::path() const { return file_->path(); }
void Safetensors::check_unchanged() const { file_->check_unchanged(); }

std::vector<std::byte> safetensors_bytes(const std::vector<StoredTensor>& tensors,
                                         const std::map<std::string, std::string>& metadata) {
  const std::string head = head_of(tensors, metadata);
  std::size_t size = head.size();
  for (const StoredTensor& t : tensors) size += t.bytes;
  std::vector<std::byte> bytes(size);
  std::memcpy(bytes.data(), head.data(), head.size());
  std::byte* next = bytes.data() + head.size();
  for (const StoredTensor& t : tensors) {
    next = std::copy_n(t.data, t.bytes, next);
  }
  return bytes;
}

void write_safetensors(const std::string& path, const std::vector<StoredTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::string head;
  try {
    head = head_of(tensors, metadata);
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
  NewFile file(path);
  file.write(head.data(), head.size());
  for (const StoredTensor& t : tensors) file.write(t.data, t.bytes);
  file.keep();
}

}  // namespace tp

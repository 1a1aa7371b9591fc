#include "harness/base/safetensors.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

std::vector<std::byte> as_bytes(const std::string& text) {
  const auto* data = reinterpret_cast<const std::byte*>(text.data());
  return {data, data + text.size()};
}

std::string with_length(std::uint64_t length, const std::string& rest) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += char(length >> (8 * i) & 0xFF);
  return file + rest;
}

// A file with this header and so many bytes 1, 2, 3, ... behind it.
std::string file_of(const std::string& header, std::size_t data = 0) {
  std::string file = with_length(header.size(), header);
  for (std::size_t i = 0; i < data; ++i) file += char(i + 1);
  return file;
}

// One tensor "w".
std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return fmt::format(R"({{"w":{{"dtype":"{}","shape":{},"data_offsets":{}}}}})", dtype, shape,
                     offsets);
}

// Tensors of type U8 at these offsets, called a, b, c ...
std::string bytes_at(const std::vector<std::pair<int, int>>& offsets) {
  std::string header = "{";
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    const auto [begin, end] = offsets[i];
    header += fmt::format(R"({}"{}":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{}]}})",
                          i ? "," : "", char('a' + i), end - begin, begin, end);
  }
  return header + "}";
}

std::string refusal(const std::string& file) {
  try {
    parse_safetensors(as_bytes(file), "f");
  } catch (const BadInput& e) {
    return e.what();
  }
  return "";
}

std::size_t files(const TempFolder& folder) {
  return std::size_t(
      std::distance(fs::directory_iterator(folder.path()), fs::directory_iterator()));
}

StoredTensor tensor(const std::string& name, const std::string& dtype,
                    const std::vector<std::int64_t>& shape, const std::vector<std::byte>& data) {
  return {.name = name, .dtype = dtype, .shape = shape, .data = data.data(), .bytes = data.size()};
}

TEST(Safetensors, BadFilesAreRefusedInOneSentence) {
  const std::string long_name(1000, 'x');
  const struct {
    std::string file;
    std::string sentence;
  } table[] = {
      // The header's length.
      {"", "it has 0 bytes, and a safetensors file begins with 8 of header length"},
      {"1234567", "it has 7 bytes, and a safetensors file begins with 8 of header length"},
      {with_length(0, ""), "its header does not begin with '{'"},
      {with_length(3, "{}"), "its header length is 3, and only 2 bytes follow"},
      {with_length(100'000'000, "{}"), "its header length is 100000000, and only 2 bytes follow"},
      {with_length(100'000'001, "{}"),
       "its header length, 100000001, is above 100000000; is it a safetensors file?"},
      {with_length(UINT64_MAX, "{}"),
       "its header length, 18446744073709551615, is above 100000000; is it a safetensors file?"},
      {"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
       "it is a Git LFS pointer, not the file itself (git lfs pull fetches that)"},
      // JSON.
      {file_of(" {}"), "its header does not begin with '{'"},
      {file_of("[]"), "its header does not begin with '{'"},
      {file_of("{"), "header: line 1, column 2: the text ends in the middle of a value"},
      {file_of("{}}"),
       "header: line 1, column 3: unexpected "
       "'}'"},
      {file_of("{\"\xFF\":1}"), "header: line 1, column 3: invalid string: ill-formed UTF-8 byte"},
      {file_of(R"({"\ud800":1})"),
       "header: line 1, column 9: invalid string: surrogate U+D800..U+DBFF must be followed "
       "by..."},
      {file_of(std::string("{}\0 }", 5)), "header: line 1, column 3: a NUL byte"},
      {file_of(std::string("{\"\0\":1}", 7)), "header: line 1, column 3: a NUL byte"},
      {file_of(R"({"a":1,"a":1})"), "header: the key \"a\" is given twice"},
      {file_of("{\"a\":" + std::string(100, '[')), "header: nested deeper than 64 levels"},
      // A tensor's entry.
      {file_of(R"({"w":3})"), R"(tensor "w": it is 3, not an object)"},
      {file_of(R"({"w":{}})"), R"(tensor "w": dtype is missing)"},
      {file_of(R"({"w":{"dtype":7}})"), R"(tensor "w": dtype is 7, not a word)"},
      {file_of(R"({"w":{"dtype":"U8"}})"), R"(tensor "w": shape is missing)"},
      {file_of(R"({"w":{"dtype":"U8","shape":4}})"), R"(tensor "w": shape is 4, not an array)"},
      {file_of(R"({"w":{"dtype":"U8","shape":[]}})"), R"(tensor "w": data_offsets is missing)"},
      {file_of(R"({"w":{"dtype":"U8","shape":[],"data_offsets":[0,1],"strides":[]}})", 1),
       R"(tensor "w": unknown key "strides")"},
      {file_of(one("F12", "[1]", "[0,4]"), 4), R"(tensor "w": unknown dtype "F12")"},
      {file_of(one("f32", "[1]", "[0,4]"), 4), R"(tensor "w": unknown dtype "f32")"},
      // Shapes.
      {file_of(one("U8", "[2,-1]", "[0,1]"), 1),
       R"(tensor "w": shape[1] is -1, not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[1.0]", "[0,1]"), 1),
       R"(tensor "w": shape[0] is 1.0, not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[\"1\"]", "[0,1]"), 1),
       R"(tensor "w": shape[0] is "1", not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[NaN]", "[0,1]"), 1),
       R"(tensor "w": shape[0] is null, not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[9223372036854775808]", "[0,1]"), 1),
       R"(tensor "w": shape[0] is 9.223372036854776e+18, not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[4294967296,4294967296]", "[0,0]")),
       R"(tensor "w": shape [4294967296, 4294967296] of U8 is more than 9223372036854775807 bits)"},
      {file_of(one("F64", "[0,4294967296,4294967296]", "[0,0]")),
       R"(tensor "w": shape [0, 4294967296, 4294967296] of F64 is more than 9223372036854775807 bits)"},
      // Shapes against bytes.
      {file_of(one("F32", "[2,3]", "[0,23]"), 23),
       R"(tensor "w": shape [2, 3] of F32 needs 24 bytes, and there are 23)"},
      {file_of(one("F32", "[]", "[0,0]")),
       R"(tensor "w": shape [] of F32 needs 4 bytes, and there are 0)"},
      {file_of(one("F32", "[0]", "[0,4]"), 4),
       R"(tensor "w": shape [0] of F32 needs 0 bytes, and there are 4)"},
      {file_of(one("F4", "[3]", "[0,2]"), 2),
       R"(tensor "w": shape [3] of F4 comes to 12 bits, not to whole bytes)"},
      {file_of(one("F6_E2M3", "[2]", "[0,2]"), 2),
       R"(tensor "w": shape [2] of F6_E2M3 comes to 12 bits, not to whole bytes)"},
      {file_of(one("U8", "[1,1,1,1,1,1,1,1,1]", "[0,2]"), 2),
       R"(tensor "w": shape [1, 1, 1, 1, 1, 1, 1, 1, ...] of U8 needs 1 bytes, and there are 2)"},
      // Offsets.
      {file_of(one("U8", "[1]", "[0]"), 1), R"(tensor "w": data_offsets has 1 numbers, not 2)"},
      {file_of(one("U8", "[1]", "[0,1,2]"), 1), R"(tensor "w": data_offsets has 3 numbers, not 2)"},
      {file_of(one("U8", "[1]", "[-1,0]"), 1),
       R"(tensor "w": data_offsets[0] is -1, not a whole number in 0..9223372036854775807)"},
      {file_of(one("U8", "[1]", "[1,0]"), 1), R"(tensor "w": data_offsets [1, 0] are reversed)"},
      {file_of(one("U8", "[2]", "[0,2]"), 1),
       R"(tensor "w": data_offsets [0, 2] reach beyond the 1 bytes of data)"},
      {file_of(one("U8", "[1]", "[9223372036854775806,9223372036854775807]"), 1),
       R"(tensor "w": data_offsets [9223372036854775806, 9223372036854775807] reach beyond the 1 bytes of data)"},
      {file_of(bytes_at({{0, 3}, {2, 4}}), 4),
       R"(tensor "b" begins at byte 2 of the data, within tensor "a")"},
      {file_of(bytes_at({{0, 3}, {0, 3}}), 3),
       R"(tensor "b" begins at byte 0 of the data, within tensor "a")"},
      {file_of(bytes_at({{0, 3}, {1, 1}}), 3),
       R"(tensor "b" begins at byte 1 of the data, within tensor "a")"},
      {file_of(bytes_at({{2, 4}, {0, 1}}), 4),
       R"(bytes 1 to 2 of the data, before tensor "a", are no tensor's)"},
      {file_of(bytes_at({{0, 3}}), 5), "the tensors end at byte 3 of the data, and there are 5"},
      {file_of("{}", 1), "the tensors end at byte 0 of the data, and there are 1"},
      // Metadata.
      {file_of(R"({"__metadata__":[]})"), "__metadata__ is an array, not an object"},
      {file_of(R"({"__metadata__":{"a":1}})"), R"(__metadata__: "a" is 1, not a text)"},
      // Names that would fill the screen, or command it.
      {file_of("{\"" + long_name + "\":1}"),
       "tensor \"" + long_name.substr(0, 160) + "...\": it is 1, not an object"},
      {file_of(R"({"\u001b[2J\n":1})"), R"(tensor "?[2J?": it is 1, not an object)"},
  };
  for (const auto& row : table) EXPECT_EQ(refusal(row.file), "f: " + row.sentence);
}

TEST(Safetensors, MoreValuesThanMemoryIsForAreRefused) {
  std::string header = R"({"w":{"dtype":"U8","shape":[1)";
  for (int i = 0; i < 1 << 22; ++i) header += ",1";
  header += R"(],"data_offsets":[0,1]}})";
  EXPECT_EQ(refusal(file_of(header, 1)), "f: header: more than 4194304 values");
}

TEST(Safetensors, TenThousandTensorsAreRead) {
  std::string header = "{";
  for (int i = 0; i < 10'000; ++i) {
    header += fmt::format(
        R"({}"model.layers.{}.weight":{{"dtype":"U8","shape":[1,1],"data_offsets":[{},{}]}})",
        i ? "," : "", i, i, i + 1);
  }
  const std::vector<std::byte> bytes = as_bytes(file_of(header + "}", 10'000));
  const SafetensorsContents contents = parse_safetensors(bytes, "f");
  ASSERT_EQ(contents.tensors.size(), 10'000u);
  EXPECT_EQ(contents.tensors[9'999].name, "model.layers.9999.weight");
  EXPECT_EQ(contents.tensors[9'999].data, &bytes.back());
}

TEST(Safetensors, TensorsComeInTheOrderOfTheDataWithoutACopy) {
  const std::vector<std::byte> bytes = as_bytes(file_of(bytes_at({{3, 5}, {0, 3}}), 5));
  const SafetensorsContents contents = parse_safetensors(bytes, "f");
  ASSERT_EQ(contents.tensors.size(), 2u);
  EXPECT_EQ(contents.tensors[0].name, "b");
  EXPECT_EQ(contents.tensors[1].name, "a");
  EXPECT_EQ(contents.tensors[0].data, bytes.data() + bytes.size() - 5);
  EXPECT_EQ(contents.tensors[1].data, bytes.data() + bytes.size() - 2);
  EXPECT_EQ(contents.tensors[1].bytes, 2u);
}

TEST(Safetensors, ScalarsAndEmptyTensorsAreLegal) {
  const std::vector<std::byte> bytes =
      as_bytes(file_of(R"({"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
                  "e":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]},
                  "f":{"dtype":"BF16","shape":[0],"data_offsets":[4,4]}}   )",
                       4));
  const SafetensorsContents contents = parse_safetensors(bytes, "f");
  ASSERT_EQ(contents.tensors.size(), 3u);
  EXPECT_EQ(contents.tensors[0].name, "e");
  EXPECT_EQ(contents.tensors[0].elements(), 0);
  EXPECT_EQ(contents.tensors[0].shape, (std::vector<std::int64_t>{3, 0}));
  EXPECT_EQ(contents.tensors[1].name, "s");
  EXPECT_EQ(contents.tensors[1].elements(), 1);
  EXPECT_TRUE(contents.tensors[1].shape.empty());
  EXPECT_EQ(contents.tensors[2].name, "f");
  EXPECT_TRUE(parse_safetensors(as_bytes(file_of("{}")), "f").tensors.empty());
}

TEST(Safetensors, EveryDtypeOfTheFormatHasItsSize) {
  const struct {
    std::string word;
    std::size_t bytes_of_8;
    std::optional<DType> type;
  } table[] = {
      {"BOOL", 8, {}},         {"F4", 4, {}},           {"F6_E2M3", 6, {}},
      {"F6_E3M2", 6, {}},      {"U8", 8, DType::u8},    {"I8", 8, {}},
      {"F8_E5M2", 8, {}},      {"F8_E8M0", 8, {}},      {"F8_E4M3", 8, DType::e4m3},
      {"F8_E4M3FNUZ", 8, {}},  {"F8_E5M2FNUZ", 8, {}},  {"I16", 16, {}},
      {"U16", 16, {}},         {"F16", 16, DType::f16}, {"BF16", 16, DType::bf16},
      {"I32", 32, DType::i32}, {"U32", 32, {}},         {"F32", 32, DType::f32},
      {"C64", 64, {}},         {"F64", 64, {}},         {"I64", 64, {}},
      {"U64", 64, {}},
  };
  for (const auto& row : table) {
    const auto bytes = as_bytes(
        file_of(one(row.word, "[2,4]", fmt::format("[0,{}]", row.bytes_of_8)), row.bytes_of_8));
    const SafetensorsContents contents = parse_safetensors(bytes, "f");
    EXPECT_EQ(contents.tensors[0].type(), row.type) << row.word;
    EXPECT_EQ(contents.tensors[0].dtype, row.word);
    if (row.type) {
      EXPECT_EQ(safetensors_word(*row.type), row.word);
    }
  }
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  const TempFolder folder;
  const std::string path = folder.at("f.safetensors");
  const auto bytes = as_bytes("0123456789ab");
  const std::vector<std::byte> three(bytes.begin(), bytes.begin() + 3), last = {bytes.back()};
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"\"\\\n\u00e9", "\t"}};
  const std::vector<StoredTensor> tensors = {
      tensor("model.weight", "U8", {3}, three),
      tensor("empty", "I64", {0, 7}, {}),
      tensor("\u00e9 \"quoted\"", "F32", {1, 1, 3}, bytes),  // behind three bytes: not aligned
      tensor("", "F8_E4M3", {}, last),
  };
  write_safetensors(path, tensors, metadata);
  EXPECT_EQ(files(folder), 1u);  // nothing is left beside it

  const Safetensors file(path);
  EXPECT_EQ(file.path(), path);
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), 4u);
  for (std::size_t i = 0; i < 4; ++i) {
    const StoredTensor& read = file.tensors()[i];
    EXPECT_EQ(read.name, tensors[i].name);
    EXPECT_EQ(read.dtype, tensors[i].dtype);
    EXPECT_EQ(read.shape, tensors[i].shape);
    ASSERT_EQ(read.bytes, tensors[i].bytes);
    EXPECT_TRUE(std::equal(read.data, read.data + read.bytes, tensors[i].data));
  }
  // The same bytes in memory, with the data at a multiple of 8.
  const std::vector<std::byte> memory = safetensors_bytes(tensors, metadata);
  std::ifstream in(path, std::ios::binary);
  const std::string stored((std::istreambuf_iterator<char>(in)), {});
  EXPECT_EQ(as_bytes(stored), memory);
  EXPECT_EQ((memory.size() - 3 - 12 - 1) % 8, 0u);
}

TEST(Safetensors, TheWriterRefusesWhatNobodyCouldRead) {
  const TempFolder folder;
  const auto four = as_bytes("abcd");
  const struct {
    std::vector<StoredTensor> tensors;
    std::map<std::string, std::string> metadata;
    const char* sentence;
  } table[] = {
      {{tensor("w", "F32", {1}, four), tensor("w", "U8", {4}, four)},
       {},
       R"(tensor "w": the name is given twice)"},
      {{tensor("__metadata__", "F32", {1}, four)},
       {},
       R"(tensor "__metadata__": that is what the metadata are called)"},
      {{tensor("w", "F32", {2}, four)},
       {},
       R"(tensor "w": shape [2] of F32 needs 8 bytes, and there are 4)"},
      {{tensor("w", "F32", {-1}, four)}, {}, R"(tensor "w": shape[0] is -1)"},
      {{tensor("w", "float", {1}, four)}, {}, R"(tensor "w": unknown dtype "float")"},
      {{tensor("w\xFF", "F32", {1}, four)}, {}, R"("w?" is not UTF-8)"},
      {{}, {{"k", "\xC3"}}, R"("?" is not UTF-8)"},
  };
  const std::string path = folder.at("f.safetensors");
  for (const auto& row : table) {
    try {
      write_safetensors(path, row.tensors, row.metadata);
      ADD_FAILURE() << row.sentence;
    } catch (const BadInput& e) {
      EXPECT_EQ(e.what(), path + ": " + row.sentence);
    }
    EXPECT_THROW(safetensors_bytes(row.tensors, row.metadata), BadInput);
  }
  EXPECT_EQ(files(folder), 0u);
}

TEST(Safetensors, AFileThatCannotBeWrittenLeavesTheOldOneAlone) {
  const TempFolder folder;
  const auto four = as_bytes("abcd");
  try {
    write_safetensors(folder.at("none/f"), {tensor("w", "U8", {4}, four)});
    ADD_FAILURE();
  } catch (const BadInput& e) {
    EXPECT_EQ(e.what(), folder.at("none/f") + ": cannot be written: No such file or directory");
  }
  // A folder is in the way of the rename.
  fs::create_directory(folder.at("f"));
  try {
    write_safetensors(folder.at("f"), {tensor("w", "U8", {4}, four)});
    ADD_FAILURE();
  } catch (const BadInput& e) {
    EXPECT_EQ(e.what(), folder.at("f") + ": cannot be written: Is a directory");
  }
  EXPECT_EQ(files(folder), 1u);
}

TEST(Safetensors, AMemfdIsAFileToo) {
  const std::vector<std::byte> w = as_bytes("wxyz");
  const std::vector<std::byte> bytes = safetensors_bytes({tensor("w", "F32", {1}, w)});
  const int fd = memfd_create("checkpoint", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(write(fd, bytes.data(), bytes.size()), ssize_t(bytes.size()));
  const Safetensors file(fmt::format("/proc/self/fd/{}", fd));
  close(fd);
  ASSERT_EQ(file.tensors().size(), 1u);
  EXPECT_EQ(std::memcmp(file.tensors()[0].data, "wxyz", 4), 0);
  EXPECT_NO_THROW(file.check_unchanged());
}

TEST(Safetensors, MovedFilesKeepTheirTensors) {
  const TempFolder folder;
  const auto w = as_bytes("wxyz");
  write_safetensors(folder.at("f"), {tensor("w", "F32", {1}, w)});
  Safetensors first(folder.at("f"));
  const StoredTensor* stored = first.tensors().data();
  Safetensors second = std::move(first);
  EXPECT_EQ(second.tensors().data(), stored);
  EXPECT_EQ(std::memcmp(second.tensors()[0].data, "wxyz", 4), 0);
}

}  // namespace
}  // namespace tp

#include "properties/run/image.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace tp {

namespace {

// Calls f(offset, bytes) for whatever of a buffer some piece covers.
template <typename F>
void for_each_piece(const LocalBuffer& local, F f) {
  const std::int64_t width = size_of(local.dtype);
  if (!local.content.empty()) f(std::size_t{0}, local.content.size());
  for (const Piece& piece : local.pieces) {
    const Shard rows = local_rows(local, piece);
    for (std::int64_t i = rows.offset; i < rows.end(); ++i)
      f(std::size_t((i * local.cols + piece.at) * width), std::size_t(piece.cols.size * width));
  }
}

}  // namespace

std::size_t buffer_bytes(const LocalBuffer& buffer) {
  return std::size_t(buffer.rows * buffer.cols) * std::size_t(size_of(buffer.dtype));
}

Shard local_rows(const LocalBuffer& buffer, const Piece& piece) {
  return {piece.at_row, piece.rows ? piece.rows->size : buffer.rows};
}

Image blank_image(const LocalBuffer& local, std::optional<Poison> poison) {
  Image image{local,
              std::vector<std::byte>(buffer_bytes(local), std::byte(poison.value_or(Poison::nan)))};
  if (!local.content.empty()) image.bytes = local.content;
  return image;
}

void place(const std::vector<std::byte>& data, Image& image, const Piece& piece) {
  const std::int64_t width = size_of(image.local.dtype), row_bytes = piece.cols.size * width;
  for (std::int64_t i = 0; i < local_rows(image.local, piece).size; ++i) {
    std::memcpy(image.bytes.data() + ((piece.at_row + i) * image.local.cols + piece.at) * width,
                data.data() + i * row_bytes, std::size_t(row_bytes));
  }
}

void upload(Stream& stream, const Image& image, const Buffer& buffer, bool whole) {
  std::byte* to = buffer.as<std::byte>();
  if (whole) {
    from_host_when_reached(stream, to, image.bytes.data(), image.bytes.size());
  } else {
    for_each_piece(image.local, [&](std::size_t at, std::size_t bytes) {
      from_host_when_reached(stream, to + at, image.bytes.data() + at, bytes);
    });
  }
}

void download(Stream& stream, Image& image, const Buffer& buffer, bool whole) {
  const std::byte* from = buffer.as<std::byte>();
  if (image.local.use == Use::workspace) return;
  if (whole) {
    to_host(stream, image.bytes.data(), from, image.bytes.size());
  } else {
    for_each_piece(image.local, [&](std::size_t at, std::size_t bytes) {
      to_host(stream, image.bytes.data() + at, from + at, bytes);
    });
  }
}

void check_untouched(const Image& before, const Image& after, int tp_rank) {
  const bool input = before.local.use == Use::input;
  const std::byte* expected = before.bytes.data();
  std::vector<std::byte> with_own;
  if (!input) {  // the operator's own elements may be anything
    with_own = before.bytes;
    for_each_piece(before.local, [&](std::size_t at, std::size_t bytes) {
      std::memcpy(with_own.data() + at, after.bytes.data() + at, bytes);
    });
    expected = with_own.data();
  }
  const std::byte* found = after.bytes.data();
  if (std::memcmp(expected, found, after.bytes.size()) == 0) return;
  const std::int64_t at = std::mismatch(found, found + after.bytes.size(), expected).first - found;
  const std::int64_t element = at / size_of(before.local.dtype);
  throw Fault{input ? Outcome::InputModified : Outcome::OutOfBounds,
              fmt::format("{}[{}, {}]: {} was overwritten", before.local.name,
                          element / before.local.cols, element % before.local.cols,
                          input ? "an input" : "an element that is not the operator's"),
              tp_rank};
}

void take_pieces(const Image& image, std::vector<std::byte>& outputs) {
  const std::int64_t width = size_of(image.local.dtype);
  for (const Piece& piece : image.local.pieces) {
    const Shard rows = local_rows(image.local, piece);
    for (std::int64_t i = rows.offset; i < rows.end(); ++i) {
      const std::byte* row = image.bytes.data() + (i * image.local.cols + piece.at) * width;
      outputs.insert(outputs.end(), row, row + piece.cols.size * width);
    }
  }
}

}  // namespace tp

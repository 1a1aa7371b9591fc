#pragma once
// A rank's buffers as the host sees them: what goes into device memory before a stage, and what
// must have become of it afterwards.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "harness/device/buffer.h"
#include "harness/device/stream.h"
#include "properties/run/stage.h"

namespace tp {

// What memory holds before anything is written: a large finite and a tiny positive number in every
// type, so that a maximum sees one of them and a minimum the other; and NaN.
enum class Poison : std::uint8_t { large = 0x7B, tiny = 0x01, nan = 0xFF };

// The bytes of a buffer as the host sees them.
struct Image {
  LocalBuffer local;
  std::vector<std::byte> bytes;
};

// Every byte is poison; without poison, NaN.
Image blank_image(const LocalBuffer& local, std::optional<Poison> poison);

// The rows of the buffer that a piece covers.
Shard local_rows(const LocalBuffer& buffer, const Piece& piece);

// Copies a piece's rows (dense) into an image.
void place(const std::vector<std::byte>& data, Image& image, const Piece& piece);

// Gives an input its data, and fetches what a buffer holds; asynchronous, so the image must live
// on. Unless `whole`, what nobody owns is neither written nor read: memory was not poisoned, and
// compute-sanitizer would rightly say that it was never initialised.
void upload(Stream& stream, const Image& image, const Buffer& buffer, bool whole);
void download(Stream& stream, Image& image, const Buffer& buffer, bool whole);

// Throws Fault where an input, or an element that is not the operator's, has changed.
void check_untouched(const Image& before, const Image& after, int tp_rank);

// Appends the pieces of an output, dense.
void take_pieces(const Image& image, std::vector<std::byte>& outputs);

// Bytes of a buffer's payload.
std::size_t buffer_bytes(const LocalBuffer& buffer);

}  // namespace tp

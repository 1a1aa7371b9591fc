#include "properties/run/pass.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "harness/base/check.h"

namespace tp {

namespace {

// The bytes of a buffer as the host sees them.
struct Image {
  LocalBuffer local;
  std::vector<std::byte> bytes;
  std::vector<bool> owned;  // by column: some piece covers it
};

Image blank_image(const LocalBuffer& local, Poison poison) {
  const std::size_t size = std::size_t(local.rows * local.cols) * std::size_t(size_of(local.dtype));
  Image image{local, std::vector<std::byte>(size, std::byte(poison)),
              std::vector<bool>(std::size_t(local.cols))};
  for (const Piece& p : local.pieces) {
    for (std::int64_t j = 0; j < p.cols.size; ++j) image.owned[std::size_t(p.at + j)] = true;
  }
  return image;
}

// A loader that slices beyond a tensor is a finding like any other, not a broken harness.
void check_piece(const Stage& stage, const LocalBuffer& local, const Piece& piece, int tp_rank) {
  const TensorSpec& tensor = tensor_of(stage, piece.tensor);
  if (piece.cols.offset < 0 || piece.cols.end() > tensor.cols) {
    throw Fault{Outcome::OutOfBounds,
                fmt::format("tp_rank {} takes columns {} .. {} of {}, which has {}", tp_rank,
                            piece.cols.offset, piece.cols.end(), tensor.name, tensor.cols),
                tp_rank};
  }
  TP_CHECK(tensor.rows == local.rows && tensor.dtype == local.dtype &&
               piece.at + piece.cols.size <= local.cols,
           "piece does not fit buffer " + local.name);
}

std::byte* piece_start(Image& image, const Piece& p) {
  return image.bytes.data() + p.at * size_of(image.local.dtype);
}

// What an input must still hold, and what an output's padding must still hold.
void check_untouched(const Image& before, const Image& after, int tp_rank) {
  const std::int64_t width = size_of(before.local.dtype);
  for (std::int64_t i = 0; i < before.local.rows; ++i) {
    const std::int64_t line = i * before.local.cols * width;
    if (std::memcmp(&before.bytes[std::size_t(line)], &after.bytes[std::size_t(line)],
                    std::size_t(before.local.cols * width)) == 0) {
      continue;
    }
    for (std::int64_t j = 0; j < before.local.cols; ++j) {
      if (before.local.use == Use::output && before.owned[std::size_t(j)]) continue;
      const std::size_t at = std::size_t(line + j * width);
      if (std::memcmp(&before.bytes[at], &after.bytes[at], std::size_t(width)) == 0) continue;
      const bool input = before.local.use == Use::input;
      throw Fault{
          input ? Outcome::InputModified : Outcome::OutOfBounds,
          fmt::format("tp_rank {}, {}[{}, {}]: {} was overwritten", tp_rank, before.local.name, i,
                      j, input ? "an input" : "a column that is not the operator's"),
          tp_rank};
    }
  }
}

void trace_values(const PassOptions& options, int tp_rank, const Stage& stage, const Image& image) {
  if (!options.trace) return;
  std::string text;
  for (std::int64_t j = 0; j < std::min<std::int64_t>(image.local.cols, 8); ++j) {
    text += fmt::format(" {:.6g}", load(image.local.dtype, image.bytes.data(), j));
  }
  options.trace(fmt::format("tp_rank {:2}  {}  {}  {} [{} x {}] row 0:{}{}", tp_rank, stage.name,
                            image.local.use == Use::input ? "in " : "out", image.local.name,
                            image.local.rows, image.local.cols, text,
                            image.local.cols > 8 ? " ..." : ""));
}

// The life of one rank: all stages, one after another, on its own device memory.
void run_rank(TpGroup& group, Stream& stream, const std::vector<Stage>& stages,
              const DataRegime& regime, const PassOptions& options,
              std::vector<std::byte>& outputs) {
  const int tp_rank = group.tp_rank();
  std::map<std::string, std::pair<LocalBuffer, Buffer>> buffers;
  std::set<std::string> produced;  // tensors that an earlier stage wrote
  for (const Stage& stage : stages) {
    std::vector<Image> images;
    for (const LocalBuffer& local : stage.buffers(tp_rank)) {
      Image image = blank_image(local, options.poison);
      for (const Piece& piece : local.pieces) {
        check_piece(stage, local, piece, tp_rank);
        if (local.use != Use::input || produced.contains(piece.tensor)) continue;
        const TensorSpec& tensor = tensor_of(stage, piece.tensor);
        fill_block(tensor, regime, {0, tensor.rows}, piece.cols, piece_start(image, piece),
                   local.cols);
      }
      if (!buffers.contains(local.name)) {
        Buffer buffer(local.name, image.bytes.size(), std::uint8_t(options.poison));
        from_host_when_reached(stream, buffer.data(), image.bytes.data(), image.bytes.size());
        buffers.emplace(local.name, std::pair{local, std::move(buffer)});
      }
      images.push_back(std::move(image));
    }
    RankRun run(group, stream, buffers);
    stream.synchronize();
    stage.run(run);

    std::vector<Image> after = images;
    for (Image& image : after) {
      to_host(stream, image.bytes.data(), buffers.at(image.local.name).second.data(),
              image.bytes.size());
    }
    stream.synchronize();
    for (auto& [name, entry] : buffers) {
      if (auto damage = entry.second.check_guards()) {
        throw Fault{Outcome::OutOfBounds, fmt::format("tp_rank {}: {}", tp_rank, *damage), tp_rank};
      }
    }
    for (std::size_t b = 0; b < images.size(); ++b) {
      if (images[b].local.use == Use::workspace) continue;
      check_untouched(images[b], after[b], tp_rank);
      trace_values(options, tp_rank, stage, after[b]);
      if (images[b].local.use != Use::output) continue;
      const LocalBuffer& local = images[b].local;
      for (const Piece& piece : local.pieces) {
        produced.insert(piece.tensor);
        const std::size_t row_bytes = std::size_t(piece.cols.size * size_of(local.dtype));
        for (std::int64_t i = 0; i < local.rows; ++i) {
          const std::byte* row =
              piece_start(after[b], piece) + i * local.cols * size_of(local.dtype);
          outputs.insert(outputs.end(), row, row + row_bytes);
        }
      }
    }
  }
}

}  // namespace

std::size_t piece_bytes(const LocalBuffer& buffer, const Piece& piece) {
  return std::size_t(buffer.rows * piece.cols.size) * std::size_t(size_of(buffer.dtype));
}

const TensorSpec& tensor_of(const Stage& stage, const std::string& name) {
  for (const auto* list : {&stage.inputs, &stage.outputs}) {
    for (const TensorSpec& t : *list) {
      if (t.name == name) return t;
    }
  }
  die(__FILE__, __LINE__, "stage " + stage.name + " has no tensor " + name);
}

PassResult run_pass(World& world, const Case& c, const std::vector<Stage>& stages,
                    const DataRegime& regime, const PassOptions& options) {
  GroupSession session(world, c.tp_size, options.deadline, options.trace);
  const Shard local = session.local_ranks();
  Scheduler scheduler({.seed = c.seed,
                       .poison = std::uint8_t(options.poison),
                       .deadline = options.deadline,
                       .running = &ledger_page(world.process()).running});
  std::vector<TpGroup> groups;
  std::vector<std::vector<std::byte>> outputs(static_cast<std::size_t>(local.size));
  for (std::int64_t i = 0; i < local.size; ++i)
    groups.push_back(session.group(int(local.offset + i)));
  for (std::int64_t i = 0; i < local.size; ++i) {
    scheduler.add_rank(int(local.offset + i), [&, i](Stream& stream) {
      run_rank(groups[std::size_t(i)], stream, stages, regime, options, outputs[std::size_t(i)]);
    });
  }
  const Report report = scheduler.run([&] { return session.progress(); });
  PassResult result{.fault = report.fault, .threads = report.threads};
  // A disagreement in the group is the cause, a rank that then waits in vain its effect.
  if (auto group_fault = session.finish(report.fault)) result.fault = group_fault;
  result.broken = session.broken();
  for (const auto& rank : outputs)
    result.outputs.insert(result.outputs.end(), rank.begin(), rank.end());
  return result;
}

}  // namespace tp

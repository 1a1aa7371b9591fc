#include "properties/run/pass.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <new>
#include <set>

#include "harness/base/check.h"
#include "harness/base/values_text.h"
#include "harness/group/device_link.h"
#include "properties/run/image.h"

namespace tp {

namespace {

// A loader that slices beyond a tensor is a finding like any other, not a broken harness.
void check_piece(const Stage& stage, const LocalBuffer& local, const Piece& piece, int tp_rank) {
  const TensorSpec& tensor = tensor_of(stage, piece.tensor);
  if (piece.cols.offset < 0 || piece.cols.end() > tensor.cols) {
    throw Fault{Outcome::OutOfBounds,
                fmt::format("takes columns {} .. {} of {}, which has {}", piece.cols.offset,
                            piece.cols.end(), tensor.name, tensor.cols),
                tp_rank};
  }
  if (piece.rows && (piece.rows->offset < 0 || piece.rows->end() > tensor.rows)) {
    throw Fault{Outcome::OutOfBounds,
                fmt::format("takes rows {} .. {} of {}, which has {}", piece.rows->offset,
                            piece.rows->end(), tensor.name, tensor.rows),
                tp_rank};
  }
  TP_CHECK(
      (piece.rows ? piece.at_row + piece.rows->size <= local.rows : tensor.rows == local.rows) &&
          tensor.dtype == local.dtype && piece.at + piece.cols.size <= local.cols,
      "piece does not fit buffer " + local.name);
}

void trace_values(const PassOptions& options, int tp_rank, const Stage& stage, const Image& image) {
  if (!options.trace) return;
  options.trace(fmt::format("tp_rank {:2}  {}  {}  {} [{} x {}] row 0:{}", tp_rank, stage.name,
                            image.local.use == Use::input ? "in " : "out", image.local.name,
                            image.local.rows, image.local.cols,
                            first_values(image.local.dtype, image.bytes.data(), image.local.cols)));
}

// What a rank keeps from stage to stage.
struct RankMemory {
  std::map<std::string, Resident> buffers;
  std::map<std::string, Image>
      latest;                      // what each buffer held at the end of the last stage that saw it
  std::set<std::string> produced;  // tensors that earlier stages wrote
};

// It is the harness that asks for this memory, so that its lack says nothing of the code under
// test.
Buffer new_buffer(Stream& stream, const LocalBuffer& local, std::size_t bytes,
                  std::optional<std::uint8_t> poison, int tp_rank) {
  try {
    return Buffer(stream, local.name, bytes, poison);
  } catch (const std::bad_alloc&) {
    throw Fault{Outcome::Skipped,
                fmt::format("no memory is left for the {} bytes of {}", bytes, local.name),
                tp_rank};
  }
}

// The buffers a stage starts with: new ones filled and copied to the device, those of earlier
// stages as they were left.
std::vector<Image> load_stage(const Stage& stage, Stream& stream, int tp_rank,
                              const PassOptions& options, InputData& data, RankMemory& memory) {
  const std::optional<std::uint8_t> poison =
      options.poison ? std::optional(std::uint8_t(*options.poison)) : std::nullopt;
  std::vector<Image> images;
  for (const LocalBuffer& local : stage.buffers(tp_rank)) {
    for (const Piece& piece : local.pieces) check_piece(stage, local, piece, tp_rank);
    if (const auto earlier = memory.latest.find(local.name); earlier != memory.latest.end()) {
      const LocalBuffer& was = earlier->second.local;
      TP_CHECK(was.rows == local.rows && was.cols == local.cols && was.dtype == local.dtype,
               "buffer " + local.name + " changes its shape between stages");
      Image& image = images.emplace_back(blank_image(local, options.poison));
      image.bytes = earlier->second.bytes;
      continue;
    }
    Image& image = images.emplace_back(blank_image(local, options.poison));
    if (local.use == Use::input) {
      for (const Piece& piece : local.pieces) {
        // What a kernel produced is read where it lies, not from a copy the harness makes.
        TP_CHECK(!memory.produced.contains(piece.tensor), "another buffer has " + piece.tensor);
        place(data.block(tensor_of(stage, piece.tensor), rows_of(stage, piece), piece.cols), image,
              piece);
      }
    }
    memory.buffers.emplace(local.name, Resident{local, new_buffer(stream, local, image.bytes.size(),
                                                                  poison, tp_rank)});
  }
  return images;
}

// Whether the buffer is new in this stage: later ones find it as it was left.
bool is_new(const RankMemory& memory, const LocalBuffer& local) {
  return !memory.latest.contains(local.name);
}

// Runs a stage with its inputs as `images` say, the new ones or all of them, the recorded way if
// there is a recording.
void launch_stage(const Stage& stage, TpGroup& group, Stream& stream, const RankMemory& memory,
                  const std::vector<const Checkpoint*>& checkpoints,
                  const std::vector<Image>& images, bool whole, Recording* recording) {
  for (const Image& image : images) {
    if (image.local.use == Use::input && (recording != nullptr || is_new(memory, image.local)))
      upload(stream, image, memory.buffers.at(image.local.name).buffer, whole);
  }
  RankRun run(group, stream, memory.buffers, checkpoints);
  if (recording != nullptr) stream.begin_recording(*recording);
  stage.run(run);
  if (recording != nullptr) stream.end_recording();
}

// The same elements in another order, and half of an only one: other data that are as good. Not of
// whole numbers, which may be places in other buffers.
void disorder(Image& image) {
  const DType t = image.local.dtype;
  if (t == DType::i32 || !image.local.content.empty()) return;
  if (image.bytes.size() == sizeof(float) && t == DType::f32) {
    store(t, image.bytes.data(), 0, load(t, image.bytes.data(), 0) / 2);
    return;
  }
  for (const Piece& piece : image.local.pieces) {
    const Shard rows = local_rows(image.local, piece);
    const std::int64_t width = piece.cols.size * size_of(t);
    for (std::int64_t i = rows.offset; i < rows.end(); ++i) {
      std::byte* row = image.bytes.data() + (i * image.local.cols + piece.at) * size_of(t);
      std::rotate(row, row + size_of(t), row + width);
    }
    for (std::int64_t i = 0; i < rows.size / 2; ++i) {
      std::byte* row = image.bytes.data() + piece.at * size_of(t);
      const std::int64_t stride = image.local.cols * size_of(t);
      std::swap_ranges(row + (rows.offset + i) * stride, row + (rows.offset + i) * stride + width,
                       row + (rows.end() - 1 - i) * stride);
    }
  }
}

// Other data for the same buffers: what is recorded over them must not stick to it.
std::vector<Image> decoys(const Stage& stage, std::vector<Image> images, InputData& data,
                          const RankMemory& memory) {
  for (Image& image : images) {
    if (image.local.use != Use::input) continue;
    if (!is_new(memory, image.local)) {
      disorder(image);
      continue;
    }
    for (const Piece& piece : image.local.pieces)
      place(data.block(tensor_of(stage, piece.tensor), rows_of(stage, piece), piece.cols), image,
            piece);
  }
  return images;
}

// The life of one rank: all stages, one after another, on its own device memory.
void run_rank(TpGroup& group, Stream& stream, const std::vector<Stage>& stages,
              const PassOptions& options, InputData& data, InputData& decoy_data,
              std::vector<std::byte>& outputs) {
  const int tp_rank = group.tp_rank();
  const bool whole = options.poison.has_value();
  RankMemory memory;
  std::deque<Recording> recordings;  // they outlive the streams' use of them
  for (const Stage& stage : stages) {
    const std::vector<Image> before = load_stage(stage, stream, tp_rank, options, data, memory);
    std::vector<Image> other;
    Recording* recording = nullptr;
    const std::vector<const Checkpoint*> checkpoints = data.checkpoints(stage);
    // What it writes must be new, or the second run would start from what the first one left.
    // Nobody records how weights are loaded.
    if (options.graph && checkpoints.empty() &&
        std::all_of(before.begin(), before.end(), [&](const Image& image) {
          return image.local.use == Use::input || is_new(memory, image.local);
        })) {
      recording = &recordings.emplace_back();
      other = decoys(stage, before, decoy_data, memory);
      launch_stage(stage, group, stream, memory, checkpoints, other, whole, recording);
      for (const Image& image : before) {
        if (image.local.use == Use::input || !options.poison) continue;
        poison(stream, memory.buffers.at(image.local.name).buffer, std::uint8_t(*options.poison));
      }
    }
    launch_stage(stage, group, stream, memory, checkpoints, before, whole, recording);
    std::vector<Image> after = before;
    for (Image& image : after)
      download(stream, image, memory.buffers.at(image.local.name).buffer, whole);
    for (const auto& [name, resident] : memory.buffers) resident.buffer.check_guards(stream);
    stream.synchronize();
    for (const auto& [name, resident] : memory.buffers) {
      if (auto damage = resident.buffer.damage()) {
        throw Fault{Outcome::OutOfBounds, *damage, tp_rank};
      }
    }
    for (std::size_t b = 0; b < before.size(); ++b) {
      if (before[b].local.use != Use::workspace) {
        check_untouched(before[b], after[b], tp_rank);
        trace_values(options, tp_rank, stage, after[b]);
      }
      if (before[b].local.use == Use::output) take_pieces(after[b], outputs);
      memory.latest.insert_or_assign(after[b].local.name, std::move(after[b]));
    }
    for (const TensorSpec& output : stage.outputs) memory.produced.insert(output.name);
  }
}

// Whether the device ends what it had begun when this process's run ended with `fault`. An exchange
// with other processes, which may never come to it, is aborted.
bool comes_to_rest(Scheduler& scheduler, const Fault& fault) {
  // Whoever exceeded the deadline had its time.
  const auto& deadline = scheduler.options().deadline;
  const bool late = deadline && std::chrono::steady_clock::now() >= *deadline;
  if (scheduler.settle(std::chrono::milliseconds(late ? 50 : 500))) return true;
  // A kernel that never ends would hold up the abort, and all that it holds goes with the process.
  DeviceLink* link = device_link();
  if (link != nullptr && fault.of_others) link->abort();
  return false;
}

}  // namespace

std::size_t piece_bytes(const LocalBuffer& buffer, const Piece& piece) {
  return std::size_t(local_rows(buffer, piece).size * piece.cols.size) *
         std::size_t(size_of(buffer.dtype));
}

const TensorSpec& tensor_of(const Stage& stage, const std::string& name) {
  for (const auto* list : {&stage.inputs, &stage.outputs}) {
    for (const TensorSpec& t : *list) {
      if (t.name == name) return t;
    }
  }
  die(__FILE__, __LINE__, "stage " + stage.name + " has no tensor " + name);
}

Shard rows_of(const Stage& stage, const Piece& piece) {
  return piece.rows.value_or(Shard{0, tensor_of(stage, piece.tensor).rows});
}

const std::vector<std::byte>& InputData::block(const TensorSpec& tensor, Shard rows, Shard cols) {
  const auto [it, is_new] =
      made_.try_emplace({tensor.name, rows.offset, rows.size, cols.offset, cols.size});
  std::vector<std::byte>& made = it->second;
  const std::int64_t width = size_of(tensor.dtype), row_bytes = cols.size * width;
  if (is_new) {
    const Shard all_rows{0, tensor.rows}, all_cols{0, tensor.cols};
    const bool cut = whole_ && (rows != all_rows || cols != all_cols);
    const std::vector<std::byte>* whole = cut ? &block(tensor, all_rows, all_cols) : nullptr;
    const auto start = std::chrono::steady_clock::now();
    made.resize(std::size_t(rows.size * row_bytes));
    if (whole == nullptr) fill_block(tensor, regime_, rows, cols, made.data(), cols.size);
    for (std::int64_t i = 0; whole != nullptr && i < rows.size; ++i) {
      const std::int64_t at = ((rows.offset + i) * tensor.cols + cols.offset) * width;
      std::memcpy(made.data() + i * row_bytes, whole->data() + at, std::size_t(row_bytes));
    }
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  TP_CHECK(made.size() == std::size_t(rows.size * row_bytes),
           "two tensors are called " + tensor.name);
  return made;
}

std::string place_of(std::size_t at, const std::vector<Stage>& stages, Shard local_ranks) {
  for (std::int64_t r = local_ranks.offset; r < local_ranks.end(); ++r) {
    for (const Stage& stage : stages) {
      for (const LocalBuffer& local : stage.buffers(int(r))) {
        if (local.use != Use::output) continue;
        for (const Piece& piece : local.pieces) {
          const std::size_t size = piece_bytes(local, piece);
          if (at >= size) {
            at -= size;
            continue;
          }
          const std::int64_t element = std::int64_t(at) / size_of(local.dtype);
          return fmt::format("tp_rank {}, {}[{}, {}]", r, piece.tensor,
                             rows_of(stage, piece).offset + element / piece.cols.size,
                             piece.cols.offset + element % piece.cols.size);
        }
      }
    }
  }
  die(__FILE__, __LINE__, "beyond the outputs");
}

PassResult run_pass(World& world, const Case& c, const std::vector<Stage>& stages, InputData& data,
                    const PassOptions& options) {
  GroupSession session(world, c.tp_size, options.deadline, options.trace);
  const Shard local = session.local_ranks();
  Scheduler scheduler({.seed = c.seed,
                       .poison = std::uint8_t(options.poison.value_or(Poison::nan)),
                       .deadline = options.deadline,
                       .running = &ledger_page(world.process()).running,
                       .delays = options.delays,
                       .serial = options.serial,
                       .timed = options.timed});
  std::set<std::string> names;
  for (const Stage& stage : stages) {
    TP_CHECK(names.insert(stage.name).second, "two stages are called " + stage.name);
    if (local.size > 0) data.checkpoints(stage);
  }
  DataRegime decoy = data.regime();
  ++decoy.seed;
  InputData decoy_data(decoy);
  std::vector<TpGroup> groups;
  std::vector<std::vector<std::byte>> outputs(static_cast<std::size_t>(local.size));
  for (std::int64_t i = 0; i < local.size; ++i)
    groups.push_back(session.group(int(local.offset + i)));
  for (std::int64_t i = 0; i < local.size; ++i) {
    scheduler.add_rank(int(local.offset + i), [&, i](Stream& stream) {
      run_rank(groups[std::size_t(i)], stream, stages, options, data, decoy_data,
               outputs[std::size_t(i)]);
      session.end_rank(int(local.offset + i), stream);
    });
  }
  Report report = scheduler.run([&] { return session.progress(); });
  PassResult result{.fault = report.fault, .threads = report.threads};
  result.times = std::move(report.times);
  // A disagreement in the group is the cause, a rank that then waits in vain its effect.
  if (auto group_fault = session.finish(report.fault)) result.fault = group_fault;
  result.broken = session.broken();
  if (report.fault) result.broken |= !comes_to_rest(scheduler, *report.fault);
  ledger_page(world.process()).begin_case(0, 0);
  for (const auto& rank : outputs)
    result.outputs.insert(result.outputs.end(), rank.begin(), rank.end());
  return result;
}

}  // namespace tp

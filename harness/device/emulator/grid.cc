#include "harness/device/emulator/grid.h"

#include <fmt/format.h>

#include <numeric>
#include <utility>

#include "harness/device/emulator/peer_stores.h"
#include "harness/device/sanitizer.h"
#include "harness/device/scheduler.h"

namespace tp::emulator {
namespace {

constexpr std::size_t kMaxResident = 64;  // blocks of one launch
// Threads of all resident blocks; every launch may have one block beyond it. Stacks are mappings,
// of which a process has 65530.
constexpr std::uint64_t kMaxResidentThreads = kTsan ? 2048 : 8192;

std::uint64_t resident_threads = 0;

// Launches that exist, for TSan.
std::vector<Grid*>& grids() {
  static auto& all = *new std::vector<Grid*>;
  return all;
}

// Blocks whose threads have all exited, for the next launch: their lists need not be made again.
std::vector<std::unique_ptr<Block>>& spare_blocks() {
  static auto& blocks = *new std::vector<std::unique_ptr<Block>>;
  return blocks;
}

}  // namespace

void enqueue_launch(Launch launch, Stream& stream) {
  check_launch(launch.name, launch.size, stream.tp_rank());
  stream.enqueue_kernel(std::make_unique<Grid>(std::move(launch), stream));
}

int resident_blocks(int threads) { return int(kMaxResidentThreads) / threads; }

Grid::Grid(Launch launch, Stream& stream)
    : launch_(std::move(launch)),
      stream_(stream),
      queue_(static_cast<Queue&>(stream.device_queue())),
      shared_(launch_.size.shared_bytes, stream.scheduler().options().poison),
      blocks_(launch_.size.blocks()),
      threads_(launch_.size.threads()) {
  if (kTsan) grids().push_back(this);
  release(this);  // what the host did before the launch happens before the kernel
}

Grid::~Grid() {
  lose_all(launch_);
  std::erase(grids(), this);
  Queue::AsStream as_stream(queue_);
  acquire(&queue_.fibers());  // the kernel happens before what follows in the stream
  for (auto& block : resident_) {
    void* shared = block->shared;
    block->drop();
    shared_.give(shared);
    resident_threads -= threads_;
  }
  if (begun_ > 0) queue_.fibers().recycle();
  resident_.clear();
  ended_.clear();
  launch_.kernel.reset();
}

void Grid::begin_launch(Random& random) {
  Queue::AsStream as_stream(queue_);
  acquire(this);
  offset_ = random.next() % blocks_;
  do {
    stride_ = 1 + random.next() % blocks_;
  } while (std::gcd(stride_, blocks_) != 1);
}

bool Grid::has_room() const {
  if (kTsan && !FiberPool::has_room(threads_)) return false;
  if (resident_.empty()) return true;
  return resident_.size() < kMaxResident && resident_threads + threads_ <= kMaxResidentThreads;
}

void Grid::forget_ended_blocks() {
  if (begun_ == 0 || !resident_.empty()) return;  // the fibers are the stream's head's
  Queue::AsStream as_stream(queue_);
  acquire(&queue_.fibers());
  queue_.fibers().recycle();
}

bool Grid::take_in(std::unique_ptr<Work>& next) {
  auto* grid = dynamic_cast<Grid*>(next.get());
  if (grid == nullptr || !grid->overlaps()) return false;
  Grid* last = this;
  while (last->next_) last = last->next_.get();
  grid->previous_ended_ = &last->complete_;
  (void)next.release();
  last->next_.reset(grid);
  return true;
}

Progress Grid::step(Random& random) {
  if (!next_) return run(random);
  Grid* first = this;
  while (first->complete_) first = first->next_.get();
  // The one behind the first may run beside it, and others as far as those before them let them.
  std::uint32_t choices = 0;
  const auto choose = [&](std::uint32_t pick) {
    choices = 0;
    for (Grid* grid = first; grid != nullptr; grid = grid->next_.get()) {
      if (!grid->complete_ && choices++ == pick) return grid;
      if (grid != first && !grid->complete_ && !grid->lets_next_start_) break;
    }
    return static_cast<Grid*>(nullptr);
  };
  choose(~0u);
  Grid* grid = choose(random.below(choices));
  Progress progress = grid->run(random);
  if (grid != first && progress == Progress::spun) progress = first->run(random);
  if (progress != Progress::done) return progress;
  for (grid = this; grid != nullptr; grid = grid->next_.get()) {
    if (!grid->complete_) return Progress::moved;
  }
  return Progress::done;
}

Progress Grid::run(Random& random) {
  const Overlooked overlooked;
  if (begun_ == 0) begin_launch(random);
  deliver_some(random);
  const auto choices = std::uint32_t(resident_.size() + (begun_ < blocks_ && has_room()));
  if (choices == 0) {  // too many threads to tell apart: TSan forgets who wrote what
    for (Grid* grid : grids()) grid->forget_ended_blocks();
    return Progress::spun;
  }
  const std::size_t pick = random.below(choices);
  if (pick == resident_.size()) begin_block(random);
  const Progress progress = resident_[pick]->run();
  if (progress != Progress::done) return progress;
  end_block(pick);
  complete_ = begun_ == blocks_ && resident_.empty();
  if (complete_) deliver_all(launch_);
  return complete_ ? Progress::done : Progress::moved;
}

void Grid::begin_block(Random& random) {
  Queue::AsStream as_stream(queue_);
  void* shared = shared_.take();
  auto& spare = spare_blocks();
  if (kTsan || spare.empty()) {
    resident_.push_back(std::make_unique<Block>());
  } else {
    resident_.push_back(std::move(spare.back()));
    spare.pop_back();
  }
  resident_threads += threads_;
  const std::uint64_t index = (begun_++ * stride_ + offset_) % blocks_;
  resident_.back()->begin(launch_, index, shared, stream_.scheduler().options().poison,
                          queue_.fibers(), random.next());
  resident_.back()->previous_ended = previous_ended_;
  resident_.back()->lets_next_start = &lets_next_start_;
  stream_.scheduler().count(1, threads_);
}

void Grid::end_block(std::size_t resident) {
  std::unique_ptr<Block> block = std::move(resident_[resident]);
  std::swap(resident_[resident], resident_.back());
  resident_.pop_back();
  resident_threads -= threads_;
  const auto overrun = shared_.check(block->shared);
  shared_.give(block->shared);
  const std::string where = overrun ? block->name() : "";
  (kTsan ? ended_ : spare_blocks()).push_back(std::move(block));
  if (overrun) throw Fault{Outcome::OutOfBounds, where + " " + *overrun, stream_.tp_rank()};
}

std::unique_ptr<Grid> Grid::again() const { return std::make_unique<Grid>(launch_, stream_); }

std::string Grid::describe() const {
  if (goes_on()) return next_->describe();
  if (resident_.empty()) {
    return fmt::format("runs kernel {}: {} of {} blocks begun", launch_.name, begun_, blocks_);
  }
  return fmt::format("runs {} blocks of {}", resident_.size(), resident_[0]->describe());
}

}  // namespace tp::emulator

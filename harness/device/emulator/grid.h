#pragma once
// A launch as a stream runs it: blocks begin in a drawn order, up to a number of them are resident
// at once, and each step runs one of them until its threads wait or yield. Launches that overlap
// are a chain, of which each runs beside the one before it.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "harness/device/emulator/block.h"
#include "harness/device/emulator/launch.h"
#include "harness/device/emulator/queue.h"
#include "harness/device/emulator/shared_memory.h"
#include "harness/device/sanitizer.h"
#include "harness/device/work.h"

namespace tp::emulator {

class Grid final : public Work {
 public:
  Grid(Launch launch, Stream& stream);
  ~Grid() override;

  Progress step(Random& random) override;
  std::string_view name() const override { return goes_on() ? next_->name() : launch_.name; }
  std::string describe() const override;
  bool take_in(std::unique_ptr<Work>& next) override;
  // The same launch, not yet begun.
  std::unique_ptr<Grid> again() const;
  // Whether it may begin before the launch before it has ended, where streams do not stand for
  // threads of TSan's.
  bool overlaps() const { return launch_.overlaps && !kTsan; }

 private:
  bool goes_on() const { return complete_ && next_ != nullptr; }
  Progress run(Random& random);  // this launch alone
  bool has_room() const;
  void forget_ended_blocks();
  void begin_block(Random& random);
  void end_block(std::size_t resident);
  void begin_launch(Random& random);

  Launch launch_;
  Stream& stream_;
  Queue& queue_;
  SharedMemory shared_;
  std::uint64_t blocks_;
  std::uint64_t threads_;  // of a block
  bool complete_ = false;
  bool lets_next_start_ = false;          // while the launch before it still runs
  const bool* previous_ended_ = nullptr;  // of the launch with which this one overlaps
  std::unique_ptr<Grid> next_;            // overlaps with this one
  std::uint64_t begun_ = 0;
  std::uint64_t stride_ = 0;  // the i-th block to begin is (i * stride + offset) % blocks
  std::uint64_t offset_ = 0;
  std::vector<std::unique_ptr<Block>> resident_;
  std::vector<std::unique_ptr<Block>> ended_;  // TSan: kept until the launch is over
};

}  // namespace tp::emulator

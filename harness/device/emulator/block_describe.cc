// How a block says where its threads are.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "harness/device/emulator/block.h"

namespace tp::emulator {
namespace {

std::string index_text(dim3 index, dim3 grid) {
  if (grid.y == 1 && grid.z == 1) return std::to_string(index.x);
  return fmt::format("({}, {}, {})", index.x, index.y, index.z);
}

}  // namespace

std::string Block::name() const {
  return fmt::format("kernel {}, block {}", launch_->name, index_text(block_idx, grid_dim));
}

std::string Block::census(int first, int last) const {
  std::vector<std::pair<std::string, int>> groups;
  const auto add = [&](std::string what) {
    const auto same = [&](const auto& group) { return group.first == what; };
    const auto found = std::find_if(groups.begin(), groups.end(), same);
    found == groups.end() ? void(groups.emplace_back(std::move(what), 1)) : void(++found->second);
  };
  for (int i = first; i < last; ++i) {
    const Thread& thread = threads_[i];
    if (thread.state != State::unstarted) {
      add(fmt::format("at {} ({})", thread.what, to_string(thread.where)));
    }
  }
  for (int i = first; i < last; ++i) {
    if (threads_[i].state != State::unstarted) continue;
    add(warps_[std::size_t(i / 32)].exited >> i % 32 & 1u ? "exited" : "not begun");
  }
  std::string text;
  for (const auto& [what, count] : groups) {
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", count, what);
  }
  return text;
}

std::string Block::describe() const {
  return fmt::format("{}: {}, of {}", name(), census(0, threads()), threads());
}

// Why nothing can go on. A warp's meeting is named first: the barrier waits for its lanes.
std::string Block::divergence() const {
  for (int w = 0; w < int(warps_.size()); ++w) {
    const Warp& warp = warps_[std::size_t(w)];
    if (warp.open == 0) continue;
    const Meeting& meeting = warp.meetings[0];
    const int lanes = std::popcount(meeting.mask);
    const int absent = std::popcount(meeting.mask & ~lanes_of(w));
    std::string text = fmt::format(
        "warp collective divergence in {}, warp {}: {} of {} lanes at {} ({})", name(), w,
        std::popcount(meeting.arrived), lanes, meeting.operation->name, to_string(meeting.where));
    const int exited = std::popcount(meeting.mask & warp.exited);
    if (exited > 0) text += fmt::format(", {} exited", exited);
    if (absent > 0) text += fmt::format(", {} beyond the block's {} threads", absent, threads());
    const int elsewhere = lanes - std::popcount(meeting.arrived) - exited - absent;
    if (elsewhere > 0) {
      text += fmt::format(", {} elsewhere; the warp's threads: {}", elsewhere,
                          census(w * 32, std::min(threads(), w * 32 + 32)));
    }
    return text;
  }
  return "barrier divergence in " + describe();
}

std::string to_string(Where where) {
  const std::string_view file = where.file;
  return fmt::format("{}:{}", file.substr(file.find_last_of('/') + 1), where.line);
}

}  // namespace tp::emulator

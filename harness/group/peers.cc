#include "harness/group/peers.h"

#include <algorithm>

#include "harness/group/peer_memory.h"
#include "harness/group/tp_group.h"

namespace tp {

// The parts of a process's ranks, one after another: in memory of this process, or of all.
std::byte* GroupSession::peer_part(int tp_rank, std::size_t bytes) const {
  for (int p = 0; p < processes_; ++p) {
    const Shard ranks = ranks_of_process(tp_size_, processes_, p);
    if (tp_rank >= ranks.end()) continue;
    std::byte* const all = processes_ == 1 ? peer_buffer_.as<std::byte>() : peer_memory()->of(p);
    return all + std::size_t(tp_rank - ranks.offset) * bytes;
  }
  return nullptr;
}

// Nobody reaches this memory before all ranks are in their first exchange.
void GroupSession::clear_peer_parts(std::size_t bytes) {
  if (processes_ == 1) {
    peer_buffer_ = Buffer("peer memory", bytes, std::uint8_t{0});
  } else {
    device_memory::fill_now({.front = peer_memory()->of(process_), .payload_bytes = bytes});
  }
  peers_are_clear_ = true;
}

std::optional<Peers> TpGroup::peers(const Stream& stream) const {
  GroupSession& s = session_;
  // One kernel at a time is one too few.
  if (s.tp_size_ > kMaxPeers || stream.scheduler().options().serial) return std::nullopt;
  const int ranks_per_device = (s.tp_size_ + s.processes_ - 1) / s.processes_;
  Peers peers{.tp_rank = tp_rank_,
              .tp_size = s.tp_size_,
              .channels = peer_channels(ranks_per_device),
              .ranks_per_device = ranks_per_device};
  if (s.tp_size_ == 1) return peers;
  const std::size_t bytes = peer_bytes(s.tp_size_, peers.channels);
  const std::size_t all = bytes * std::size_t(ranks_per_device);
  if (s.processes_ > 1 && (peer_memory() == nullptr || peer_memory()->bytes() < all))
    return std::nullopt;
  if (!s.peers_are_clear_) s.clear_peer_parts(all);
  for (int r = 0; r < s.tp_size_; ++r)
    peers.slots[r] = reinterpret_cast<PeerWords*>(s.peer_part(r, bytes));
  peers.exchanges = reinterpret_cast<std::uint32_t*>(s.peer_part(tp_rank_, bytes) +
                                                     peer_slot_bytes(s.tp_size_, peers.channels));
  return peers;
}

void TpGroup::peers_launched(Stream& stream) {
  GroupSession& s = session_;
  if (agreed_ || s.local_.size < 2 || !stream.device_queue().runs_ahead()) return;
  const std::size_t index = s.ranks_[std::size_t(tp_rank_ - s.local_.offset)].meetings++;
  if (index == s.meetings_.size()) s.meetings_.emplace_back();
  GroupSession::Meeting& meeting = s.meetings_[index];
  stream.pass(
      [&meeting, ranks = s.local_.size] { meeting.gate.is_open = ++meeting.launched == ranks; });
  stream.wait(meeting.gate);
}

}  // namespace tp

#pragma once
// The collectives of one tensor-parallel group. Kernels' host code sees a TpGroup: one rank's
// handle. A GroupSession is this process's side of a group for the time of one case: it hosts a run
// of consecutive ranks, meets them in memory, and meets the other processes through a Channel.
//
// Sums are folded in tp_rank order, 0 first, one rank's contribution at a time and never as partial
// sums of a process, so the bits do not depend on how many processes there are, nor on what moves
// the data: kernels of one device, NCCL (which then gathers, and a kernel folds), or MPI. Before
// any data move, processes exchange the collective's header, and so they do at the end of a case:
// ranks that disagree on what comes next are a CollectiveMismatch at once, never a hang.

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/base/shape.h"
#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"
#include "harness/device/stream.h"
#include "harness/group/collectives.h"
#include "harness/group/ledger.h"
#include "harness/group/peers.h"
#include "harness/group/world.h"

namespace tp {

class GroupSession;

// One rank's handle. All collectives are asynchronous operations of the rank's stream, like a
// launch.
class TpGroup {
 public:
  int tp_size() const;
  int tp_rank() const { return tp_rank_; }

  // data[0..count): the sum (or maximum) of all ranks' data, on every rank, in place, in device
  // memory. f16 and bf16 are rounded after every addition, as NCCL does at every hop.
  template <typename T>
  void all_reduce_sum(T* data, std::int64_t count, Stream& stream) {
    enter(Collective::all_reduce_sum, data, data, count, dtype_of<T>::value, stream);
  }
  template <typename T>
  void all_reduce_max(T* data, std::int64_t count, Stream& stream) {
    enter(Collective::all_reduce_max, data, data, count, dtype_of<T>::value, stream);
  }
  // mine[0..count): the sum of all ranks' all[tp_rank * count .. (tp_rank+1) * count), which
  // all_reduce_sum would have put there. `all` has tp_size * count elements, and `mine` may be its
  // own place in it.
  template <typename T>
  void reduce_scatter_sum(const T* all, T* mine, std::int64_t count, Stream& stream) {
    enter(Collective::reduce_scatter_sum, all, mine, count, dtype_of<T>::value, stream);
  }
  // all[r * count .. (r+1) * count): what rank r passed as mine[0..count), on every rank.
  template <typename T>
  void all_gather(const T* mine, T* all, std::int64_t count, Stream& stream) {
    enter(Collective::all_gather, mine, all, count, dtype_of<T>::value, stream);
  }
  // data[0..count): rank root's, on every rank. All ranks name the same root. Throws
  // Fault(BadLaunch) where that is no rank of the group.
  template <typename T>
  void broadcast(T* data, std::int64_t count, int root, Stream& stream) {
    enter(Collective::broadcast, data, data, count, dtype_of<T>::value, stream, root);
  }
  // What kernels need to meet those of the other ranks while they run; nothing where they cannot:
  // one kernel runs at a time, there are too many ranks, or processes whose devices do not reach
  // each other's memory. The same answer on all ranks.
  std::optional<Peers> peers(const Stream& stream) const;
  // The kernel that is launched next exchanges `count` elements of T with those of the other ranks,
  // by itself, through peers(). It does not begin before all ranks are here: a rank that comes to
  // something else is a CollectiveMismatch, and no kernel waits for it.
  template <typename T>
  void peer_exchange(std::int64_t count, Stream& stream) {
    if (agreed_) return;
    enter(Collective::peer_exchange, nullptr, nullptr, count, dtype_of<T>::value, stream);
  }
  // After that launch: nothing else is handed to this process's device before all its ranks have
  // launched theirs. CUDA loads a kernel when it is first launched, which may wait for kernels that
  // run, and these wait for each other.
  void peers_launched(Stream& stream);
  // The same rank, after a peer_exchange of all ranks whose kernels may meet without another one:
  // for launches that nothing may interrupt, as a graph of many, of kernels that were launched
  // before. That all ranks launch them is the caller's word.
  TpGroup agreed() const {
    TpGroup other = *this;
    other.agreed_ = true;
    return other;
  }
  void barrier(Stream& stream) {
    enter(Collective::barrier, nullptr, nullptr, 0, DType::f32, stream);
  }

  // The same ranks on another communicator, as engines keep several. All collectives of a rank are
  // one sequence: ranks that are at the same place in it on different communicators disagree.
  TpGroup on(std::int64_t communicator) const {
    TpGroup other = *this;
    other.communicator_ = communicator;
    return other;
  }

 private:
  friend class GroupSession;
  TpGroup(GroupSession& session, int tp_rank) : session_(session), tp_rank_(tp_rank) {}
  void enter(Collective what, const void* in, void* out, std::int64_t count, DType dtype,
             Stream& stream, int root = -1);

  GroupSession& session_;
  int tp_rank_;
  std::int64_t communicator_ = 0;
  bool agreed_ = false;
};

// Ranks [first, first + size) of tp_size live on process `process` of `processes`.
Shard ranks_of_process(int tp_size, int processes, int process);

class GroupSession {
 public:
  using Clock = std::chrono::steady_clock;
  // Every process of the world makes one; those beyond tp_size host no rank.
  GroupSession(World& world, int tp_size, std::optional<Clock::time_point> deadline,
               std::function<void(const std::string&)> trace = {});

  int tp_size() const { return tp_size_; }
  Shard local_ranks() const { return local_; }
  TpGroup group(int tp_rank) { return TpGroup(*this, tp_rank); }
  // The last thing a rank's host code does: says on its stream that the rank enters no more
  // collectives.
  void end_rank(int tp_rank, Stream& stream);

  // For Scheduler::run: moves collectives on. Runs on the process's own stack.
  Idle progress();
  // After Scheduler::run: meets the other processes once more with the end of the case, or with
  // this process's fault. Returns what went wrong in the group, if this process does not know it
  // already.
  std::optional<Fault> finish(const std::optional<Fault>& fault);
  // Whether the processes parted within an exchange, which MPI cannot take back: no further case.
  bool broken() const { return phase_ != Phase::idle; }

 private:
  friend class TpGroup;
  // One rank's entry into one collective.
  struct Entry {
    CollectiveHeader header;
    Collective what = Collective::barrier;
    Volume volume;
    std::int64_t in_count = 0;  // elements that this rank contributes
    DType dtype = DType::f32;
    Stream* stream = nullptr;       // the rank's
    const void* in_data = nullptr;  // device memory
    void* out_data = nullptr;
    // Moved by the device: when `in_data` is there, and when `out_data` is.
    Event ready, done;
    // Staged by the host, or traced.
    std::vector<std::byte> in, out;
    Gate gate;  // opens when `out` is there
  };
  struct LocalRank {
    // Entered, not yet complete, by sequence: streams of one rank may get there in another order.
    std::map<std::int64_t, Entry*> entered;
    std::int64_t issued = 0;   // collectives that its host code has called for
    std::size_t meetings = 0;  // launches of kernels that meet those of other ranks
    bool ended = false;
  };
  // The launches of all local ranks of kernels that meet.
  struct Meeting {
    std::int64_t launched = 0;
    Gate gate{false, "the other ranks' launches", /*for_others=*/true};
  };
  enum class Phase : std::uint8_t { idle, headers, payload };

  // Whether the data of collectives move without the host: inside one process, or through a link.
  bool direct() const;
  bool all_wait() const;
  Entry* at(const LocalRank& rank) const;
  void start_headers(bool fault);
  std::optional<Fault> disagreement() const;
  void start_payload();
  std::vector<std::byte> folded(const Entry& first, const Shard& part) const;
  void complete();
  void step_over();
  void issue();
  std::vector<const void*> through_link(const Entry& first, const std::vector<const void*>& in);
  std::vector<std::int64_t> contributors_of_processes(const Shard& contributors) const;
  std::byte* peer_part(int tp_rank, std::size_t bytes) const;
  void clear_peer_parts(std::size_t bytes);
  std::byte* grown(Buffer& buffer, std::size_t bytes);
  bool poll();
  bool wait_to_the_end();

  int tp_size_;
  Shard local_;
  int processes_, process_;
  Channel channel_;
  std::optional<Clock::time_point> deadline_;
  std::function<void(const std::string&)> trace_;
  LedgerPage& ledger_;

  std::deque<Entry> entries_;  // of this case; addresses are stable
  std::deque<Meeting> meetings_;
  // Where collectives between ranks of this process run: after all of them, before all of them.
  Stream* device_stream_ = nullptr;
  Buffer mine_, all_;   // what goes through a link, and what came
  Buffer peer_buffer_;  // all ranks' peer memory, where they are of one process
  bool peers_are_clear_ = false;
  std::vector<LocalRank> ranks_;
  std::int64_t completed_ = 0;  // collectives that all ranks have behind them
  Phase phase_ = Phase::idle;
  bool over_ = false;  // the processes have parted: no further exchange
  std::optional<Fault> fault_;
};

}  // namespace tp

#include "harness/group/tp_group.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <climits>
#include <cstring>

#include "harness/base/check.h"
#include "harness/base/values_text.h"
#include "harness/device/require.h"
#include "harness/group/agreement.h"
#include "harness/group/combine.h"
#include "harness/group/device_link.h"

namespace tp {

namespace {

Shard overlap(const Shard& a, const Shard& b) {
  const std::int64_t offset = std::max(a.offset, b.offset);
  return {offset, std::max<std::int64_t>(std::min(a.end(), b.end()) - offset, 0)};
}

}  // namespace

int TpGroup::tp_size() const { return session_.tp_size_; }

void TpGroup::enter(Collective what, const void* in, void* out, std::int64_t count, DType dtype,
                    Stream& stream, int root) {
  GroupSession& s = session_;
  require(what != Collective::broadcast || (root >= 0 && root < s.tp_size_), name_of(what),
          "root {} is none of {} ranks", {root, s.tp_size_});
  GroupSession::Entry& e = s.entries_.emplace_back();
  e.header = make_header(++s.ranks_[std::size_t(tp_rank_ - s.local_.offset)].issued, name_of(what),
                         count, what == Collective::barrier ? "" : name_of(dtype));
  e.header.communicator = communicator_;
  e.header.root = root;
  e.what = what;
  e.volume = volume_of(what, count, root, s.tp_size_);
  e.in_count = e.volume.in * overlap(e.volume.contributors, {tp_rank_, 1}).size;
  e.dtype = dtype;
  e.stream = &stream;
  e.in_data = in;
  e.out_data = out;
  e.gate.for_others = e.done.point->gate.for_others = true;
  e.gate.what = e.done.point->gate.what = describe(e.header);
  e.ready.point->gate.what = fmt::format("tp_rank {} in {}", tp_rank_, e.gate.what);
  const auto element = std::size_t(size_of(dtype));
  const auto arrive = [&s, &e, rank = tp_rank_] {
    s.ledger_.enter(rank, e.header);
    s.ranks_[std::size_t(rank - s.local_.offset)].entered.emplace(e.header.sequence, &e);
  };
  const bool staged = !s.direct();
  if (staged || s.trace_) {
    e.in.resize(std::size_t(e.in_count) * element);
    e.out.resize(std::size_t(e.volume.out) * element);
    to_host(stream, e.in.data(), in, e.in.size());
  }
  if (staged) {
    stream.call(arrive);
    stream.wait(e.gate);
    from_host_when_reached(stream, out, e.out.data(), e.out.size());
  } else {
    stream.record(e.ready);
    stream.pass(arrive);
    stream.wait(e.done);
    if (s.trace_) to_host(stream, e.out.data(), out, e.out.size());
  }
  if (s.trace_) {
    stream.call([&s, &e, rank = tp_rank_] {
      s.trace_(fmt::format("tp_rank {:2}  {}  in{}  out{}", rank, describe(e.header),
                           first_values(e.dtype, e.in.data(), e.in_count),
                           first_values(e.dtype, e.out.data(), e.volume.out)));
    });
  }
}

Shard ranks_of_process(int tp_size, int processes, int process) {
  const int used = std::min(tp_size, processes);
  if (process >= used) return {tp_size, 0};
  const std::int64_t first = std::int64_t{process} * tp_size / used;
  return {first, std::int64_t{process + 1} * tp_size / used - first};
}

GroupSession::GroupSession(World& world, int tp_size, std::optional<Clock::time_point> deadline,
                           std::function<void(const std::string&)> trace)
    : tp_size_(tp_size),
      local_(ranks_of_process(tp_size, world.processes(), world.process())),
      processes_(std::min(tp_size, world.processes())),
      process_(world.process()),
      channel_(world, processes_),
      deadline_(deadline),
      trace_(std::move(trace)),
      ledger_(ledger_page(world.process())),
      ranks_(std::size_t(local_.size)) {
  ledger_.begin_case(int(local_.offset), int(local_.size));
}

void GroupSession::end_rank(int tp_rank, Stream& stream) {
  stream.pass([this, tp_rank] { ranks_[std::size_t(tp_rank - local_.offset)].ended = true; });
}

// The entry of this rank into the collective that is next, if it is there.
GroupSession::Entry* GroupSession::at(const LocalRank& rank) const {
  const auto next = rank.entered.find(completed_ + 1);
  return next == rank.entered.end() ? nullptr : next->second;
}

bool GroupSession::direct() const {
  return tp_size_ <= kMaxMembers && (processes_ == 1 || device_link() != nullptr);
}

// Whether every local rank is at the next collective, or at its end.
bool GroupSession::all_wait() const {
  return std::all_of(ranks_.begin(), ranks_.end(),
                     [this](const LocalRank& rank) { return at(rank) || rank.ended; });
}

void GroupSession::start_headers(bool fault) {
  std::vector<CollectiveHeader> headers;
  for (const LocalRank& rank : ranks_) {
    const Entry* entry = at(rank);
    headers.push_back(entry ? entry->header : make_header(completed_ + 1, kEnd, 0, ""));
  }
  const Whereabouts mine = whereabouts_of(headers, int(local_.offset), fault);
  const auto* bytes = reinterpret_cast<const std::byte*>(&mine);
  channel_.start({bytes, bytes + sizeof(mine)},
                 std::vector<int>(std::size_t(processes_), int(sizeof(mine))));
  phase_ = Phase::headers;
}

std::optional<Fault> GroupSession::disagreement() const {
  std::vector<Whereabouts> all(static_cast<std::size_t>(processes_));
  std::memcpy(all.data(), channel_.received().data(), channel_.received().size());
  return tp::disagreement(all, tp_size_);
}

// How many of these ranks each process has.
std::vector<std::int64_t> GroupSession::contributors_of_processes(const Shard& contributors) const {
  std::vector<std::int64_t> ranks;
  for (int p = 0; p < processes_; ++p)
    ranks.push_back(overlap(ranks_of_process(tp_size_, processes_, p), contributors).size);
  return ranks;
}

void GroupSession::start_payload() {
  const Entry& first = *at(ranks_[0]);
  const std::size_t each = std::size_t(first.volume.in) * std::size_t(size_of(first.dtype));
  std::vector<std::byte> mine;
  for (const LocalRank& rank : ranks_)
    mine.insert(mine.end(), at(rank)->in.begin(), at(rank)->in.end());
  std::vector<int> bytes;
  for (const std::int64_t ranks : contributors_of_processes(first.volume.contributors)) {
    const std::size_t size = each * std::size_t(ranks);
    TP_CHECK(size <= std::size_t(INT_MAX), "a collective of more than 2 GiB");
    bytes.push_back(int(size));
  }
  channel_.start(std::move(mine), std::move(bytes));
  phase_ = Phase::payload;
}

// Collectives run one after another on one stream, so each may use what the last one used.
std::byte* GroupSession::grown(Buffer& buffer, std::size_t bytes) {
  if (buffer.bytes() < bytes)
    buffer = Buffer(*device_stream_, "a collective's", bytes, std::uint8_t{0});
  return buffer.as<std::byte>();
}

// The contributions of all processes, in tp_rank order, where the link puts them. `in`: this one's.
std::vector<const void*> GroupSession::through_link(const Entry& first,
                                                    const std::vector<const void*>& in) {
  const auto element = std::size_t(size_of(first.dtype));
  const std::size_t each = std::size_t(first.volume.in) * element;
  const std::vector<std::int64_t> ranks = contributors_of_processes(first.volume.contributors);
  std::vector<std::size_t> bytes;
  std::size_t total = 0;
  for (const std::int64_t n : ranks) {
    // One element at least: everybody waits for everybody, and what follows stays aligned.
    bytes.push_back(std::max(element, each * std::size_t(n)));
    total += bytes.back();
  }
  std::byte* mine = grown(mine_, bytes[std::size_t(process_)]);
  std::byte* all = grown(all_, total);
  if (!in.empty()) gather_ranks(first.dtype, in, {mine}, first.volume.in, *device_stream_);
  device_link()->all_gather(*device_stream_, mine, all, bytes, describe(first.header));
  std::vector<const void*> arrived;
  for (std::size_t p = 0; p < ranks.size(); all += bytes[p++]) {
    for (std::int64_t i = 0; i < ranks[p]; ++i) arrived.push_back(all + std::size_t(i) * each);
  }
  return arrived;
}

// All ranks agree on the next collective: queues it on the device, after all local ranks'
// contributions are ready and before any of them goes on.
void GroupSession::issue() {
  const Entry& first = *at(ranks_[0]);
  if (device_stream_ == nullptr) device_stream_ = &first.stream->scheduler().add_stream(-1);
  Stream& stream = *device_stream_;
  std::vector<const void*> in;
  std::vector<void*> out;
  for (const LocalRank& rank : ranks_) {
    stream.wait(at(rank)->ready);
    if (at(rank)->in_count > 0) in.push_back(at(rank)->in_data);
    out.push_back(at(rank)->out_data);
  }
  const bool moves_itself = first.what == Collective::peer_exchange;
  if (processes_ > 1 && !moves_itself) in = through_link(first, in);
  const std::int64_t count = first.header.count;
  if (count > 0 && !moves_itself) {
    switch (first.what) {
      case Collective::all_reduce_sum:
      case Collective::all_reduce_max:
        fold_ranks(first.what == Collective::all_reduce_sum, first.dtype, in, out, count, stream);
        break;
      case Collective::reduce_scatter_sum:
        sum_parts(first.dtype, in, out, local_.offset, count, stream);
        break;
      case Collective::all_gather:
      case Collective::broadcast:
        gather_ranks(first.dtype, in, out, count, stream);
        break;
      case Collective::peer_exchange:
      case Collective::barrier:
        break;
    }
  }
  for (const LocalRank& rank : ranks_) stream.record(at(rank)->done);
  step_over();
}

// The next collective is behind all local ranks.
void GroupSession::step_over() {
  for (LocalRank& rank : ranks_) rank.entered.erase(completed_ + 1);
  ++completed_;
  phase_ = Phase::idle;
}

// Elements [part.offset, part.end()) of the ranks' contributions, folded on the host.
std::vector<std::byte> GroupSession::folded(const Entry& first, const Shard& part) const {
  const auto element = std::size_t(size_of(first.dtype));
  const std::size_t each = std::size_t(first.volume.in) * element;
  const std::byte* in = channel_.received().data() + std::size_t(part.offset) * element;
  std::vector<std::byte> result(in, in + std::size_t(part.size) * element);
  dispatch(first.dtype, [&]<typename T>(T) {
    T* total = reinterpret_cast<T*>(result.data());
    for (int r = 1; r < tp_size_; ++r) {
      const T* x = reinterpret_cast<const T*>(in + std::size_t(r) * each);
      for (std::int64_t i = 0; i < part.size; ++i)
        total[i] = combine(first.what != Collective::all_reduce_max, total[i], x[i]);
    }
  });
  return result;
}

// All contributions are here, in tp_rank order: computes what the ranks get and opens their gates.
void GroupSession::complete() {
  const Entry& first = *at(ranks_[0]);
  std::vector<std::byte> result;  // every rank's, or the local ranks' parts
  std::size_t step = 0;           // from one rank's to the next one's
  switch (first.what) {
    case Collective::all_reduce_sum:
    case Collective::all_reduce_max:
      result = folded(first, {0, first.header.count});
      break;
    case Collective::reduce_scatter_sum:
      result = folded(first, local_.times(first.header.count));
      step = first.out.size();
      break;
    case Collective::all_gather:
    case Collective::broadcast:
      result = channel_.received();
      break;
    case Collective::peer_exchange:
    case Collective::barrier:
      break;
  }
  const std::byte* from = result.data();
  for (LocalRank& rank : ranks_) {
    Entry& entry = *at(rank);
    std::copy_n(from, entry.out.size(), entry.out.begin());
    from += step;
    entry.gate.is_open = true;
  }
  step_over();
}

// Polls the exchange for a short while: a process that shares its core must let the others run.
bool GroupSession::poll() {
  for (int i = 0; i < 64; ++i) {
    if (channel_.test()) return true;
    sched_yield();
  }
  return false;
}

Idle GroupSession::progress() {
  if (over_) return Idle::stuck;
  if (phase_ == Phase::idle) {
    const bool anyone =
        std::any_of(ranks_.begin(), ranks_.end(), [&](const LocalRank& r) { return at(r); });
    // A rank that is neither in a collective nor at its end is busy, or waits for something else.
    if (!anyone || !all_wait()) return Idle::stuck;
    start_headers(false);
  }
  if (!poll()) return Idle::waiting;
  if (phase_ == Phase::headers) {
    phase_ = Phase::idle;
    if ((fault_ = disagreement())) {
      over_ = true;
      return Idle::stuck;
    }
    if (direct()) return issue(), Idle::moved;
    start_payload();
    if (!poll()) return Idle::waiting;
  }
  complete();
  return Idle::moved;
}

// Waits for the others, who come here at their deadline at the latest, or a little after that.
bool GroupSession::wait_to_the_end() {
  constexpr std::chrono::seconds kLater{1};
  const auto now = Clock::now();
  const auto until = std::max(deadline_.value_or(now), now) + kLater;
  while (!poll()) {
    if (deadline_ && Clock::now() > until) return false;
  }
  return true;
}

std::optional<Fault> GroupSession::finish(const std::optional<Fault>& fault) {
  if (over_ || local_.size == 0) return fault_;
  over_ = true;
  const auto gave_up = [&]() -> std::optional<Fault> {
    if (fault) return std::nullopt;
    return Fault{Outcome::Hang, fmt::format("process {} waits for others in vain", process_), -1,
                 /*of_others=*/true};
  };
  // An exchange that was under way when this process came to its fault is carried through: the
  // others count on it. Then they are told.
  if (phase_ == Phase::headers) {
    if (!wait_to_the_end()) return gave_up();
    phase_ = Phase::idle;
    if ((fault_ = disagreement())) return fault_;
    if (direct()) {
      step_over();  // the others find out below
    } else {
      start_payload();
    }
  }
  if (phase_ == Phase::payload) {
    if (!wait_to_the_end()) return gave_up();
    complete();
  }
  start_headers(fault.has_value());
  if (!wait_to_the_end()) return gave_up();
  phase_ = Phase::idle;
  fault_ = disagreement();
  // That somebody has a fault is news only to those who have none.
  if (fault && fault_ && fault_->outcome == Outcome::Pass) return std::nullopt;
  return fault_;
}

}  // namespace tp

#include "harness/group/tp_group.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <string_view>

#include "harness/base/check.h"
#include "harness/base/values_text.h"
#include "harness/group/combine.h"
#include "harness/group/device_link.h"

namespace tp {

namespace {

constexpr std::string_view kNames[] = {"all_reduce_sum", "all_reduce_max", "all_gather", "barrier"};

}  // namespace

int TpGroup::tp_size() const { return session_.tp_size_; }

void TpGroup::enter(Collective what, const void* in, void* out, std::int64_t count, DType dtype,
                    Stream& stream) {
  GroupSession& s = session_;
  const std::size_t bytes = std::size_t(count) * std::size_t(size_of(dtype));
  const std::string_view name = kNames[std::size_t(what)];
  GroupSession::Entry& e = s.entries_.emplace_back();
  e.header = make_header(++s.ranks_[std::size_t(tp_rank_ - s.local_.offset)].issued, name, count,
                         what == Collective::barrier ? "" : name_of(dtype));
  e.header.communicator = communicator_;
  e.what = what;
  e.dtype = dtype;
  e.stream = &stream;
  e.in_data = in;
  e.out_data = out;
  e.gate.for_others = e.done.point->gate.for_others = true;
  e.gate.what = e.done.point->gate.what = describe(e.header);
  e.ready.point->gate.what = fmt::format("tp_rank {} in {}", tp_rank_, e.gate.what);
  const std::int64_t all_count = what == Collective::all_gather ? count * s.tp_size_ : count;
  const std::size_t all_bytes = std::size_t(all_count) * std::size_t(size_of(dtype));
  const auto arrive = [&s, &e, rank = tp_rank_] {
    s.ledger_.enter(rank, e.header);
    s.ranks_[std::size_t(rank - s.local_.offset)].entered.emplace(e.header.sequence, &e);
  };
  const bool staged = !s.direct();
  if (staged || s.trace_) {
    e.in.resize(bytes);
    e.out.resize(all_bytes);
    to_host(stream, e.in.data(), in, bytes);
  }
  if (staged) {
    stream.call(arrive);
    stream.wait(e.gate);
    from_host_when_reached(stream, out, e.out.data(), all_bytes);
  } else {
    stream.record(e.ready);
    stream.pass(arrive);
    stream.wait(e.done);
    if (s.trace_) to_host(stream, e.out.data(), out, all_bytes);
  }
  if (s.trace_) {
    stream.call([&s, &e, rank = tp_rank_, count, all_count] {
      s.trace_(fmt::format("tp_rank {:2}  {}  in{}  out{}", rank, describe(e.header),
                           first_values(e.dtype, e.in.data(), count),
                           first_values(e.dtype, e.out.data(), all_count)));
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

// Where most of the local ranks are, and the first one that is not there.
GroupSession::Message GroupSession::local_message() const {
  const auto place_of = [&](std::size_t r) {
    const Entry* entry = at(ranks_[r]);
    return entry ? entry->header : make_header(completed_ + 1, kEnd, 0, "");
  };
  Message m;
  for (std::size_t r = 0; r < ranks_.size() && 2 * std::size_t(m.ranks) < ranks_.size(); ++r) {
    const CollectiveHeader header = place_of(r);
    int ranks = 0;
    for (std::size_t other = 0; other < ranks_.size(); ++other) ranks += place_of(other) == header;
    if (ranks <= m.ranks) continue;
    m.header = header;
    m.ranks = ranks;
    m.first_rank = int(local_.offset) + int(r);
  }
  for (std::size_t r = 0; r < ranks_.size() && m.other_rank < 0; ++r) {
    if (place_of(r) == m.header) continue;
    m.other_rank = int(local_.offset) + int(r);
    m.other_header = place_of(r);
  }
  return m;
}

void GroupSession::start_headers(const Message& mine) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&mine);
  channel_.start({bytes, bytes + sizeof(Message)},
                 std::vector<int>(std::size_t(processes_), int(sizeof(Message))));
  phase_ = Phase::headers;
}

// Ranks that do not agree, as a fault; the same text on every process.
std::optional<Fault> GroupSession::disagreement() const {
  std::vector<Message> messages(static_cast<std::size_t>(processes_));
  std::memcpy(messages.data(), channel_.received().data(), channel_.received().size());
  for (std::size_t p = 0; p < messages.size(); ++p) {
    // Only that there is one: its own process says which.
    if (messages[p].fault)
      return Fault{Outcome::Pass, fmt::format("process {} reports a fault", p), -1};
  }
  // The majority is right, as far as anybody can tell from here.
  const Message* right = &messages[0];
  int with_right = 0;
  for (const Message& candidate : messages) {
    int ranks = 0;
    for (const Message& m : messages) ranks += m.header == candidate.header ? m.ranks : 0;
    if (ranks <= with_right) continue;
    right = &candidate;
    with_right = ranks;
  }
  const std::string others =
      2 * with_right > tp_size_ ? "most others" : fmt::format("tp_rank {}", right->first_rank);
  for (const Message& m : messages) {
    const bool at_right = m.header == right->header;
    if (at_right && m.other_rank < 0) continue;
    return Fault{
        Outcome::CollectiveMismatch,
        fmt::format("tp_rank {} is at {}, {} at {}", at_right ? m.other_rank : m.first_rank,
                    describe(at_right ? m.other_header : m.header), others,
                    describe(right->header)),
        -1};
  }
  return std::nullopt;
}

void GroupSession::start_payload() {
  std::vector<std::byte> mine;
  std::vector<int> bytes;
  const std::size_t each = at(ranks_[0])->in.size();
  for (const LocalRank& rank : ranks_) {
    mine.insert(mine.end(), at(rank)->in.begin(), at(rank)->in.end());
  }
  for (int p = 0; p < processes_; ++p) {
    const std::size_t size = each * std::size_t(ranks_of_process(tp_size_, processes_, p).size);
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
    in.push_back(at(rank)->in_data);
    out.push_back(at(rank)->out_data);
  }
  const bool barrier = first.what == Collective::barrier;
  const std::int64_t count = first.header.count;
  const std::size_t each = std::size_t(count) * std::size_t(size_of(first.dtype));
  if (processes_ > 1) {
    std::vector<std::size_t> bytes;
    for (int p = 0; p < processes_; ++p) {
      bytes.push_back(std::max<std::size_t>(
          1, each * std::size_t(ranks_of_process(tp_size_, processes_, p).size)));
    }
    std::byte* mine = grown(mine_, bytes[std::size_t(process_)]);
    std::byte* all = grown(all_, std::max(each * std::size_t(tp_size_), std::size_t(processes_)));
    if (count > 0) gather_ranks(first.dtype, in, {mine}, count, stream);
    device_link()->all_gather(stream, mine, all, bytes, describe(first.header));
    in.clear();
    for (int r = 0; r < tp_size_; ++r) in.push_back(all + std::size_t(r) * each);
  }
  if (count > 0 && first.what == Collective::all_gather) {
    gather_ranks(first.dtype, in, out, count, stream);
  } else if (count > 0 && !barrier) {
    fold_ranks(first.what, first.dtype, in, out, count, stream);
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

// All contributions are here, in tp_rank order: computes the result once and opens the ranks'
// gates.
void GroupSession::complete() {
  const Entry& first = *at(ranks_[0]);
  const std::vector<std::byte>& received = channel_.received();
  std::vector<std::byte> result;
  if (first.what == Collective::all_gather) {
    result = received;
  } else if (first.what != Collective::barrier) {
    const std::size_t each = first.in.size();
    result.assign(received.begin(), received.begin() + std::ptrdiff_t(each));
    dispatch(first.dtype, [&]<typename T>(T) {
      T* total = reinterpret_cast<T*>(result.data());
      for (int r = 1; r < tp_size_; ++r) {
        const T* x = reinterpret_cast<const T*>(received.data() + std::size_t(r) * each);
        for (std::int64_t i = 0; i < first.header.count; ++i)
          total[i] = combine(first.what == Collective::all_reduce_sum, total[i], x[i]);
      }
    });
  }
  for (LocalRank& rank : ranks_) {
    Entry& entry = *at(rank);
    entry.out = result;
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
    start_headers(local_message());
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
  Message m = local_message();
  m.fault = fault.has_value();
  start_headers(m);
  if (!wait_to_the_end()) return gave_up();
  phase_ = Phase::idle;
  fault_ = disagreement();
  // That somebody has a fault is news only to those who have none.
  if (fault && fault_ && fault_->outcome == Outcome::Pass) return std::nullopt;
  return fault_;
}

}  // namespace tp

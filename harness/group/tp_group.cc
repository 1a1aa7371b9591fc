#include "harness/group/tp_group.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#include "harness/base/check.h"
#include "harness/device/buffer.h"

namespace tp {

namespace {

constexpr std::string_view kNames[] = {"all_reduce_sum", "all_reduce_max", "all_gather", "barrier"};

// acc[i] op= x[i], rounded to T each time.
template <typename T>
void fold(Collective what, T* acc, const T* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float a = to_float(acc[i]), b = to_float(x[i]);
    // A maximum must not lose a NaN, as fmaxf would.
    acc[i] = from_float<T>(what == Collective::all_reduce_sum ? a + b
                           : (a > b || std::isnan(a))         ? a
                                                              : b);
  }
}

std::string values_of(DType t, const std::vector<std::byte>& data) {
  const std::int64_t count = std::int64_t(data.size()) / size_of(t);
  std::string text;
  for (std::int64_t i = 0; i < std::min<std::int64_t>(count, 8); ++i) {
    text += fmt::format(" {:.6g}", load(t, data.data(), i));
  }
  return text + (count > 8 ? " ..." : "");
}

}  // namespace

int TpGroup::tp_size() const { return session_.tp_size_; }

void TpGroup::enter(Collective what, const void* in, void* out, std::int64_t count, DType dtype,
                    Stream& stream) {
  GroupSession& s = session_;
  const std::size_t bytes = std::size_t(count) * std::size_t(size_of(dtype));
  const std::string_view name = kNames[std::size_t(what)];
  GroupSession::Entry& e = s.entries_.emplace_back();
  e.header =
      make_header(++sequence_, name, count, what == Collective::barrier ? "" : name_of(dtype));
  e.what = what;
  e.dtype = dtype;
  e.gate.what = describe(e.header);
  e.in.resize(bytes);
  e.out.resize(what == Collective::all_gather ? bytes * std::size_t(s.tp_size_) : bytes);
  if (bytes > 0) to_host(stream, e.in.data(), in, bytes);
  stream.call([&s, &e, rank = tp_rank_] {
    s.ledger_.enter(rank, e.header);
    s.arrived_[std::size_t(rank - s.local_.offset)].push_back(&e);
  });
  stream.wait(e.gate);
  if (bytes > 0) from_host_when_reached(stream, out, e.out.data(), e.out.size());
  if (s.trace_) {
    stream.call([&s, &e, rank = tp_rank_] {
      s.trace_(fmt::format("tp_rank {:2}  {}  in{}  out{}", rank, describe(e.header),
                           values_of(e.dtype, e.in), values_of(e.dtype, e.out)));
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
      arrived_(std::size_t(local_.size)),
      messages_(std::size_t(processes_)) {
  ledger_.begin_case(int(local_.offset), int(local_.size));
}

// What the local ranks agree on, or the first one that does not.
GroupSession::Message GroupSession::local_message() const {
  Message m;
  bool any = false;
  for (std::size_t r = 0; r < arrived_.size(); ++r) {
    // A rank without an entry has ended its case: this is only called when nothing else can run.
    const std::int64_t last = ledger_.ranks[r].entered;
    const CollectiveHeader h =
        arrived_[r].empty() ? make_header(last + 1, kEnd, 0, "") : arrived_[r].front()->header;
    if (!any) m.header = h;
    any = true;
    if (h != m.header && m.bad_rank < 0) {
      m.bad_rank = int(local_.offset) + int(r);
      m.bad_header = h;
    }
  }
  return m;
}

void GroupSession::start_headers(const Message& mine) {
  mine_ = mine;
  channel_.start(&mine_, messages_.data(),
                 std::vector<int>(std::size_t(processes_), int(sizeof(Message))));
  phase_ = Phase::headers;
}

// Ranks that do not agree, as a fault; the same text on every process.
std::optional<Fault> GroupSession::disagreement() const {
  const auto first_rank = [&](std::size_t p) {
    return int(ranks_of_process(tp_size_, processes_, int(p)).offset);
  };
  for (std::size_t p = 0; p < messages_.size(); ++p) {
    if (messages_[p].fault)
      return Fault{Outcome::Pass, fmt::format("process {} reports a fault", p), first_rank(p)};
  }
  const auto mismatch = [&](int a, const CollectiveHeader& ha, int b, const CollectiveHeader& hb) {
    return Fault{
        Outcome::CollectiveMismatch,
        fmt::format("tp_rank {} is at {}, tp_rank {} at {}", a, describe(ha), b, describe(hb)), b};
  };
  for (std::size_t p = 0; p < messages_.size(); ++p) {
    const Message& m = messages_[p];
    if (m.bad_rank >= 0) return mismatch(first_rank(p), m.header, m.bad_rank, m.bad_header);
    if (m.header != messages_[0].header)
      return mismatch(0, messages_[0].header, first_rank(p), m.header);
  }
  return std::nullopt;
}

void GroupSession::start_payload() {
  sent_.clear();
  std::vector<int> bytes;
  const std::size_t each = arrived_[0].front()->in.size();
  for (const auto& rank : arrived_)
    sent_.insert(sent_.end(), rank.front()->in.begin(), rank.front()->in.end());
  for (int p = 0; p < processes_; ++p) {
    bytes.push_back(int(std::int64_t(each) * ranks_of_process(tp_size_, processes_, p).size));
  }
  received_.resize(each * std::size_t(tp_size_));
  channel_.start(sent_.data(), received_.data(), bytes);
  phase_ = Phase::payload;
}

// All contributions are here, in tp_rank order: computes the result once and opens the ranks'
// gates.
void GroupSession::complete() {
  const Entry& first = *arrived_[0].front();
  std::vector<std::byte> result;
  if (first.what == Collective::all_gather) {
    result = received_;
  } else if (first.what != Collective::barrier) {
    const std::size_t each = first.in.size();
    result.assign(received_.begin(), received_.begin() + std::ptrdiff_t(each));
    dispatch(first.dtype, [&]<typename T>(T) {
      for (int r = 1; r < tp_size_; ++r) {
        fold(first.what, reinterpret_cast<T*>(result.data()),
             reinterpret_cast<const T*>(received_.data() + std::size_t(r) * each),
             first.header.count);
      }
    });
  }
  for (auto& rank : arrived_) {
    rank.front()->out = result;
    rank.front()->gate.is_open = true;
    rank.pop_front();
  }
  phase_ = Phase::idle;
}

// Polls the exchange for a short while: a process that shares its core must let the others run.
bool GroupSession::wait_for_others() {
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
        std::any_of(arrived_.begin(), arrived_.end(), [](const auto& q) { return !q.empty(); });
    if (!anyone) return Idle::stuck;  // the ranks wait for something that is no collective
    start_headers(local_message());
  }
  if (!wait_for_others()) return Idle::waiting;
  if (phase_ == Phase::headers) {
    phase_ = Phase::idle;
    if ((fault_ = disagreement())) {
      over_ = true;
      return Idle::stuck;
    }
    start_payload();
    if (!wait_for_others()) return Idle::waiting;
  }
  complete();
  return Idle::moved;
}

std::optional<Fault> GroupSession::finish(const std::optional<Fault>& fault) {
  if (over_ || local_.size == 0) return fault_;
  // A process that gave up waiting has an exchange in flight that nobody can call back.
  const auto drain = [&] {
    const auto patience = Clock::now() + std::chrono::seconds(2);
    while (!wait_for_others()) {
      if (deadline_ && Clock::now() > std::max(*deadline_, patience)) return false;
    }
    return true;
  };
  over_ = true;
  if (phase_ == Phase::payload)
    return fault_;  // the others are there, too: they complete without us
  if (phase_ == Phase::idle) {
    Message m = local_message();
    m.fault = fault.has_value();
    start_headers(m);
  }
  if (!drain())
    return Fault{Outcome::Hang, fmt::format("process {} waits for others in vain", process_),
                 int(local_.offset)};
  phase_ = Phase::idle;
  fault_ = disagreement();
  // That somebody has a fault is news only to those who have none.
  if (fault && fault_ && fault_->outcome == Outcome::Pass) return std::nullopt;
  return fault_;
}

}  // namespace tp

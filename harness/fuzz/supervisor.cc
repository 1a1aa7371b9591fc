#include "harness/fuzz/supervisor.h"

#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/text.h"
#include "harness/fuzz/deadlines.h"
#include "harness/fuzz/interrupt.h"

namespace tp {

namespace {

// What a worker gets beyond a case's deadline to notice and report the hang itself.
constexpr auto kGrace = std::chrono::seconds(2);
constexpr auto kDyingTime = std::chrono::seconds(3);
constexpr int kStartAttempts = 3;

// How long a worker may take to say that it is ready. TPCHECK_START_LIMIT says it in seconds: for
// tests, which have no minutes to wait, and for machines that need more.
std::chrono::milliseconds start_limit() {
  const char* said = std::getenv("TPCHECK_START_LIMIT");
  if (!said) return std::chrono::seconds(60);
  char* end = nullptr;
  const double seconds = std::strtod(said, &end);
  if (end == said || *end != 0 || !(seconds > 0 && seconds < 1e6))
    throw BadInput(fmt::format("TPCHECK_START_LIMIT={}: not a number of seconds", said));
  return milliseconds_of(seconds);
}

}  // namespace

Supervisor::Supervisor(int jobs, int processes, Executor executor)
    : processes_(processes), executor_(std::move(executor)), start_limit_(start_limit()) {
  if (processes < 1) throw BadInput(fmt::format("a job of {} processes", processes));
  if (jobs < 1) throw BadInput(fmt::format("{} jobs", jobs));
  check_launcher(processes);
  catch_interrupts();
  slots_.resize(std::size_t(jobs));
  for (Slot& slot : slots_) start(slot);
}

void Supervisor::wait_until_ready() {
  while (!place_) {
    if (gave_up_) throw *gave_up_;
    poll_once({this});
  }
}

std::string Supervisor::where() const {
  char host[256] = "this machine";
  gethostname(host, sizeof(host) - 1);
  return fmt::format("{}, {} job{} of {} process{} on {}",
                     place_phrase(executor_.name, place_.value_or(executor_.name)), slots_.size(),
                     slots_.size() == 1 ? "" : "s", processes_, processes_ == 1 ? "" : "es", host);
}

bool Supervisor::has_room() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return !s.current; });
}

void Supervisor::start(Slot& slot) {
  slot.ready = slot.retires = false;
  slot.job.reset();
  slot.job = std::make_unique<Job>(executor_, processes_);
  slot.give_up = Clock::now() + start_limit_;
}

// In the middle of it all: what was answered until now is not to be lost.
void Supervisor::start_again(Slot& slot) {
  if (gave_up_) return;
  try {
    start(slot);
  } catch (const GaveUp& e) {
    give_up(e);
  } catch (const Unavailable& e) {
    give_up(GaveUp(e.what(), kExitUnavailable));
  }
}

void Supervisor::give_up(const GaveUp& why) {
  if (!gave_up_) gave_up_ = why;
}

void Supervisor::submit(Request request) {
  Slot* free = nullptr;
  for (Slot& slot : slots_) {
    if (!slot.current && (!free || (slot.ready && !free->ready))) free = &slot;
  }
  TP_CHECK(free, "no job is free");
  free->current.emplace().request = std::move(request);
  if (free->ready) send(*free);
}

void Supervisor::send(Slot& slot) {
  const Request& request = slot.current->request;
  slot.give_up = Clock::now() + request.deadline + kGrace;
  slot.job->send(to_line(request));
}

Answer Supervisor::wait() {
  for (;;) {
    if (std::optional<Answer> answer = take()) return std::move(*answer);
    poll_once({this});
  }
}

std::optional<Answer> Supervisor::take() {
  if (answers_.empty()) {
    if (gave_up_) throw *gave_up_;
    return std::nullopt;
  }
  Answer answer = std::move(answers_.front());
  answers_.pop_front();
  return answer;
}

void Supervisor::poll_once(std::initializer_list<Supervisor*> all) {
  throw_if_interrupted();
  std::vector<pollfd> fds = {{interrupt_fd(), POLLIN, 0}};
  auto wake = Clock::now() + std::chrono::seconds(10);
  bool any = false;
  for (const Supervisor* s : all) {
    for (const Slot& slot : s->slots_) {
      fds.push_back({slot.job->out.fd(), POLLIN, 0});
      fds.push_back({slot.job->errors_fd(), POLLIN, 0});
      if (slot.current || !slot.ready) {
        wake = std::min(wake, slot.give_up);
        any = true;
      }
    }
  }
  TP_CHECK(any, "waiting for nothing");
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(wake - Clock::now()).count();
  poll(fds.data(), nfds_t(fds.size()), int(std::max<std::int64_t>(left, 0)));
  throw_if_interrupted();
  auto fd = fds.begin() + 1;
  for (Supervisor* s : all) {
    for (Slot& slot : s->slots_) {
      const bool said = (fd++)->revents != 0, erred = (fd++)->revents != 0;
      if (erred) slot.job->read_errors();
      if (said) s->read(slot);
      const bool waits = (slot.current || !slot.ready) && !s->gave_up_;
      if (waits && Clock::now() >= slot.give_up) s->late(slot);
    }
  }
}

void Supervisor::late(Slot& slot) {
  died(slot, Outcome::Hang,
       slot.ready ? fmt::format("no answer within {:.1f} s",
                                double(slot.current->request.deadline.count()) / 1e3)
                  : "did not start");
}

void Supervisor::read(Slot& slot) {
  std::vector<std::string> lines;
  const bool open = slot.job->out.read_into(lines);
  for (const std::string& line : lines) handle(slot, line);
  if (slot.retires && !slot.current) {
    start_again(slot);
  } else if (!open) {
    died(slot, Outcome::Crash, "");
  }
}

void Supervisor::handle(Slot& slot, const std::string& line) {
  const auto rest = [&](std::string_view prefix) { return line.substr(prefix.size()); };
  if (line.starts_with(kReady) && !slot.ready) {
    ready(slot, rest(kReady));
  } else if (line.starts_with(kCannot) && !slot.ready) {
    give_up(GaveUp(rest(kCannot), kExitUnavailable));
  } else if (line.starts_with(kTrace) && slot.current) {
    slot.current->trace.push_back(rest(kTrace));
  } else if (line == kRetires) {
    slot.retires = true;
  } else if (line.starts_with(kVerdict) && slot.current && slot.ready) {
    try {
      slot.current->verdict = verdict_from_line(rest(kVerdict));
    } catch (const BadInput& e) {
      // Whoever overwrote that has overwritten more.
      slot.current->verdict = {.outcome = Outcome::Crash, .detail = e.what()};
      slot.retires = true;
    }
    answers_.push_back(std::move(*slot.current));
    slot.current.reset();
    slot.failed_starts = 0;
  } else {
    fmt::print(stderr, "worker: {}\n", line);
  }
}

// `greeting`: what follows kReady.
void Supervisor::ready(Slot& slot, const std::string& greeting) {
  const std::string number = fmt::format("{} ", kProtocol);
  if (!greeting.starts_with(number)) {
    give_up(GaveUp(fmt::format("{} is a tpcheck of another version: build it anew ({})",
                               executor_.binary.string(), build_command(executor_.name)),
                   kExitUnavailable));
    return;
  }
  const std::size_t end = greeting.find(' ', number.size());
  const std::string executor = greeting.substr(number.size(), end - number.size());
  if (executor != executor_.name) {
    give_up(GaveUp(fmt::format("{} is a tpcheck of the {}, and not of the {} as it should be",
                               executor_.binary.string(), printable(executor), executor_.name),
                   kExitUnavailable));
    return;
  }
  if (!place_) place_ = end == std::string::npos ? "" : greeting.substr(end + 1);
  slot.ready = true;
  if (slot.current) send(slot);
}

// The job is dead, or is to be: blames the case in flight, if there is one, and starts a new job.
void Supervisor::died(Slot& slot, Outcome outcome, const std::string& how) {
  // mpirun takes a moment to notice a dead rank and to end the others; what it then returns says
  // how.
  const std::string status =
      slot.job->end(outcome == Outcome::Crash ? kDyingTime : std::chrono::seconds(0));
  const std::string cause = how.empty() ? status : how;
  const std::string words = slot.job->last_words();
  const std::string detail = words.empty() ? cause : fmt::format("{}; {}", cause, words);
  if (slot.ready && slot.current) {
    slot.current->verdict = {.outcome = outcome, .detail = detail};
    slot.current->log = slot.job->last_errors();
    answers_.push_back(std::move(*slot.current));
    slot.current.reset();
    slot.failed_starts = 0;
  } else if (++slot.failed_starts >= kStartAttempts) {
    give_up(GaveUp(fmt::format(
        "a worker job of {} process{} ({}) died {} times before it ran a "
        "case: {}",
        processes_, processes_ == 1 ? "" : "es", executor_.name, kStartAttempts, detail)));
  }
  start_again(slot);
}

Supervisor& Supervisor::alone() {
  if (!alone_) alone_ = std::make_unique<Supervisor>(2, 1, executor_);
  return *alone_;
}

}  // namespace tp

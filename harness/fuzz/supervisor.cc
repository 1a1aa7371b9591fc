#include "harness/fuzz/supervisor.h"

#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "harness/base/check.h"
#include "harness/fuzz/interrupt.h"

namespace tp {

namespace {

constexpr auto kStartLimit = std::chrono::seconds(60);
// What a worker gets beyond a case's deadline to notice and report the hang itself.
constexpr auto kGrace = std::chrono::seconds(1);
constexpr auto kDyingTime = std::chrono::seconds(3);
constexpr int kStartAttempts = 3;

}  // namespace

int default_processes() { return std::clamp(int(std::thread::hardware_concurrency()), 1, 4); }
int default_jobs(int processes) {
  return std::max(1, int(std::thread::hardware_concurrency()) / processes);
}

Supervisor::Supervisor(int jobs, int processes) : processes_(processes) {
  if (processes < 1) throw BadInput(fmt::format("a job of {} processes", processes));
  if (jobs < 1) throw BadInput(fmt::format("{} jobs", jobs));
  check_launcher(processes);
  catch_interrupts();
  slots_.resize(std::size_t(jobs));
  for (Slot& slot : slots_) start(slot);
}

std::string Supervisor::where() const {
  char host[256] = "this machine";
  gethostname(host, sizeof(host) - 1);
  return fmt::format("{} job{} of {} process{} on {}", slots_.size(), slots_.size() == 1 ? "" : "s",
                     processes_, processes_ == 1 ? "" : "es", host);
}

bool Supervisor::has_room() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return !s.current; });
}

void Supervisor::start(Slot& slot) {
  slot.job.reset();
  slot.job = std::make_unique<Job>(processes_);
  slot.ready = slot.retires = false;
  slot.give_up = Clock::now() + kStartLimit;
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
  while (answers_.empty()) poll_once();
  Answer answer = std::move(answers_.front());
  answers_.pop_front();
  return answer;
}

void Supervisor::poll_once() {
  throw_if_interrupted();
  std::vector<pollfd> fds = {{interrupt_fd(), POLLIN, 0}};
  auto wake = Clock::now() + std::chrono::seconds(10);
  bool any = false;
  for (const Slot& slot : slots_) {
    fds.push_back({slot.job->out.fd(), POLLIN, 0});
    fds.push_back({slot.job->errors_fd(), POLLIN, 0});
    if (slot.current || !slot.ready) wake = std::min(wake, slot.give_up);
    any |= slot.current.has_value();
  }
  TP_CHECK(any, "waiting for nothing");
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(wake - Clock::now()).count();
  poll(fds.data(), nfds_t(fds.size()), int(std::max<std::int64_t>(left, 0)));
  throw_if_interrupted();
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (fds[2 + 2 * i].revents) slot.job->read_errors();
    if (fds[1 + 2 * i].revents) read(slot);
    if ((slot.current || !slot.ready) && Clock::now() >= slot.give_up) {
      const bool running = slot.ready;
      died(slot, Outcome::Hang,
           running ? fmt::format("no answer within {:.1f} s",
                                 double(slot.current->request.deadline.count()) / 1e3)
                   : "did not start");
    }
  }
}

void Supervisor::read(Slot& slot) {
  std::vector<std::string> lines;
  const bool open = slot.job->out.read_into(lines);
  for (const std::string& line : lines) handle(slot, line);
  if (slot.retires && !slot.current) {
    start(slot);
  } else if (!open) {
    died(slot, Outcome::Crash, "");
  }
}

void Supervisor::handle(Slot& slot, const std::string& line) {
  const auto rest = [&](std::string_view prefix) { return line.substr(prefix.size()); };
  if (line.starts_with(kReady) && !slot.ready) {
    slot.ready = true;
    if (slot.current) send(slot);
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
    throw GaveUp(fmt::format("a worker job of {} process{} died {} times before it ran a case: {}",
                             processes_, processes_ == 1 ? "" : "es", kStartAttempts, detail));
  }
  start(slot);
}

Runner& Supervisor::alone() {
  if (!alone_) alone_ = std::make_unique<Supervisor>(2, 1);
  return *alone_;
}

}  // namespace tp

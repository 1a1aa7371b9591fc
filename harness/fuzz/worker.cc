#include "harness/fuzz/worker.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <iostream>
#include <new>
#include <optional>
#include <sstream>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/operator.h"
#include "harness/base/user_adapter.h"
#include "harness/base/user_checkpoint.h"
#include "harness/fuzz/fatal_signals.h"
#include "harness/fuzz/protocol.h"
#include "harness/group/ledger.h"
#include "harness/group/world.h"

namespace tp {

namespace {

// What process 0 broadcasts when there is nothing more to run.
constexpr std::string_view kNoMore = "no more requests";

LedgerPage* ledger = nullptr;

// Leaves the signal's number in the ledger before it kills.
void note_signal(int signal) { ledger->running.signal = signal; }

// Standard output is the supervisor's alone. What the code under test prints there, without a
// newline perhaps, must not run into a verdict: it goes to standard error, on every process.
// Returns the descriptor for what we have to say ourselves.
int take_standard_output() {
  const int fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
  TP_CHECK(fd >= 0 && dup2(STDERR_FILENO, STDOUT_FILENO) >= 0, "no standard output");
  return fd;
}

void write_line(int fd, const std::string& line) {
  for (std::size_t at = 0; at < line.size();) {
    const ssize_t n = write(fd, line.data() + at, line.size() - at);
    if (n < 0 && errno != EINTR) return;  // the supervisor is gone, and so will we be
    if (n > 0) at += std::size_t(n);
  }
}

const Mutant* mutant_of(const Operator& op, const std::string& id) {
  if (id.empty()) return nullptr;
  for (const FoundMutant& found : find_mutant(id)) {
    if (found.op == &op) return found.mutant;
  }
  throw BadInput(fmt::format("{} has no mutant '{}'", op.name, id));
}

Verdict run_case(World& world, const Request& request, const Case& c, const RunOptions& options) {
  const Operator& op = find_operator(c.op);
  try {
    return op.run(world, c, options);
  } catch (const BadInput& e) {
    return {.outcome = Outcome::Refused, .detail = e.what()};
  } catch (const Unavailable& e) {
    return {.outcome = Outcome::Skipped, .detail = e.what()};
  } catch (const std::exception& e) {
    // Thrown on one process it leaves the others in the middle of a collective: nothing but the end
    // of the job is sure to reach them.
    fmt::print(stderr, "an exception escaped from '{}': {}\n", request.line, e.what());
    if (world.processes() > 1) world.abort(1);
    const bool memory = dynamic_cast<const std::bad_alloc*>(&e) != nullptr;
    return {.outcome = memory ? Outcome::OutOfMemory : Outcome::Crash,
            .detail = fmt::format("an exception escaped: {}", e.what())};
  }
}

// Opens the user's checkpoint and adapter; what is against it. The supervisor has opened the same,
// so that it is this machine that cannot.
std::string why_not_open(const UserFiles& files) {
  try {
    set_user_checkpoint(files.checkpoint);
    user_checkpoint();
    set_user_adapter(files.adapter, files.base);
    user_adapter();
    return "";
  } catch (const BadInput& e) {
    return e.what();
  }
}

// Runs one request; every process of the world passes the same text.
Verdict run_request(World& world, const std::string& text, const TraceLine& trace) {
  const auto start = std::chrono::steady_clock::now();
  std::optional<Request> request;
  std::optional<Case> c;
  RunOptions options;
  try {
    request = request_from_line(text);
    c = case_from_line(request->line);
    options.mutant = mutant_of(find_operator(c->op), request->mutant);
  } catch (const BadInput& e) {
    return {.outcome = Outcome::Refused, .detail = e.what()};
  }
  set_in_flight(request->line);
  options.deadline = request->deadline;
  options.poison = request->poison;
  options.serial = request->serial;
  if (request->trace) {
    options.trace = [&](const std::string& lines) {
      std::istringstream in(lines);
      for (std::string line; std::getline(in, line);) trace(line);
    };
  }
  Verdict verdict = run_case(world, *request, *c, options);
  // One process may have been through with the exchange that another gave up: they retire together.
  if (verdict.finding() && world.max(world.retired()) != 0) world.retire();
  verdict.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return verdict;
}

}  // namespace

Verdict run_everywhere(World& world, const Request& request, const TraceLine& trace) {
  return run_request(world, world.broadcast(to_line(request)), trace);
}

void end_everywhere(World& world) { world.broadcast(std::string(kNoMore)); }

void serve(World& world) {
  for (;;) {
    const std::string message = world.broadcast("");
    if (message == kNoMore) return;
    run_request(world, message, [](const std::string&) {});
  }
}

int worker_main(World& world, Link link, const UserFiles& files) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // a worker stuck in a loop never sees the end of its input
  // What a case gave back the next one takes: the system neither gets it nor clears it in between.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
  ledger = &ledger_page(world.process());
  on_fatal_signal(note_signal);
  const int answers = take_standard_output();
  const auto say = [&](std::string_view kind, const std::string& text) {
    if (world.is_root()) write_line(answers, fmt::format("{}{}\n", kind, text));
  };
  try {
    const std::string place = take_place(world, link);
    world.agree(why_not_open(files));
    say(kReady, fmt::format("{} {} {}", kProtocol, executor_name(), place));
  } catch (const Unavailable& e) {
    say(kCannot, e.what());
    return kExitUnavailable;
  }
  if (!world.is_root()) {
    serve(world);
    return 0;
  }
  for (std::string line; std::getline(std::cin, line);) {
    Verdict verdict;
    try {
      const Request request = request_from_line(line);
      verdict = run_everywhere(world, request, [&](const std::string& text) { say(kTrace, text); });
    } catch (const BadInput& e) {
      verdict = {.outcome = Outcome::Refused, .detail = e.what()};
    }
    if (world.retired()) say(kRetires, "");
    say(kVerdict, to_line(verdict));
    if (world.retired()) break;
  }
  end_everywhere(world);
  return 0;
}

}  // namespace tp

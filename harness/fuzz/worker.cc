#include "harness/fuzz/worker.h"

#include <fmt/format.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <iostream>
#include <new>
#include <optional>
#include <sstream>

#include "harness/base/check.h"
#include "harness/base/operator.h"
#include "harness/fuzz/protocol.h"
#include "harness/group/ledger.h"
#include "harness/group/world.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TP_SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TP_SANITIZED 1
#endif

namespace tp {

namespace {

// What process 0 broadcasts when there is nothing more to run.
constexpr std::string_view kNoMore = "no more requests";

#if !defined(TP_SANITIZED)
LedgerPage* ledger = nullptr;

void note_signal(int signal) {
  ledger->running.signal = signal;
  raise(signal);  // SA_RESETHAND: now it kills
}

// Leaves the signal's number in the ledger before it kills. On a stack of its own, because running
// off the end of a fiber's stack is one of the ways to get here.
void mark_fatal_signals(int process) {
  static char stack[64 * 1024];
  ledger = &ledger_page(process);
  const stack_t alternative = {.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof(stack)};
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_handler = note_signal;
  action.sa_flags = SA_ONSTACK | SA_RESETHAND | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT})
    sigaction(signal, &action, nullptr);
}
#else
void mark_fatal_signals(int) {}  // the sanitizer has handlers of its own, and says more
#endif

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
  options.deadline = request->deadline;
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

int worker_main(World& world) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // a worker stuck in a loop never sees the end of its input
  mark_fatal_signals(world.process());
  if (!world.is_root()) {
    serve(world);
    return 0;
  }
  const auto say = [](std::string_view kind, const std::string& text) {
    const std::string line = fmt::format("{}{}\n", kind, text);
    std::fwrite(line.data(), 1, line.size(), stdout);
    std::fflush(stdout);
  };
  say(kReady, fmt::format("{} processes", world.processes()));
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

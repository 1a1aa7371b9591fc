#include "harness/fuzz/finding.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <utility>

#include "harness/base/text.h"
#include "harness/fuzz/deadlines.h"
#include "harness/fuzz/interrupt.h"

namespace tp {

namespace {

// Mutants whose output is the observed one, bit for bit.
std::string look_alikes(Runner& runner, const Finding& finding, const MakeRequest& request) {
  if (finding.verdict.digest == 0) return "";
  std::vector<std::string> alike;
  for (const Mutant& mutant : find_operator(finding.smallest.op).mutants) {
    if (!mutant.shows(finding.smallest)) continue;
    Request r = request(finding.smallest);
    r.mutant = mutant.id;
    if (runner.run(r).verdict.digest == finding.verdict.digest) {
      alike.push_back(fmt::format("{} ({})", mutant.what, mutant.upstream));
    }
  }
  return fmt::format("{}", fmt::join(alike, "; or "));
}

std::string changed_keys(const Finding& f) {
  std::string text;
  for (const Key& key : find_operator(f.original.op).keys) {
    const std::int64_t was = key.get(f.original);
    if (was != key.get(f.smallest))
      text += fmt::format("{}{}={}", text.empty() ? "" : " ", key.name, key.print(was));
  }
  return text.empty() ? "this very case" : text;
}

}  // namespace

Finding not_replayed(const Answer& answer, const Where& where) {
  Finding finding;
  finding.original = finding.smallest = case_from_line(answer.request.line);
  finding.verdict = answer.verdict;
  finding.where = where;
  finding.poison = answer.request.poison;
  finding.serial = answer.request.serial;
  finding.mutant = answer.request.mutant;
  finding.log = answer.log;
  return finding;
}

Finding investigate(Runner& runner, const Answer& answer, const MakeRequest& request,
                    const Where& seen_in, const ShrinkLimits& limits) {
  Finding finding = not_replayed(answer, seen_in);
  bool serial = false;
  const auto fails_on = [&](Runner& where, const Case& c) -> std::optional<Verdict> {
    Request r = request(c);
    r.serial = serial;
    Answer again = where.run(std::move(r));
    // What one side alone shows must not turn into what both do, which is another mistake.
    if (again.side != answer.side || !same_failure(answer.verdict, again.verdict))
      return std::nullopt;
    if (!again.log.empty()) finding.log = again.log;
    return again.verdict;
  };
  const bool ends_job =
      answer.verdict.outcome == Outcome::Crash || answer.verdict.outcome == Outcome::Hang;
  Runner* where = ends_job ? &runner.alone() : &runner;
  // Of the kernels that run at the same time, a GPU does not say which one broke it.
  serial = answer.verdict.outcome == Outcome::Crash;
  try {
    std::optional<Verdict> again = fails_on(*where, finding.original);
    if (!again && std::exchange(serial, false)) again = fails_on(*where, finding.original);
    if (!again && where != &runner) {
      where = &runner;  // it takes several processes
      again = fails_on(*where, finding.original);
    }
    finding.replayed = true;
    if (!again) return finding;
    finding.reproduced = true;
    finding.serial = serial;
    finding.verdict = *again;
    if (where != &runner) finding.where.processes = 1;
    const auto fails = [&](const Case& c) -> std::optional<Verdict> {
      if (finding.interrupted || finding.gave_up) return std::nullopt;
      try {
        return fails_on(*where, c);
      } catch (const Interrupted&) {
        finding.interrupted = true;
      } catch (const GaveUp& e) {
        finding.gave_up = e;
      }
      return std::nullopt;
    };
    const Shrunk shrunk = minimise(finding.original, finding.verdict, fails, limits);
    finding.smallest = shrunk.smallest;
    finding.verdict = shrunk.verdict;
    finding.runs = shrunk.runs;
    if (finding.mutant.empty() && !finding.interrupted && !finding.gave_up)
      finding.looks_like = look_alikes(*where, finding, request);
  } catch (const Interrupted&) {
    finding.interrupted = true;
  } catch (const GaveUp& e) {
    finding.gave_up = e;
  }
  return finding;
}

std::string signature(const Answer& failure) {
  return fmt::format("{} {} {}", case_from_line(failure.request.line).op,
                     name_of(failure.verdict.outcome), int(failure.side));
}

std::string replay_command(const Finding& f) {
  std::string command = fmt::format("./tpcheck replay '{}'", to_line(f.smallest));
  const std::string& model = f.where.adapter.empty() ? f.where.checkpoint : f.where.base;
  if (!model.empty()) command += fmt::format(" --model {}", shell_quoted(model));
  if (!f.where.adapter.empty())
    command += fmt::format(" --adapter {}", shell_quoted(f.where.adapter));
  if (!f.mutant.empty()) command += fmt::format(" --mutant {}", f.mutant);
  command += replay_flags(f.where);
  if (f.timeout > 0) command += fmt::format(" --timeout {}ms", milliseconds_of(f.timeout).count());
  if (!f.poison) command += " --no-poison";
  if (f.serial) command += " --serial";
  return command;
}

std::string finding_text(const Finding& f, int number) {
  const std::string head = f.reproduced ? fmt::format("FINDING {}", number)
                           : f.replayed ? "UNSTABLE"
                                        : "NOT REPLAYED";
  std::string text = fmt::format("{}  {}  {}   {}\n", head, f.smallest.op,
                                 name_of(f.verdict.outcome), f.verdict.detail);
  text += fmt::format("  case        {}\n", to_line(f.smallest));
  if (f.reproduced && f.runs > 0) {
    text += fmt::format("  from        {}   ({} runs{})\n", changed_keys(f), f.runs,
                        f.interrupted ? ", interrupted" : "");
  } else if (f.replayed && !f.reproduced) {
    text += "  replayed    and did not fail again\n";
  }
  if (!f.mutant.empty()) {
    const Mutant& m = *find_mutant(f.mutant).front().mutant;
    text += fmt::format("  mutant      {}: {} ({})\n", m.id, m.what, m.upstream);
  }
  if (!f.looks_like.empty()) text += fmt::format("  looks like  {}\n", f.looks_like);
  text += fmt::format("  replay      {}\n", replay_command(f));
  return text;
}

}  // namespace tp

#include "harness/fuzz/zoo.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/base/operator.h"
#include "harness/fuzz/driver.h"
#include "harness/fuzz/fuzz.h"

namespace tp {

namespace {

struct Hunt {
  std::string id;
  FuzzResult result;

  bool found() const { return !result.findings.empty(); }
  std::string line() const { return found() ? to_line(result.findings[0].smallest) : ""; }
  double seconds() const { return found() ? result.seconds_to_first : result.summary.seconds; }
  int runs() const { return found() ? result.findings[0].runs : 0; }
};

std::vector<std::string> wanted(const ZooOptions& options) {
  std::vector<std::string> ids = options.mutants;
  for (const std::string& id : ids) find_mutant(id);
  if (!ids.empty()) return ids;
  for (const Operator& op : operators()) {
    for (const Mutant& m : op.mutants) {
      if (std::find(ids.begin(), ids.end(), m.id) == ids.end()) ids.push_back(m.id);
    }
  }
  if (ids.empty()) throw BadInput("no operator has a mutant");
  return ids;
}

std::string table_row(const Hunt& hunt, std::size_t id_width) {
  const Summary& s = hunt.result.summary;
  return fmt::format("{:<{}}  {:<9}  {:>7}  {:>7.2f}  {:>6}  {}\n", hunt.id, id_width,
                     hunt.found() ? "found" : "NOT FOUND", s.ran(), hunt.seconds(), hunt.runs(),
                     hunt.line());
}

std::string to_json(const std::vector<Hunt>& hunts, std::uint64_t seed, const std::string& where) {
  using Json = nlohmann::ordered_json;
  Json out = {{"where", where}, {"seed", seed}, {"mutants", Json::array()}};
  for (const Hunt& hunt : hunts) {
    out["mutants"].push_back(
        {{"id", hunt.id},
         {"found", hunt.found()},
         {"cases", hunt.result.summary.ran()},
         {"seconds", hunt.seconds()},
         {"shrink_runs", hunt.runs()},
         {"case", hunt.found() ? Json(hunt.line()) : Json()},
         {"replay", hunt.found() ? Json(replay_command(hunt.result.findings[0])) : Json()}});
  }
  // A place is named by its driver, and need not be UTF-8.
  return out.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace

int zoo_main(World* world, const ZooOptions& options) {
  const std::vector<std::string> ids = wanted(options);
  std::size_t id_width = 6;
  for (const std::string& id : ids) id_width = std::max(id_width, id.size());
  const std::uint64_t seed = options.seed.value_or(random_seed());
  std::vector<int> tp_sizes(16);
  std::iota(tp_sizes.begin(), tp_sizes.end(), 1);
  return with_runner(world, options.where, [&](Runner& runner, const Where& where) {
    fmt::print(stderr, "{}seed {}\n", header_text(runner.where(), true), seed);
    if (!options.json) {
      fmt::print("{:<{}}  {:<9}  {:>7}  {:>7}  {:>6}  {}\n", "mutant", id_width, "", "cases",
                 "seconds", "shrink", "case");
    }
    std::vector<Hunt> hunts;
    int cut_short = 0;  // the exit code that goes with it
    for (const std::string& id : ids) {
      FuzzOptions hunting;
      hunting.for_seconds = options.for_seconds;
      hunting.mutant = id;
      Progress progress(Progress::Show::yes);
      const Domain domain = make_domain({}, tp_sizes, {}, id);
      Hunt hunt{
          id, fuzz(runner, where, domain, hunting, seed, nullptr, progress, [](const Finding&) {})};
      if (hunt.result.gave_up) {
        fmt::print(stderr, "tpcheck: {}\n", hunt.result.gave_up->what());
        cut_short = hunt.result.gave_up->exit_code;
      } else if (hunt.result.interrupted) {
        fmt::print(stderr, "interrupted: what there is so far\n");
        cut_short = kExitInterrupted;
      }
      // Of a hunt that was broken off nobody can say that it found nothing.
      if (cut_short == 0 || hunt.found()) {
        if (!options.json) fmt::print("{}", table_row(hunt, id_width));
        hunts.push_back(std::move(hunt));
      }
      std::fflush(stdout);
      if (cut_short != 0) break;
    }
    const auto found =
        std::count_if(hunts.begin(), hunts.end(), [](const Hunt& h) { return h.found(); });
    if (options.json) {
      fmt::print("{}\n", to_json(hunts, seed, runner.where()));
    } else {
      const std::size_t left = ids.size() - hunts.size();
      fmt::print("{} of {} found, seed {}{}\n", found, hunts.size(), seed,
                 left > 0 ? fmt::format(" ({} more not hunted to the end)", left) : "");
    }
    if (cut_short != 0) return cut_short;
    return found == std::ptrdiff_t(hunts.size()) ? 0 : kExitFinding;
  });
}

}  // namespace tp

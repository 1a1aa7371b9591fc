#include "harness/cli/commands.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/cli/arguments.h"
#include "harness/cli/list.h"

namespace tp {

namespace {

constexpr std::int64_t kMaxProcesses = 1024;
constexpr std::int64_t kMaxLoraRank = 1 << 16;

std::optional<std::uint64_t> seed(const Flags& f) {
  if (!f.given("--seed")) return std::nullopt;
  const Key range = shared_key("seed");
  return std::uint64_t(f.number("--seed", range.min, range.max, 0));
}

void group_flag(Flags& f) {
  f.text("--group", "LINK",
         "how collectives cross processes: best, mpi or nccl (default: best, which is NCCL between "
         "GPUs (one each), MPI between emulators)");
}
Link link(const Flags& f) {
  const std::vector<std::string> words(kLinkWords.begin(), kLinkWords.end());
  const std::string word = one_of("--group", f.name_or("--group", words[0]), words);
  return Link(std::find(words.begin(), words.end(), word) - words.begin());
}

// Where cases run: the same flags for every command that runs any.
void where_flags(Flags& f) {
  f.text("--on", "WHERE",
         "emulator, gpu, or both with their answers compared (default: as this tpcheck was built)");
  group_flag(f);
  f.text("-n", "PROCESSES",
         "MPI processes of one worker job (default: the cores, at most 4; on a GPU 1)");
}
void jobs_flag(Flags& f) {
  f.text("--jobs", "J",
         "worker jobs (default: as many as keep the cores busy; on a GPU 1; with "
         "more there, timings are left out)");
}
Where where(const Flags& f, bool with_jobs) {
  Where w;
  w.on = one_of("--on", f.name_or("--on", w.on),
                {std::string(kEmulator), std::string(kGpu), std::string(kBoth)});
  w.link = link(f);
  w.processes = int(f.number("-n", 1, kMaxProcesses, 0));
  if (with_jobs) w.jobs = int(f.number("--jobs", 1, kMaxProcesses, 0));
  return w;
}

void poison_flag(Flags& f) {
  f.on_off("--no-poison",
           "for compute-sanitizer: memory neither poisoned nor guarded, one pass only (the poison "
           "and guard oracles are off)");
}

void fuzz_flags(Flags& f) {
  f.list("--ops", "LIST", "operators (default: all; see tpcheck list ops)");
  f.list("--tp", "LIST|A..B", "sizes of the tensor-parallel group (default: 1..16)");
  f.list("--model", "NAME|FILE|DIR",
         "draw shapes of this model only: a preset, a config.json, or all; repeatable; in a folder "
         "with safetensors as well, cases run on its tensors");
  f.text("--adapter", "DIR",
         "a LoRA adapter as peft writes it, for the model of the one --model DIR: run cases on its "
         "tensors");
  f.text("--for", "TIME", "stop after 500ms, 90s, 10m, 2h (default: 60s)");
  f.text("--cases", "N", "stop after so many cases");
  f.text("--seed", "S", "of everything that is drawn (default: a new one, printed)");
  where_flags(f);
  jobs_flag(f);
  f.text("--timeout", "TIME",
         "deadline of a case (default: 2s, or 20 times the slowest passing one)");
  poison_flag(f);
  f.text("--artifacts", "DIR", "where findings are written (default: findings)");
  f.on_off("--keep-going", "do not stop at the first finding");
  f.text("--mutant", "ID", "put this upstream mistake back (see tpcheck list mutants)");
  f.on_off("--each", "one case for each legal model and tp_size instead of drawing");
  f.on_off("--json", "the result as JSON");
}
Command fuzz_command(const Flags& f) {
  return FuzzOptions{.ops = words("--ops", f.list_of("--ops")),
                     .tp_sizes = tp_sizes("--tp", f.list_of("--tp")),
                     .models = f.list_of("--model"),
                     .adapter = f.name_or("--adapter", ""),
                     .for_seconds = f.seconds("--for", 0),
                     .cases = f.number("--cases", 1, INT64_MAX, 0),
                     .seed = seed(f),
                     .where = where(f, true),
                     .poison = !f.is_on("--no-poison"),
                     .timeout = f.seconds("--timeout", 0),
                     .artifacts = f.name_or("--artifacts", "findings"),
                     .keep_going = f.is_on("--keep-going"),
                     .mutant = f.name_or("--mutant", ""),
                     .each = f.is_on("--each"),
                     .json = f.is_on("--json")};
}

void replay_flags(Flags& f) {
  f.list("CASE", "CASE|FILE|DIR", "case lines in quotes, files of them, folders of *.case");
  where_flags(f);
  f.on_off("--serial",
           "one kernel at a time: says who breaks a GPU (kernels that wait for each other hang)");
  poison_flag(f);
  f.text("--times", "K", "run each case so often (default: 1)");
  f.text("--timeout", "TIME", "deadline of a case (default: 30s)");
  f.on_off("--trace", "print each stage's values and each collective of every rank");
  f.text("--mutant", "ID", "put this upstream mistake back");
  f.text("--model", "DIR", "a folder with config.json and safetensors: run cases on its tensors");
  f.text("--adapter", "DIR",
         "a LoRA adapter for the model of --model DIR, which needs no safetensors then: run cases "
         "on its tensors");
}
Command replay_command(const Flags& f) {
  std::vector<std::string> inputs = f.list_of("CASE");
  if (inputs.empty()) throw BadInput("replay needs a case line, a file or a folder");
  // A case line pasted without its quotes.
  if (inputs[0] == "v1") inputs = {fmt::format("{}", fmt::join(inputs, " "))};
  return ReplayOptions{.inputs = inputs,
                       .where = where(f, false),
                       .poison = !f.is_on("--no-poison"),
                       .serial = f.is_on("--serial"),
                       .times = int(f.number("--times", 1, 1'000'000, 1)),
                       .timeout = f.seconds("--timeout", 0),
                       .trace = f.is_on("--trace"),
                       .mutant = f.name_or("--mutant", ""),
                       .model = f.name_or("--model", ""),
                       .adapter = f.name_or("--adapter", "")};
}

void explain_flags(Flags& f) {
  f.list("MODEL", "MODEL|FILE|DIR", "a preset (see tpcheck list models) or a config.json");
  f.text("--heads", "H", "or a shape: query heads");
  f.text("--kv-heads", "K", "key/value heads");
  f.text("--head-dim", "D", "width of a head");
  f.text("--hidden-size", "E", "width of the residual stream");
  f.text("--tp", "T", "ranks in the tensor-parallel group");
  f.text("--rank", "R", "this rank only");
  f.text("--lora-rank", "L", "rank of a LoRA adapter");
  f.on_off("--json", "as JSON; ranges are half-open");
}
Command explain_command(const Flags& f) {
  ExplainOptions options;
  const std::vector<std::string>& model = f.list_of("MODEL");
  const bool shape = f.given("--heads") || f.given("--kv-heads") || f.given("--head-dim") ||
                     f.given("--hidden-size");
  if (model.size() > 1)
    throw BadInput(fmt::format("explain takes one model, not {}", model.size()));
  if (model.empty() == !shape)
    throw BadInput("explain needs a model, or --heads, --kv-heads and --head-dim");
  if (!f.given("--tp"))
    throw BadInput("explain needs --tp, the ranks in the tensor-parallel group");
  if (shape) {
    for (const char* flag : {"--heads", "--kv-heads", "--head-dim"}) {
      if (!f.given(flag)) throw BadInput(fmt::format("explain of a shape needs {}", flag));
    }
    options.model.shape = {.hidden_size = f.size("--hidden-size", "hidden_size", 0),
                           .num_heads = f.size("--heads", "num_heads", 0),
                           .num_kv_heads = f.size("--kv-heads", "num_kv_heads", 0),
                           .head_dim = f.size("--head-dim", "head_dim", 0)};
  } else {
    options.model = find_model(model[0]);
  }
  options.tp_size = f.size("--tp", "tp_size", 0);
  if (f.given("--rank")) options.tp_rank = int(f.number("--rank", 0, options.tp_size - 1, 0));
  options.lora_rank = int(f.number("--lora-rank", 1, kMaxLoraRank, 0));
  options.json = f.is_on("--json");
  return options;
}

void zoo_flags(Flags& f) {
  f.list("ID", "ID", "mutants (default: all; see tpcheck list mutants)");
  f.text("--for", "TIME", "hunt each for so long (default: 30s)");
  f.text("--seed", "S", "of everything that is drawn (default: a new one)");
  where_flags(f);
  jobs_flag(f);
  f.on_off("--json", "as JSON");
}
Command zoo_command(const Flags& f) {
  return ZooOptions{.mutants = words("ID", f.list_of("ID")),
                    .for_seconds = f.seconds("--for", 30),
                    .seed = seed(f),
                    .where = where(f, true),
                    .json = f.is_on("--json")};
}

void list_flags(Flags& f) { f.list("WHAT", "ops|models|mutants|laws", "what to list"); }
Command list_command(const Flags& f) {
  const std::vector<std::string>& what = f.list_of("WHAT");
  if (what.size() != 1)
    throw BadInput(fmt::format("list needs one of {}", fmt::join(list_subjects(), ", ")));
  return ListOptions{one_of("list", what[0], list_subjects())};
}

void worker_flags(Flags& f) {
  group_flag(f);
  f.text("--checkpoint", "DIR", "a folder with config.json and safetensors");
  f.text("--adapter", "DIR", "a LoRA adapter");
  f.text("--base", "DIR", "a folder with the config.json of its base");
}
Command worker_command(const Flags& f) {
  return WorkerOptions{.link = link(f),
                       .files = {.checkpoint = f.name_or("--checkpoint", ""),
                                 .adapter = f.name_or("--adapter", ""),
                                 .base = f.name_or("--base", "")}};
}

}  // namespace

const std::vector<CommandSpec>& commands() {
  static const std::vector<CommandSpec> all = {
      {"fuzz", "draw cases, compare them with the reference, shrink what fails",
       "tpcheck fuzz --ops qk_norm --tp 1..16 --for 10m", false, fuzz_flags, fuzz_command},
      {"replay", "run a case line again",
       "tpcheck replay 'v1 qk_norm num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 "
       "dtype=bf16 seed=7'",
       false, replay_flags, replay_command},
      {"explain", "which rank holds which rows of a model", "tpcheck explain MiniMax-M2.5 --tp 16",
       false, explain_flags, explain_command},
      {"zoo", "put every known upstream bug back and say which are found", "tpcheck zoo --for 10s",
       false, zoo_flags, zoo_command},
      {"list", "what there is to name: ops, models, mutants, laws", "tpcheck list mutants", false,
       list_flags, list_command},
      {"worker", "the processes that run cases", "mpirun -n 4 tpcheck worker", true, worker_flags,
       worker_command},
  };
  return all;
}

}  // namespace tp

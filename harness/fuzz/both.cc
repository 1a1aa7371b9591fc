#include "harness/fuzz/both.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "harness/base/check.h"
#include "harness/fuzz/interrupt.h"

namespace tp {

namespace {

std::string said(const Verdict& v) {
  return v.detail.empty() ? std::string(name_of(v.outcome))
                          : fmt::format("{}: {}", name_of(v.outcome), v.detail);
}

// One side has a finding, the other has none.
Verdict one_sided(const Verdict& finding, const Verdict& other, bool on_gpu) {
  Verdict v = finding;
  const char *here = on_gpu ? "on the gpu" : "in the emulator",
             *there = on_gpu ? "in the emulator" : "on the gpu";
  v.detail = other.outcome == Outcome::Pass
                 ? fmt::format("{} only: {}", here, finding.detail)
                 : fmt::format("{}: {}; {}: {}", here, finding.detail, there, said(other));
  return v;
}

Verdict two_findings(const Verdict& gpu, const Verdict& emulator) {
  Verdict v = gpu;
  if (gpu.outcome == emulator.outcome) {
    v.detail = fmt::format("on both: {}", gpu.detail);
  } else {
    v.detail = fmt::format("on the gpu: {}; in the emulator: {}", gpu.detail, said(emulator));
  }
  return v;
}

Verdict two_passes(const Verdict& gpu, const Verdict& emulator) {
  Verdict v = gpu;
  if (gpu.digest == emulator.digest || gpu.own_bits || emulator.own_bits) return v;
  v.outcome = Outcome::LawBroken;
  v.detail = fmt::format("gpu and emulator give different bits: digests {:016x} and {:016x}",
                         gpu.digest, emulator.digest);
  return v;
}

// No finding, and not two passes: the case counts for nothing, for the stronger reason of the two.
Verdict no_result(const Verdict& gpu, const Verdict& emulator) {
  if (gpu.outcome == emulator.outcome && gpu.detail == emulator.detail) return gpu;
  for (const Outcome reason : {Outcome::Refused, Outcome::Skipped, Outcome::Mistrusted}) {
    for (const auto& [where, side] :
         {std::pair("on the gpu", &gpu), {"in the emulator", &emulator}}) {
      if (side->outcome != reason) continue;
      Verdict v = *side;
      v.detail = fmt::format("{}: {}", where, v.detail);
      return v;
    }
  }
  return gpu;
}

Answer joined(Answer gpu, Answer emulator) {
  Answer both;
  both.request = std::move(gpu.request);
  both.verdict = merged(gpu.verdict, emulator.verdict);
  both.side = side_of(gpu.verdict, emulator.verdict);
  for (const auto& [name, lines] : {std::pair("gpu", &gpu.trace), {"emulator", &emulator.trace}}) {
    for (const std::string& line : *lines)
      both.trace.push_back(fmt::format("{:<8}  {}", name, line));
  }
  both.log = gpu.log + (gpu.log.empty() || emulator.log.empty() ? "" : "\n") + emulator.log;
  return both;
}

}  // namespace

Verdict merged(const Verdict& gpu, const Verdict& emulator) {
  Verdict v;
  if (gpu.finding() && emulator.finding()) {
    v = two_findings(gpu, emulator);
  } else if (gpu.finding()) {
    v = one_sided(gpu, emulator, true);
  } else if (emulator.finding()) {
    v = one_sided(emulator, gpu, false);
  } else if (gpu.outcome == Outcome::Pass && emulator.outcome == Outcome::Pass) {
    v = two_passes(gpu, emulator);
  } else {
    v = no_result(gpu, emulator);
  }
  v.score = std::max(gpu.score, emulator.score);
  v.threads = emulator.threads;
  v.seconds = std::max(gpu.seconds, emulator.seconds);
  v.timing = gpu.timing;
  return v;
}

Side side_of(const Verdict& gpu, const Verdict& emulator) {
  if (gpu.finding()) return emulator.finding() ? Side::both : Side::gpu;
  if (emulator.finding()) return Side::emulator;
  return merged(gpu, emulator).finding() ? Side::bits : Side::unasked;
}

Both::Both(Supervisor& gpu, Supervisor& emulator) : gpu_{gpu}, emulator_{emulator} {}

std::string Both::where() const {
  return fmt::format("{}\n{}", gpu_.runner.where(), emulator_.runner.where());
}

// The side with more jobs is kept busy; at the other one cases queue.
bool Both::has_room() const {
  return open_.size() < std::size_t(std::max(gpu_.runner.jobs(), emulator_.runner.jobs()));
}

void Both::submit(Request request) {
  request.id = next_id_++;
  open_[request.id];
  gpu_.waiting.push_back(request);
  emulator_.waiting.push_back(std::move(request));
}

Answer Both::wait() {
  for (;;) {
    for (const auto& [side, half] :
         {std::pair(&gpu_, &Halves::gpu), {&emulator_, &Halves::emulator}}) {
      try {
        take(*side, half);
      } catch (const GaveUp& e) {
        if (!gave_up_) gave_up_ = e;
      }
    }
    if (std::optional<Answer> answer = whole()) return std::move(*answer);
    if (gave_up_ || interrupted_) {
      if (std::optional<Answer> answer = half_of_a_finding()) return std::move(*answer);
      if (gave_up_) throw *gave_up_;
      throw Interrupted{};
    }
    try {
      Supervisor::poll_once({&gpu_.runner, &emulator_.runner});
    } catch (const Interrupted&) {
      interrupted_ = true;
    }
  }
}

// Takes what has come from one side, and gives it what it has room for.
void Both::take(Side& side, std::optional<Answer> Halves::*half) {
  while (std::optional<Answer> answer = side.runner.take()) {
    const auto it = open_.find(answer->request.id);
    TP_CHECK(it != open_.end(), "an answer to nothing that was asked");
    it->second.*half = std::move(answer);
  }
  while (!side.waiting.empty() && side.runner.has_room()) {
    side.runner.submit(std::move(side.waiting.front()));
    side.waiting.pop_front();
  }
}

std::optional<Answer> Both::whole() {
  for (auto it = open_.begin(); it != open_.end(); ++it) {
    auto& [gpu, emulator] = it->second;
    if (!gpu || !emulator) continue;
    Answer answer = joined(std::move(*gpu), std::move(*emulator));
    open_.erase(it);
    return answer;
  }
  return std::nullopt;
}

// One side will not answer any more: a finding of the other is one nevertheless.
std::optional<Answer> Both::half_of_a_finding() {
  for (auto it = open_.begin(); it != open_.end(); ++it) {
    auto& [gpu, emulator] = it->second;
    Answer& there = gpu ? *gpu : *emulator;
    if ((!gpu && !emulator) || !there.verdict.finding()) continue;
    Answer none;
    none.request = there.request;
    none.verdict = {.outcome = Outcome::Skipped, .detail = "no answer"};
    Answer answer = gpu ? joined(std::move(*gpu), none) : joined(none, std::move(*emulator));
    open_.erase(it);
    return answer;
  }
  return std::nullopt;
}

Both& Both::alone() {
  if (!alone_) alone_ = std::make_unique<Both>(gpu_.runner.alone(), emulator_.runner.alone());
  return *alone_;
}

}  // namespace tp

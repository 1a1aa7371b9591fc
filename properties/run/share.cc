#include "properties/run/share.h"

#include <fmt/format.h>

#include <cstdio>
#include <sstream>
#include <utility>

#include "harness/base/check.h"

namespace tp {

int weight_of(const Share& share) {
  if (!share.fault || share.fault->outcome == Outcome::Pass) return 0;
  if (share.fault->of_others) return 1;
  return share.fault->outcome == Outcome::Hang ? 2 : 3;
}

std::string pack(const Share& share) {
  const Fault fault = share.fault.value_or(Fault{Outcome::Pass, "", -1});
  std::string times;
  for (const auto& [rank, time] : share.times)
    times += fmt::format("{} {:.9g} {:.9g}\n", rank, time.kernel_us, time.collective_us);
  std::string text =
      fmt::format("{:d} {:d} {} {} {} {} {} {}\n{}{}{}", share.fault.has_value(), fault.of_others,
                  int(fault.outcome), fault.tp_rank, share.threads, fault.what.size(),
                  share.trace.size(), times.size(), fault.what, share.trace, times);
  text.append(reinterpret_cast<const char*>(share.outputs.data()), share.outputs.size());
  return text;
}

Share unpack(const std::string& text) {
  Share share;
  Fault fault;
  int has_fault = 0, of_others = 0, outcome = 0;
  unsigned long long threads = 0, what_size = 0, trace_size = 0, times_size = 0;
  TP_CHECK(
      std::sscanf(text.c_str(), "%d %d %d %d %llu %llu %llu %llu", &has_fault, &of_others, &outcome,
                  &fault.tp_rank, &threads, &what_size, &trace_size, &times_size) == 8,
      "a process's share is garbled");
  std::size_t at = text.find('\n') + 1;
  const auto take = [&](std::size_t size) {
    return text.substr(std::exchange(at, at + size), size);
  };
  fault.outcome = Outcome(outcome);
  fault.what = take(what_size);
  share.trace = take(trace_size);
  std::istringstream times(take(times_size));
  int rank = 0;
  for (DeviceTime t; times >> rank >> t.kernel_us >> t.collective_us;) share.times[rank] = t;
  fault.of_others = of_others != 0;
  if (has_fault) share.fault = fault;
  share.threads = threads;
  const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
  share.outputs.assign(bytes + at, bytes + text.size());
  return share;
}

}  // namespace tp

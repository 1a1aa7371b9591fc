#pragma once
// What supervisor and worker say to each other, a line at a time.
//
//   to the worker    run <deadline ms> <mutant id or -> <trace 0|1> <poison 0|1> <serial 0|1>
//                    <case line>
//   back, at start   tpcheck-ready <kProtocol> <executor> <where it runs>    (place.h)
//   or               tpcheck-cannot <why>            (and it ends)
//   back             tpcheck-trace <text>             (any number, only if asked for)
//   back             tpcheck-retires                  (the next verdict is this job's last)
//   back             tpcheck-verdict <verdict line>
//
// What the code under test prints goes to standard error; any other line is no protocol.

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

namespace tp {

// The two sides may be binaries of their own, built at other times: a change of what they say to
// each other is another number.
inline constexpr int kProtocol = 3;

inline constexpr std::string_view kReady = "tpcheck-ready ";
inline constexpr std::string_view kCannot = "tpcheck-cannot ";
inline constexpr std::string_view kTrace = "tpcheck-trace ";
inline constexpr std::string_view kRetires = "tpcheck-retires";
inline constexpr std::string_view kVerdict = "tpcheck-verdict ";

struct Request {
  std::string line;    // of the case
  std::string mutant;  // id; empty: none
  std::chrono::milliseconds deadline{0};
  bool trace = false;
  bool poison = true;    // RunOptions::poison
  bool serial = false;   // RunOptions::serial
  std::uint64_t id = 0;  // the sender's own: it stays with the answer and is not sent
};

// One line without a newline, and back. The second throws BadInput; it does not look at the case
// line.
std::string to_line(const Request& request);
Request request_from_line(std::string_view line);

}  // namespace tp

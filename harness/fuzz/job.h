#pragma once
// One worker job: `mpirun -n P tpcheck worker`, or for P = 1 the executor's binary itself, which
// then never starts MPI and is up in some 10 ms. It has its own process group and its own folder
// for temporary files and ledgers. Both go with the Job; a supervisor that is killed takes the
// processes along, but leaves the folder.

#include <sys/types.h>

#include <chrono>
#include <deque>
#include <filesystem>
#include <string>
#include <vector>

#include "harness/fuzz/executor.h"

namespace tp {

// Throws Unavailable if there is no mpirun.
void check_launcher(int processes);

// Lines out of a pipe, as they come.
class LineReader {
 public:
  explicit LineReader(int fd = -1) : fd_(fd) {}
  int fd() const { return fd_; }
  // Appends what one read() gets without waiting: whoever writes without end must not keep us here.
  // Returns false at the end of the pipe.
  bool read_into(std::vector<std::string>& lines);

 private:
  int fd_;
  std::string partial_;
};

class Job {
 public:
  // Throws GaveUp where the machine has no room for one more process.
  Job(const Executor& executor, int processes);
  ~Job();  // lets an idle job end, kills a busy one
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Sends one line. A job that has died shows by the end of its output, not here.
  void send(const std::string& line);

  LineReader out;
  // Reads standard error; the last lines of it are kept.
  void read_errors();
  int errors_fd() const { return errors_open_ ? errors_.fd() : -1; }  // -1: nothing more to come
  std::string last_errors() const;

  // Ends the job, once it has had some time to end by itself. How it ended, in a few words: "killed
  // by SIGSEGV", "exited with 3".
  std::string end(std::chrono::milliseconds patience);
  // After end(): what was going on, for a verdict's detail: rank, kernel and the last thing it
  // said.
  std::string last_words() const;

 private:
  void start(const Executor& executor, int processes);

  std::filesystem::path folder_;
  pid_t pid_ = -1;
  int in_ = -1;
  LineReader errors_;
  bool errors_open_ = true;
  std::deque<std::string> kept_;
};

}  // namespace tp

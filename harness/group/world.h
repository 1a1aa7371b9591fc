#pragma once
// The processes of this job: MPI's lifetime, and the few things all processes do together. A
// process started without a launcher is a world of one and never touches MPI. MPI is called from
// the process's own stack only, never from a fiber's (Open MPI crashes on small stacks).

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace tp {

class World {
 public:
  // Whether this process was started by mpirun or srun. A plain Slurm batch script has
  // SLURM_PROCID, too, so only the variables of Open MPI and PMIx count.
  static bool launched();

  // Starts MPI if launched(). First thing in main; that World ends MPI when destroyed.
  World(int* argc, char*** argv);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  // The world there is: at most one exists at a time. For benchmarks, which are given nothing.
  static World& current();

  int processes() const { return processes_; }
  int process() const { return process_; }
  // Which one it is among the processes of this host.
  int local_process() const { return local_process_; }
  int processes_of_host() const { return processes_of_host_; }
  bool is_root() const { return process_ == 0; }

  // What process 0 passes, on all processes. Everybody calls it.
  std::string broadcast(const std::string& text);
  // Every process's text, in order of processes, on process 0; empty elsewhere. Everybody calls it.
  std::vector<std::string> gather(const std::string& text);
  // The largest value over all processes, on each of them. Everybody calls it.
  int max(int value);

  // Everybody passes why it cannot go on, or nothing. Throws Unavailable on all of them, with all
  // their reasons.
  void agree(const std::string& why);

  // After an exchange that was given up halfway, or where a device is lost, the processes cannot
  // run another case together: the job says what it has to say and ends (the supervisor starts
  // another one).
  void retire() { retired_ = true; }
  bool retired() const { return retired_; }

  // Ends every process of the job with this exit code, now.
  [[noreturn]] void abort(int exit_code);

 private:
  int processes_ = 1;
  int process_ = 0;
  int local_process_ = 0;
  int processes_of_host_ = 1;
  bool mpi_ = false;
  bool starts_and_ends_mpi_ = false;
  bool retired_ = false;
};

// All-gather of bytes among the first `processes` processes of the world, without blocking. Every
// process of the world makes one.
class Channel {
 public:
  Channel(World& world, int processes);
  // An exchange that was given up halfway goes on inside MPI: its buffers outlive the Channel.
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  // Process p contributes bytes[p] bytes, this one `mine`. At most one exchange at a time.
  void start(std::vector<std::byte> mine, std::vector<int> bytes);
  // Whether the exchange is complete, or none was started.
  bool test();
  // Everybody's bytes, one process after another, when test() is true.
  const std::vector<std::byte>& received() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tp

#include "harness/fuzz/job.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sstream>
#include <thread>
#include <utility>

#include "harness/base/check.h"
#include "harness/fuzz/runner.h"
#include "harness/group/ledger.h"

extern char** environ;

namespace tp {

namespace {

constexpr auto kFarewell = std::chrono::milliseconds(500);
constexpr std::size_t kKeptLines = 200;
constexpr std::size_t kKeptLineLength = 400;
// Longer ones are cut into several: none that is meant for us is.
constexpr std::size_t kMaxLine = 1 << 20;
// What a pipe holds when its writers are gone, in reads.
constexpr int kLastReads = 16;

// In memory if possible: the ledgers are written at every switch between ranks. TPCHECK_TMPDIR is
// for whoever wants to know where.
std::filesystem::path make_folder() {
  const char *tmp = std::getenv("TMPDIR"), *wanted = std::getenv("TPCHECK_TMPDIR");
  for (const char* base : {wanted ? wanted : "/dev/shm", tmp ? tmp : "/tmp"}) {
    std::string path = fmt::format("{}/tpcheck-XXXXXX", base);
    if (mkdtemp(path.data())) return path;
  }
  throw Unavailable(
      "no folder for temporary files: neither /dev/shm nor TMPDIR nor /tmp can be written");
}

std::vector<std::string> job_environment(const std::filesystem::path& folder) {
  const std::vector<std::string> own = {
      "OMPI_ALLOW_RUN_AS_ROOT=1",
      "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1",
      "OMPI_MCA_rmaps_base_oversubscribe=1",  // Open MPI 4, then 5
      "PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe",
      // An idle process of a job waits in a collective: let the busy ones have the core.
      "OMPI_MCA_mpi_yield_when_idle=1",
      // Containers often forbid the ptrace that Open MPI's single-copy messages need.
      "OMPI_MCA_btl_vader_single_copy_mechanism=none",
      // What a killed job leaves behind goes with its folder.
      "OMPI_MCA_orte_tmpdir_base=" + folder.string(),
      "OMPI_MCA_btl_vader_backing_directory=" + folder.string(),
      "TPCHECK_LEDGER=" + folder.string(),
  };
  std::vector<std::string> all = own;
  for (char** e = environ; *e; ++e) {
    const std::string_view entry = *e;
    const std::string_view name = entry.substr(0, entry.find('=') + 1);
    bool replaced = false;
    for (const std::string& o : own) replaced |= o.starts_with(name);
    if (!replaced) all.emplace_back(entry);
  }
  return all;
}

std::vector<char*> pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (std::string& s : strings) out.push_back(s.data());
  out.push_back(nullptr);
  return out;
}

// Pids of all jobs, which are waited for one by one.
std::set<pid_t> jobs_alive;

// A killed mpirun leaves its workers to us (PR_SET_CHILD_SUBREAPER): in a container nobody else may
// bury them.
void reap_orphans() {
  for (;;) {
    siginfo_t info = {};
    if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0 || info.si_pid == 0) return;
    if (jobs_alive.contains(info.si_pid)) return;
    waitpid(info.si_pid, nullptr, 0);
  }
}

std::string describe_status(int status) {
  const auto signal = [](int number) {
    const char* name = sigabbrev_np(number);
    return name ? fmt::format("killed by SIG{}", name) : fmt::format("killed by signal {}", number);
  };
  if (WIFSIGNALED(status)) return signal(WTERMSIG(status));
  const int code = WEXITSTATUS(status);
  // mpirun passes on a rank's signal as a shell does.
  return code > 128 && code < 128 + 65 ? signal(code - 128) : fmt::format("exited with {}", code);
}

}  // namespace

void check_launcher(int processes) {
  if (processes == 1) return;
  std::istringstream path(std::getenv("PATH") ? std::getenv("PATH") : "");
  for (std::string folder; std::getline(path, folder, ':');) {
    if (access((folder + "/mpirun").c_str(), X_OK) == 0) return;
  }
  throw Unavailable(
      fmt::format("{} processes need mpirun, and PATH has none (-n 1 does without)", processes));
}

bool LineReader::read_into(std::vector<std::string>& lines) {
  const auto end_line = [&] { lines.push_back(std::exchange(partial_, {})); };
  char buffer[1 << 16];
  const ssize_t n = read(fd_, buffer, sizeof(buffer));
  if (n < 0) return errno == EAGAIN || errno == EINTR;
  if (n == 0) {
    if (!partial_.empty()) end_line();
    return false;
  }
  std::string_view rest(buffer, std::size_t(n));
  for (std::size_t end; (end = rest.find('\n')) != std::string_view::npos;
       rest.remove_prefix(end + 1)) {
    partial_ += rest.substr(0, end);
    end_line();
  }
  partial_ += rest;
  if (partial_.size() > kMaxLine) end_line();
  return true;
}

Job::Job(const Executor& executor, int processes) : folder_(make_folder()) {
  try {
    start(executor, processes);
  } catch (...) {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
    throw;
  }
}

void Job::start(const Executor& executor, int processes) {
  std::vector<std::string> arguments = {executor.binary.string(), "worker"};
  if (executor.link != Link::best) {
    arguments.insert(arguments.end(),
                     {"--group", std::string(kLinkWords[std::size_t(executor.link)])});
  }
  // One word: what a directory is called may begin like a flag.
  if (!executor.checkpoint.empty()) arguments.push_back("--checkpoint=" + executor.checkpoint);
  if (!executor.adapter.empty()) {
    arguments.push_back("--adapter=" + executor.adapter);
    arguments.push_back("--base=" + executor.base);
  }
  if (processes > 1) {
    const std::vector<std::string> launcher = {"mpirun", "--bind-to", "none", "-n",
                                               std::to_string(processes)};
    arguments.insert(arguments.begin(), launcher.begin(), launcher.end());
  }
  std::vector<std::string> environment = job_environment(folder_);
  const std::vector<char*> argv = pointers(arguments), envp = pointers(environment);

  int in[2] = {-1, -1}, out_pipe[2] = {-1, -1}, err[2] = {-1, -1};
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  const pid_t supervisor = getpid();
  if (pipe2(in, O_CLOEXEC) == 0 && pipe2(out_pipe, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0)
    pid_ = fork();
  if (pid_ < 0) {
    const std::string why = std::strerror(errno);
    for (const int* ends : {in, out_pipe, err}) {
      for (const int fd : {ends[0], ends[1]}) close(fd);
    }
    throw GaveUp(fmt::format("a worker job cannot be started: {}", why));
  }
  if (pid_ == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != supervisor) _exit(127);
    dup2(in[0], 0);
    dup2(out_pipe[1], 1);
    dup2(err[1], 2);
    for (const int s : {SIGINT, SIGTERM, SIGPIPE}) std::signal(s, SIG_DFL);
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    execvpe(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  jobs_alive.insert(pid_);
  setpgid(pid_, pid_);  // here as well: whoever comes first
  for (const int fd : {in[0], out_pipe[1], err[1]}) close(fd);
  for (const int fd : {out_pipe[0], err[0]}) fcntl(fd, F_SETFL, O_NONBLOCK);
  in_ = in[1];
  out = LineReader(out_pipe[0]);
  errors_ = LineReader(err[0]);
}

Job::~Job() {
  close(in_);  // an idle worker takes that for the end
  end(kFarewell);
  for (const int fd : {out.fd(), errors_.fd()}) close(fd);
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

void Job::send(const std::string& line) {
  const std::string text = line + "\n";
  for (std::size_t at = 0; at < text.size();) {
    const ssize_t n = write(in_, text.data() + at, text.size() - at);
    if (n < 0 && errno != EINTR) return;
    if (n > 0) at += std::size_t(n);
  }
}

void Job::read_errors() {
  std::vector<std::string> lines;
  errors_open_ = errors_.read_into(lines);
  for (std::string& line : lines) {
    kept_.push_back(line.substr(0, kKeptLineLength));
    if (kept_.size() > kKeptLines) kept_.pop_front();
  }
}

std::string Job::last_errors() const { return fmt::format("{}", fmt::join(kept_, "\n")); }

std::string Job::end(std::chrono::milliseconds patience) {
  if (pid_ < 0) return "";
  int status = 0;
  const auto until = std::chrono::steady_clock::now() + patience;
  pid_t reaped = waitpid(pid_, &status, WNOHANG);
  while (reaped == 0 && std::chrono::steady_clock::now() < until) {
    read_errors();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    reaped = waitpid(pid_, &status, WNOHANG);
  }
  kill(-pid_, SIGKILL);
  if (reaped == 0) waitpid(pid_, &status, 0);
  jobs_alive.erase(pid_);
  pid_ = -1;
  reap_orphans();
  for (int i = 0; i < kLastReads && errors_open_; ++i) read_errors();
  return describe_status(status);
}

std::string Job::last_words() const {
  std::string said;
  bool launcher_talks = false;  // mpirun frames what it has to say by lines of dashes
  for (const std::string& line : kept_) {
    if (line.starts_with("----------")) {
      launcher_talks = !launcher_talks;
    } else if (!launcher_talks && line.find_first_not_of(" \t=") != std::string::npos &&
               !said.starts_with("SUMMARY: ")) {
      said = line;
    }
  }
  std::string words = read_ledgers(folder_.string());
  if (!said.empty()) words += (words.empty() ? "" : "; ") + fmt::format("it said: {}", said);
  return words;
}

}  // namespace tp

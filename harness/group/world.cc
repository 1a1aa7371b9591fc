#include "harness/group/world.h"

#define OMPI_SKIP_MPICXX 1  // the C++ bindings were taken out of MPI; Open MPI's headers still warn
#include <mpi.h>

#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <thread>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"

// An MPI call that fails is a broken machine: say where, and end the whole job.
#define CHECK_MPI(call)                                                      \
  do {                                                                       \
    const int status = (call);                                               \
    TP_CHECK(status == MPI_SUCCESS, "MPI status " + std::to_string(status)); \
  } while (0)

namespace tp {

namespace {

// MPI counts in int: more than that in one message is refused, not wrapped around.
int message_size(std::size_t bytes) {
  TP_CHECK(bytes <= std::size_t(INT_MAX), "a message of more than 2 GiB");
  return int(bytes);
}

// Waits awake at first, then leaves the core to whoever has work: a process that spins in one of
// MPI's own waits looks busy to the system, which then leaves two that do have work on one core.
void wait_for(MPI_Request request) {
  constexpr int kPollsAwake = 64;
  for (int polls = 0;; ++polls) {
    int done = 0;
    CHECK_MPI(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    if (done) return;
    if (polls < kPollsAwake) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
}

// Where each of several parts, one after another, begins.
std::vector<int> offsets_of(const std::vector<int>& sizes) {
  std::vector<int> offsets;
  std::size_t total = 0;
  for (int size : sizes) {
    offsets.push_back(message_size(total));
    total += std::size_t(size);
  }
  message_size(total);
  return offsets;
}

}  // namespace

bool World::launched() { return std::getenv("OMPI_COMM_WORLD_SIZE") || std::getenv("PMIX_RANK"); }

namespace {
World* the_world = nullptr;
}

World& World::current() {
  if (the_world == nullptr) die(__FILE__, __LINE__, "there is no world");
  return *the_world;
}

World::World(int* argc, char*** argv) : mpi_(launched()) {
  the_world = this;
  if (!mpi_) return;
  int initialised = 0;
  CHECK_MPI(MPI_Initialized(&initialised));
  starts_and_ends_mpi_ = !initialised;
  if (starts_and_ends_mpi_) CHECK_MPI(MPI_Init(argc, argv));
  CHECK_MPI(MPI_Comm_size(MPI_COMM_WORLD, &processes_));
  CHECK_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &process_));
  MPI_Comm host = MPI_COMM_NULL;
  CHECK_MPI(
      MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, process_, MPI_INFO_NULL, &host));
  CHECK_MPI(MPI_Comm_rank(host, &local_process_));
  CHECK_MPI(MPI_Comm_size(host, &processes_of_host_));
  CHECK_MPI(MPI_Comm_free(&host));
}

World::~World() {
  the_world = nullptr;
  // MPI_Finalize would wait for an exchange that was given up, and the end of the process for a
  // kernel that never ends.
  if (retired_) abort(kExitGaveUp);
  if (!starts_and_ends_mpi_) return;
  MPI_Finalize();
}

std::string World::broadcast(const std::string& text) {
  if (!mpi_) return text;
  std::string out = text;
  unsigned long long size = out.size();
  MPI_Request request = MPI_REQUEST_NULL;
  CHECK_MPI(MPI_Ibcast(&size, 1, MPI_UNSIGNED_LONG_LONG, 0, MPI_COMM_WORLD, &request));
  wait_for(request);
  out.resize(size);
  CHECK_MPI(MPI_Ibcast(out.data(), message_size(size), MPI_CHAR, 0, MPI_COMM_WORLD, &request));
  wait_for(request);
  return out;
}

std::vector<std::string> World::gather(const std::string& text) {
  if (!mpi_) return {text};
  const int size = message_size(text.size());
  std::vector<int> sizes(is_root() ? std::size_t(processes_) : 0);
  MPI_Request request = MPI_REQUEST_NULL;
  CHECK_MPI(MPI_Igather(&size, 1, MPI_INT, sizes.data(), 1, MPI_INT, 0, MPI_COMM_WORLD, &request));
  wait_for(request);
  const std::vector<int> offsets = offsets_of(sizes);
  std::string all(std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}), '\0');
  CHECK_MPI(MPI_Igatherv(text.data(), size, MPI_CHAR, all.data(), sizes.data(), offsets.data(),
                         MPI_CHAR, 0, MPI_COMM_WORLD, &request));
  wait_for(request);
  std::vector<std::string> texts;
  for (std::size_t p = 0; p < sizes.size(); ++p) {
    texts.push_back(all.substr(std::size_t(offsets[p]), std::size_t(sizes[p])));
  }
  return texts;
}

int World::max(int value) {
  if (!mpi_) return value;
  MPI_Request request = MPI_REQUEST_NULL;
  CHECK_MPI(MPI_Iallreduce(MPI_IN_PLACE, &value, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD, &request));
  wait_for(request);
  return value;
}

void World::agree(const std::string& why) {
  // Different reasons may be causes and consequences: nobody here can tell.
  std::string all;
  for (const std::string& reason : gather(why)) {
    if (all.find(reason) == std::string::npos) all += (all.empty() ? "" : "; ") + reason;
  }
  all = broadcast(all);
  if (!all.empty()) throw Unavailable(all);
}

void World::abort(int exit_code) {
  std::fflush(nullptr);
  if (mpi_) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

struct Channel::State {
  int processes = 1;
  MPI_Comm comm = MPI_COMM_NULL;  // stays null in a channel of one
  MPI_Request request = MPI_REQUEST_NULL;
  std::vector<std::byte> mine, received;
  std::vector<int> bytes, offsets;
};

namespace {

// Communicators of the first n processes, made once: every process knows the case and so asks
// alike.
MPI_Comm communicator(World& world, int processes) {
  if (processes == 1) return MPI_COMM_NULL;
  static std::map<int, MPI_Comm> made;
  const auto [it, is_new] = made.try_emplace(processes, MPI_COMM_NULL);
  if (is_new) {
    const int color = world.process() < processes ? 0 : MPI_UNDEFINED;
    CHECK_MPI(MPI_Comm_split(MPI_COMM_WORLD, color, world.process(), &it->second));
  }
  return it->second;
}

}  // namespace

Channel::Channel(World& world, int processes) : state_(new State) {
  TP_CHECK(processes >= 1 && processes <= world.processes(), "channel wider than the world");
  state_->processes = processes;
  state_->comm = communicator(world, processes);
}
Channel::~Channel() {
  if (state_->request != MPI_REQUEST_NULL) (void)state_.release();
}

void Channel::start(std::vector<std::byte> mine, std::vector<int> bytes) {
  State& s = *state_;
  TP_CHECK(s.request == MPI_REQUEST_NULL && int(bytes.size()) == s.processes, "channel is busy");
  s.offsets = offsets_of(bytes);
  s.mine = std::move(mine);
  if (s.comm == MPI_COMM_NULL) {
    s.received = s.mine;
    return;
  }
  s.bytes = std::move(bytes);
  s.received.resize(std::size_t(s.offsets.back()) + std::size_t(s.bytes.back()));
  int me = 0;
  CHECK_MPI(MPI_Comm_rank(s.comm, &me));
  TP_CHECK(int(s.mine.size()) == s.bytes[std::size_t(me)], "a process contributes another size");
  CHECK_MPI(MPI_Iallgatherv(s.mine.data(), s.bytes[std::size_t(me)], MPI_BYTE, s.received.data(),
                            s.bytes.data(), s.offsets.data(), MPI_BYTE, s.comm, &s.request));
}

bool Channel::test() {
  if (state_->request == MPI_REQUEST_NULL) return true;
  int done = 0;
  CHECK_MPI(MPI_Test(&state_->request, &done, MPI_STATUS_IGNORE));
  return done != 0;
}

const std::vector<std::byte>& Channel::received() const { return state_->received; }

}  // namespace tp

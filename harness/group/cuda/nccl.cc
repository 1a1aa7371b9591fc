#include "harness/group/cuda/nccl.h"

#include <fmt/format.h>

#include "harness/base/check.h"

#if TP_HAVE_NCCL

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <nccl.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "harness/device/cuda/check.h"
#include "harness/device/cuda/queue.h"

namespace tp {

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kConnectLimit{20};
constexpr std::chrono::milliseconds kAbortLimit{500};

// NCCL's functions, found when the program runs: without NCCL it runs as well, on one GPU.
struct Library {
  decltype(&ncclGetVersion) get_version;
  decltype(&ncclGetUniqueId) get_unique_id;
  decltype(&ncclCommInitRankConfig) init;
  decltype(&ncclCommGetAsyncError) async_error;
  decltype(&ncclCommAbort) abort;
  decltype(&ncclGetErrorString) error_string;
  decltype(&ncclGetLastError) last_error;
  decltype(&ncclGroupStart) group_start;
  decltype(&ncclGroupEnd) group_end;
  decltype(&ncclSend) send;
  decltype(&ncclRecv) receive;

  Library() {
    // Multicast is of no use here, and on shared hosts it can take the GPUs out of service.
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw Unavailable(
          fmt::format("NCCL cannot be loaded ({}); without it, --group mpi stages collectives "
                      "through the host",
                      dlerror()));
    }
    const auto find = [&](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) throw Unavailable(fmt::format("this libnccl.so.2 has no {}", name));
    };
    find(get_version, "ncclGetVersion");
    find(get_unique_id, "ncclGetUniqueId");
    find(init, "ncclCommInitRankConfig");
    find(async_error, "ncclCommGetAsyncError");
    find(abort, "ncclCommAbort");
    find(error_string, "ncclGetErrorString");
    find(last_error, "ncclGetLastError");
    find(group_start, "ncclGroupStart");
    find(group_end, "ncclGroupEnd");
    find(send, "ncclSend");
    find(receive, "ncclRecv");
  }
};

const Library& nccl() {
  static const Library library;
  return library;
}

// The communicator never blocks: what NCCL begins is asked for until it is done.
class NcclLink final : public DeviceLink {
 public:
  NcclLink(int process, int processes, const ncclUniqueId& id) : process_(process) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    const ncclResult_t begun = nccl().init(&comm_, processes, id, process, &config);
    if (begun != ncclSuccess && begun != ncclInProgress) refuse(begun);
    const auto until = Clock::now() + kConnectLimit;
    wait_until_done(processes, until);
    first_exchange(processes, until);
  }

  void all_gather(Stream& stream, const void* mine, void* all,
                  const std::vector<std::size_t>& bytes, const std::string& what) override {
    stream.enqueue(std::make_unique<Exchange>(*this, stream, mine, all, bytes, what));
  }

  // It also waits for the GPU, which may never be done: then it is left behind.
  void abort() override {
    if (comm_ == nullptr) return;
    cuda::lose_device();
    int device = 0;
    cudaGetDevice(&device);
    const auto done = std::make_shared<std::atomic<bool>>(false);
    std::thread([comm = std::exchange(comm_, nullptr), device, done] {
      cudaSetDevice(device);
      nccl().abort(comm);
      *done = true;
    }).detach();
    const auto until = Clock::now() + kAbortLimit;
    while (!*done && Clock::now() < until)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  void wait_until_done(int processes, Clock::time_point until) const {
    for (ncclResult_t state = this->state(); state != ncclSuccess; state = this->state()) {
      if (state != ncclInProgress) refuse(state);
      give_up_after(until, processes);
    }
  }
  void give_up_after(Clock::time_point until, int processes) const {
    if (Clock::now() > until) {
      throw Unavailable(fmt::format("NCCL did not connect {} processes in {} s", processes,
                                    kConnectLimit.count()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  // The first one connects the GPUs, which takes so long that no case should have to pay for it.
  void first_exchange(int processes, Clock::time_point until) const {
    const std::vector<std::size_t> bytes(std::size_t(processes), 1);
    std::byte* memory = nullptr;
    cudaStream_t stream = nullptr;
    cuda::check(cudaMalloc(&memory, std::size_t(processes) + 1), "cudaMalloc");
    cuda::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    const ncclResult_t begun = begin_all_gather(memory, memory + 1, bytes, stream);
    if (begun != ncclSuccess && begun != ncclInProgress) refuse(begun);
    wait_until_done(processes, until);
    while (cuda::query(stream) == cudaErrorNotReady) give_up_after(until, processes);
    cuda::check(cudaStreamSynchronize(stream), "NCCL");
    cudaStreamDestroy(stream);
    cudaFree(memory);
  }

  // Everybody's bytes to everybody, on a stream; begun, and done when state() says so.
  ncclResult_t begin_all_gather(const std::byte* mine, std::byte* all,
                                const std::vector<std::size_t>& bytes, cudaStream_t stream) const {
    const Library& n = nccl();
    const auto me = std::size_t(process_);
    ncclResult_t result = n.group_start();
    std::size_t at = 0;
    for (std::size_t p = 0; p < bytes.size(); at += bytes[p++]) {
      if (p == me) {
        cuda::check(cudaMemcpyAsync(all + at, mine, bytes[p], cudaMemcpyDeviceToDevice, stream),
                    "NCCL");
        continue;
      }
      for (const ncclResult_t r :
           {n.send(mine, bytes[me], ncclUint8, int(p), comm_, stream),
            n.receive(all + at, bytes[p], ncclUint8, int(p), comm_, stream)}) {
        if (r != ncclSuccess && r != ncclInProgress) result = r;
      }
    }
    const ncclResult_t ended = n.group_end();
    return result != ncclSuccess && result != ncclInProgress ? result : ended;
  }

  // One exchange: handed to NCCL, which takes it in its own time to hand it to the GPU.
  class Exchange final : public Work {
   public:
    Exchange(NcclLink& link, Stream& stream, const void* mine, void* all,
             std::vector<std::size_t> bytes, std::string what)
        : link_(link),
          queue_(static_cast<cuda::Queue&>(stream.device_queue())),
          mine_(static_cast<const std::byte*>(mine)),
          all_(static_cast<std::byte*>(all)),
          bytes_(std::move(bytes)),
          what_("NCCL in " + std::move(what)) {}

    // Dropped while NCCL is about to hand it to the GPU, which nobody can take back.
    ~Exchange() override {
      if (begun_ && !handed_over_) cuda::lose_device();
    }

    Progress step(Random&) override {
      queue_.check();
      const ncclResult_t state =
          begun_ ? link_.state() : link_.begin_all_gather(mine_, all_, bytes_, queue_.stream());
      begun_ = true;
      if (state == ncclInProgress) return Progress::spun;
      if (state != ncclSuccess) {
        cuda::lose_device();
        throw Fault{Outcome::Crash, fmt::format("{}: {}", what_, link_.sentence(state)), -1,
                    /*of_others=*/true};
      }
      handed_over_ = true;
      queue_.submit(what_, cuda::Kind::waits_for_others, [](cudaStream_t) {});
      return Progress::done;
    }
    std::string_view name() const override { return what_; }
    std::string describe() const override { return "waits for " + what_; }
    bool waits_for_others() const override { return true; }

   private:
    NcclLink& link_;
    cuda::Queue& queue_;
    const std::byte* mine_;
    std::byte* all_;
    std::vector<std::size_t> bytes_;
    std::string what_;
    bool begun_ = false, handed_over_ = false;
  };

  ncclResult_t state() const {
    ncclResult_t state = ncclInProgress;
    const ncclResult_t asked = nccl().async_error(comm_, &state);
    return asked == ncclSuccess ? state : asked;
  }
  std::string sentence(ncclResult_t result) const {
    const char* last = comm_ != nullptr ? nccl().last_error(comm_) : nullptr;
    return fmt::format("{}{}{}", nccl().error_string(result), last && *last ? ": " : "",
                       last ? last : "");
  }
  [[noreturn]] void refuse(ncclResult_t result) const {
    throw Unavailable("NCCL cannot connect the GPUs: " + sentence(result));
  }

  int process_;
  ncclComm_t comm_ = nullptr;
};

}  // namespace

Nccl connect_nccl(World& world) {
  std::string why;
  // Everybody looks for the library before anybody waits for the others in it.
  std::string id_bytes;
  try {
    nccl();
    ncclUniqueId id{};
    if (world.is_root() && nccl().get_unique_id(&id) != ncclSuccess)
      throw Unavailable("NCCL cannot make an id for the group");
    id_bytes.assign(id.internal, sizeof(id.internal));
  } catch (const Unavailable& e) {
    why = e.what();
  }
  world.agree(why);
  id_bytes = world.broadcast(id_bytes);
  ncclUniqueId id{};
  std::memcpy(id.internal, id_bytes.data(), sizeof(id.internal));
  Nccl connected;
  try {
    connected.link = std::make_unique<NcclLink>(world.process(), world.processes(), id);
  } catch (const Unavailable& e) {
    why = e.what();
  } catch (const Fault& e) {
    why = e.what;
  }
  world.agree(why);
  int version = 0;
  nccl().get_version(&version);
  connected.version =
      fmt::format("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100);
  return connected;
}

}  // namespace tp

#else

namespace tp {

Nccl connect_nccl(World&) {
  throw Unavailable(
      "this build has no NCCL (there was no nccl.h); --group mpi stages collectives through the "
      "host");
}

}  // namespace tp

#endif

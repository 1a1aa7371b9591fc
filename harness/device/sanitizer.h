#pragma once
// Which sanitizer this build has. TP_TSAN also holds in the files that are themselves compiled
// without it (see CMakeLists.txt): they tell TSan by hand what a fiber is and what happens before
// what.

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define TP_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TP_ASAN 1
#endif
#if __has_feature(thread_sanitizer) && !defined(TP_TSAN)
#define TP_TSAN 1
#endif
#endif
#ifndef TP_ASAN
#define TP_ASAN 0
#endif
#ifndef TP_TSAN
#define TP_TSAN 0
#endif

#if TP_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if TP_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace tp {

inline constexpr bool kAsan = TP_ASAN;
inline constexpr bool kTsan = TP_TSAN;

// What the current thread of execution did before release(clock) happens before whatever another
// one does after acquire(clock).
inline void release([[maybe_unused]] void* clock) {
#if TP_TSAN
  __tsan_release(clock);
#endif
}
inline void acquire([[maybe_unused]] void* clock) {
#if TP_TSAN
  __tsan_acquire(clock);
#endif
}

// For its lifetime TSan overlooks what the current thread of execution allocates, frees, reads and
// writes: the emulator's own doing on behalf of kernel threads.
class Overlooked {
 public:
  Overlooked() {
#if TP_TSAN
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Overlooked() {
#if TP_TSAN
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  Overlooked(const Overlooked&) = delete;
  Overlooked& operator=(const Overlooked&) = delete;
};

// Memory that instrumented code must not touch, and may touch again.
inline void fence_off([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#if TP_ASAN
  __asan_poison_memory_region(begin, bytes);
#endif
}
inline void open_up([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#if TP_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

}  // namespace tp

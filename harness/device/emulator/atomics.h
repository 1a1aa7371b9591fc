#pragma once
// CUDA's atomics, fences and the named accesses to memory that others use at the same time. Each is
// a point where the thread yields, so that spinning on such memory makes progress; each is a true
// atomic, so that TSan takes it for one. The order they give is CUDA's: none, but for acquire,
// release, fences.

#include <cstdint>
#include <type_traits>

#include "harness/device/emulator/peer_stores.h"
#include "harness/device/emulator/thread.h"

namespace tp::emulator {

template <typename T>
concept Word = sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8;

template <Word T>
T load(const volatile T* address, int order, const char* what, Where where) {
  yield(what, where);
  T value;
  __atomic_load(const_cast<const T*>(address), &value, order);
  after_load(const_cast<const T*>(address));
  return value;
}
template <Word T>
void store(volatile T* address, T value, int order, const char* what, Where where) {
  yield(what, where);
  before_store(const_cast<T*>(address));
  __atomic_store(const_cast<T*>(address), &value, order);
}

// The old value, which change(old) replaces.
template <typename T, typename F>
T update(T* address, F change, const char* what, Where where) {
  yield(what, where);
  before_store(address);
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T fresh = change(old);
  while (!__atomic_compare_exchange(address, &old, &fresh, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
    fresh = change(old);
  }
  after_load(address);
  return old;
}

}  // namespace tp::emulator

#define TP_ATOMIC(NAME, TYPE, EXPRESSION)                                            \
  inline TYPE NAME(TYPE* address, TYPE value, tp::Where where = tp::Where::here()) { \
    return tp::emulator::update(                                                     \
        address, [&](TYPE old) -> TYPE { return EXPRESSION; }, #NAME, where);        \
  }
// The types are those CUDA has.
TP_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))
TP_ATOMIC(atomicAdd, unsigned, old + value)
TP_ATOMIC(atomicAdd, unsigned long long, old + value)
TP_ATOMIC(atomicAdd, float, old + value)
TP_ATOMIC(atomicMax, int, old < value ? value : old)
TP_ATOMIC(atomicMax, unsigned, old < value ? value : old)
TP_ATOMIC(atomicMax, unsigned long long, old < value ? value : old)
TP_ATOMIC(atomicMin, int, value < old ? value : old)
TP_ATOMIC(atomicMin, unsigned, value < old ? value : old)
TP_ATOMIC(atomicMin, unsigned long long, value < old ? value : old)
TP_ATOMIC(atomicExch, int, (void(old), value))
TP_ATOMIC(atomicExch, unsigned, (void(old), value))
TP_ATOMIC(atomicExch, unsigned long long, (void(old), value))
TP_ATOMIC(atomicExch, float, (void(old), value))
#undef TP_ATOMIC

#define TP_ATOMIC_CAS(TYPE)                                                      \
  inline TYPE atomicCAS(TYPE* address, TYPE expected, TYPE value,                \
                        tp::Where where = tp::Where::here()) {                   \
    const auto change = [&](TYPE old) { return old == expected ? value : old; }; \
    return tp::emulator::update(address, change, "atomicCAS", where);            \
  }
TP_ATOMIC_CAS(int)
TP_ATOMIC_CAS(unsigned)
TP_ATOMIC_CAS(unsigned long long)
#undef TP_ATOMIC_CAS

inline void __threadfence() { tp::emulator::fence(); }
inline void __threadfence_system() { tp::emulator::fence(); }
inline void __threadfence_block() { tp::emulator::fence(); }

namespace tp {

// Accesses that are never cached or moved, without any order between them and others.
template <typename T>
T load_volatile(const T* address, Where where = Where::here()) {
  return emulator::load(address, __ATOMIC_RELAXED, "load_volatile", where);
}
template <typename T>
void store_volatile(T* address, std::type_identity_t<T> value, Where where = Where::here()) {
  emulator::store(address, value, __ATOMIC_RELAXED, "store_volatile", where);
}

// A flag between blocks or ranks: who sees the stored value sees everything before the store.
template <typename T>
T load_acquire(const T* address, Where where = Where::here()) {
  return emulator::load(address, __ATOMIC_ACQUIRE, "load_acquire", where);
}
template <typename T>
void store_release(T* address, std::type_identity_t<T> value, Where where = Where::here()) {
  emulator::deliver_all(*emulator::running->block);
  emulator::store(address, value, __ATOMIC_RELEASE, "store_release", where);
}

// Data in another rank's memory: a flag must say when they are there. What is stored arrives late
// (peer_stores.h).
template <typename T>
T peer_load(const T* address, Where where = Where::here()) {
  emulator::yield("peer_load", where);
  return *address;
}
template <typename T>
requires emulator::Word<T>
void peer_store(T* address, std::type_identity_t<T> value, Where where = Where::here()) {
  emulator::yield("peer_store", where);
  emulator::store_late(address, &value, sizeof(T));
}

}  // namespace tp

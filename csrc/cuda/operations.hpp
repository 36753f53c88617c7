// Operations of a device that C++ has no words for, and what they are on the host: bytes moved about in words, fused
// multiply-adds, asynchronous copies to shared memory, what the threads of a warp tell each other.
#pragma once

#include <cmath>

#include "cuda/launch.hpp"

namespace paramdelta::cuda {

#if defined(__CUDACC__)

// Byte i is that of the eight bytes of `low` and `high` which digit i of `places` numbers.
PARAMDELTA_DEVICE std::uint32_t permuted_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t places) {
  return __byte_perm(low, high, places);
}
PARAMDELTA_DEVICE double double_of_upper(std::uint32_t upper) { return __hiloint2double(static_cast<int>(upper), 0); }

// a · b + c, rounded once.
PARAMDELTA_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
PARAMDELTA_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The larger one of a ≥ 0 and |b|, neither of which is NaN.
PARAMDELTA_DEVICE float larger_magnitude(float a, float b) { return fmaxf(a, fabsf(b)); }

// Copies to shared memory that go on by themselves; zeros instead where `is` is false. A thread starts some, ends the
// group, and waits until at most `later` groups (0 or 1) that it ended are under way.
PARAMDELTA_DEVICE void copy_sixteen(Sixteen* to, const unsigned char* from, bool is) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(is ? 16 : 0)
      : "memory");
}
PARAMDELTA_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
PARAMDELTA_DEVICE void await_copies(std::uint32_t later) {
  if (later == 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
}

// For a warp together, all of whose threads are here.
PARAMDELTA_DEVICE void warp_max(int thread, std::uint32_t* at, std::uint32_t value) {
  value = __reduce_max_sync(0xFFFFFFFFu, value);
  if (thread % 32 == 0 && value > seen(at)) atomic_max(at, value);
}
PARAMDELTA_DEVICE void warp_or(int thread, std::uint32_t* at, std::uint32_t bits) {
  bits = __reduce_or_sync(0xFFFFFFFFu, bits);
  if (thread % 32 == 0 && bits != 0) atomic_or(at, bits);
}
PARAMDELTA_DEVICE void warp_add(int thread, double* at, double value) {
  PARAMDELTA_UNROLL
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, step);
  if (thread % 32 == 0 && value != 0.0) atomic_add(at, value);
}

// What a thread keeps from phase to phase, in registers.
template <class T, int kThreads>
struct PerThread {
  T value;
  PARAMDELTA_DEVICE T& of(int) { return value; }
};

#else

inline std::uint32_t permuted_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t places) {
  const std::uint64_t both = static_cast<std::uint64_t>(high) << 32 | low;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<std::uint32_t>(both >> (8 * (places >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  return result;
}
inline double double_of_upper(std::uint32_t upper) { return bits_as<double>(static_cast<std::uint64_t>(upper) << 32); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float larger_magnitude(float a, float b) { return std::fabs(b) > a ? std::fabs(b) : a; }
inline void copy_sixteen(Sixteen* to, const unsigned char* from, bool is) {
  if (is)
    std::memcpy(to, from, sizeof(*to));
  else
    *to = Sixteen{};
}
inline void end_copies() {}
inline void await_copies(std::uint32_t) {}
inline void warp_max(int, std::uint32_t* at, std::uint32_t value) { atomic_max(at, value); }
inline void warp_or(int, std::uint32_t* at, std::uint32_t bits) { atomic_or(at, bits); }
inline void warp_add(int, double* at, double value) { atomic_add(at, value); }

template <class T, int kThreads>
struct PerThread {
  std::vector<T> values = std::vector<T>(kThreads);
  T& of(int thread) { return values[static_cast<std::size_t>(thread)]; }
};

#endif

}  // namespace paramdelta::cuda

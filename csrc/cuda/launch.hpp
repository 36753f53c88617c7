// How kernels are written: once, as functions of a block, compiled by nvcc for the GPU and by any C++ compiler for the
// host, where tests run the same bodies. A body is a sequence of phases; what all threads do in a phase is handed to
// Block::each, which ends with a barrier. What threads share lies in Block::shared or in memory, and they change it
// with the atomic operations below. Only this file and operations.hpp differ between the two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/codec.hpp"
#include "cuda/device.hpp"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define PARAMDELTA_DEVICE __device__ __forceinline__
#define PARAMDELTA_DEVICE_CALL __device__ __noinline__
#define PARAMDELTA_UNROLL _Pragma("unroll")
#define PARAMDELTA_ROLLED _Pragma("unroll 1")
#else
#include <vector>
#define PARAMDELTA_DEVICE inline
#define PARAMDELTA_DEVICE_CALL inline  // what is rare: a call, so that it is compiled once
#define PARAMDELTA_UNROLL
#define PARAMDELTA_ROLLED
#endif

namespace paramdelta::cuda {

// Sixteen bytes that are read and written at once, from an address that is a multiple of sixteen.
struct alignas(16) Sixteen {
  std::uint32_t words[4];
};

#if defined(__CUDACC__)

struct Block {
  std::uint32_t index;
  unsigned char* shared;
  int threads;

  // f(thread) for every thread, then a barrier.
  template <class F>
  PARAMDELTA_DEVICE void each(F f) {
    spread(f);
    __syncthreads();
  }
  // The same without a barrier: the next phase must not touch what this one does, but for what is a thread's own.
  template <class F>
  PARAMDELTA_DEVICE void spread(F f) {
    f(static_cast<int>(threadIdx.x));
  }
};

PARAMDELTA_DEVICE void atomic_add(std::uint64_t* at, std::uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
PARAMDELTA_DEVICE void atomic_add(double* at, double value) { atomicAdd(at, value); }
PARAMDELTA_DEVICE void atomic_or(std::uint32_t* at, std::uint32_t bits) { atomicOr(at, bits); }
PARAMDELTA_DEVICE void atomic_max(std::uint32_t* at, std::uint32_t value) { atomicMax(at, value); }
PARAMDELTA_DEVICE std::uint32_t seen(const std::uint32_t* at) {
  return *static_cast<const volatile std::uint32_t*>(at);
}

// Weights pass through once: they are marked to leave the cache first.
PARAMDELTA_DEVICE Sixteen load_sixteen(const void* from) {
  const uint4 v = __ldcs(static_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
PARAMDELTA_DEVICE Sixteen load_eight(const void* from) {
  const uint2 v = __ldcs(static_cast<const uint2*>(from));
  return {{v.x, v.y, 0, 0}};
}
PARAMDELTA_DEVICE void store_sixteen(void* to, const Sixteen& v) {
  __stcs(static_cast<uint4*>(to), make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]));
}

extern __shared__ __align__(16) unsigned char shared_memory[];

// How many blocks of a kernel a processor is to have room for, which bounds a thread's registers: where it says so.
template <class Kernel, class = void>
struct BlocksPerProcessor {
  static constexpr int value = 1;
};
template <class Kernel>
struct BlocksPerProcessor<Kernel, std::void_t<decltype(Kernel::kBlocksPerProcessor)>> {
  static constexpr int value = Kernel::kBlocksPerProcessor;
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, BlocksPerProcessor<Kernel>::value)
    run(const __grid_constant__ typename Kernel::Params params) {
  Block block{blockIdx.x, shared_memory, Kernel::kThreads};
  Kernel::block(block, params);
}

template <class Kernel>
void launch(std::uint64_t blocks, std::size_t shared_bytes, const typename Kernel::Params& params, Stream stream) {
  if (blocks == 0) return;
  if (blocks > 0x7FFFFFFFu) throw std::invalid_argument("a launch has at most 2^31 - 1 blocks: merge in parts");
  if (shared_bytes > 48 * 1024)
    check(
        cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "asking for shared memory");
  run<Kernel>
      <<<static_cast<unsigned>(blocks), Kernel::kThreads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
          params);
  check(cudaGetLastError(), "launching a kernel");
}

#else

struct Block {
  std::uint32_t index;
  unsigned char* shared;
  int threads;
  int phase = 0;

  // Threads take turns, forwards in one phase and backwards in the next: no order of theirs may matter.
  template <class F>
  void each(F f) {
    const bool forwards = phase++ % 2 == 0;
    for (int i = 0; i < threads; ++i) f(forwards ? i : threads - 1 - i);
  }
  template <class F>
  void spread(F f) {
    each(f);
  }
};

inline void atomic_add(std::uint64_t* at, std::uint64_t value) { *at += value; }
inline void atomic_add(double* at, double value) { *at = *at + value; }
inline void atomic_or(std::uint32_t* at, std::uint32_t bits) { *at |= bits; }
inline void atomic_max(std::uint32_t* at, std::uint32_t value) {
  if (value > *at) *at = value;
}
inline std::uint32_t seen(const std::uint32_t* at) { return *at; }

inline Sixteen load_sixteen(const void* from) { return *static_cast<const Sixteen*>(from); }
inline Sixteen load_eight(const void* from) {
  Sixteen v{};
  std::memcpy(&v, from, 8);
  return v;
}
inline void store_sixteen(void* to, const Sixteen& v) { *static_cast<Sixteen*>(to) = v; }

template <class Kernel>
void launch(std::uint64_t blocks, std::size_t shared_bytes, const typename Kernel::Params& params, Stream) {
  std::vector<Sixteen> shared(shared_bytes / sizeof(Sixteen) + 1);
  for (std::uint64_t i = blocks; i-- > 0;) {
    // What a block finds in shared memory is of no account.
    std::memset(static_cast<void*>(shared.data()), 0xA5, shared.size() * sizeof(Sixteen));
    Block block{static_cast<std::uint32_t>(i), reinterpret_cast<unsigned char*>(shared.data()), Kernel::kThreads};
    Kernel::block(block, params);
  }
}

#endif

PARAMDELTA_DEVICE bool is_aligned(const void* at, std::size_t to) {
  return reinterpret_cast<std::uintptr_t>(at) % to == 0;
}

// kBytes bytes at an address that may be a multiple of nothing, or of an element's size only.
template <class Code, int kBytes>
PARAMDELTA_DEVICE_CALL Sixteen gather_bytes(const unsigned char* from) {
  Code codes[16 / sizeof(Code)] = {};
  constexpr int count = kBytes / static_cast<int>(sizeof(Code));
  if (is_aligned(from, sizeof(Code))) {
    PARAMDELTA_UNROLL
    for (int i = 0; i < count; ++i) codes[i] = reinterpret_cast<const Code*>(from)[i];
  } else {
    PARAMDELTA_UNROLL
    for (int i = 0; i < count; ++i)
      std::memcpy(codes + i, from + static_cast<std::size_t>(i) * sizeof(Code), sizeof(Code));
  }
  Sixteen all;
  std::memcpy(&all, codes, 16);
  return all;
}

template <class Code, int kBytes>
PARAMDELTA_DEVICE_CALL void scatter_bytes(const Sixteen& all, unsigned char* to) {
  Code codes[16 / sizeof(Code)];
  std::memcpy(codes, &all, 16);
  constexpr int count = kBytes / static_cast<int>(sizeof(Code));
  if (is_aligned(to, sizeof(Code))) {
    PARAMDELTA_UNROLL
    for (int i = 0; i < count; ++i) reinterpret_cast<Code*>(to)[i] = codes[i];
  } else {
    PARAMDELTA_UNROLL
    for (int i = 0; i < count; ++i)
      std::memcpy(to + static_cast<std::size_t>(i) * sizeof(Code), codes + i, sizeof(Code));
  }
}

// kCount consecutive codes, of 8 bytes or a multiple of 16 together, in as few accesses as the address allows.
template <int kCount, class Code>
PARAMDELTA_DEVICE void load_codes(const unsigned char* from, Code* to) {
  constexpr int bytes = kCount * static_cast<int>(sizeof(Code));
  if constexpr (bytes == 8) {
    Sixteen v;
    if (is_aligned(from, 8))
      v = load_eight(from);
    else
      v = gather_bytes<Code, 8>(from);
    std::memcpy(to, &v, 8);
  } else {
    const bool aligned = is_aligned(from, 16);
    PARAMDELTA_UNROLL
    for (int i = 0; i < bytes / 16; ++i) {
      const Sixteen v = aligned ? load_sixteen(from + 16 * i) : gather_bytes<Code, 16>(from + 16 * i);
      std::memcpy(reinterpret_cast<unsigned char*>(to) + 16 * i, &v, 16);
    }
  }
}

template <int kCount, class Code>
PARAMDELTA_DEVICE void store_codes(const Code* from, unsigned char* to) {
  constexpr int bytes = kCount * static_cast<int>(sizeof(Code));
  if constexpr (bytes == 8) {
    Sixteen v{};
    std::memcpy(&v, from, 8);
    if (is_aligned(to, 8))
      *reinterpret_cast<std::uint64_t*>(to) = static_cast<std::uint64_t>(v.words[1]) << 32 | v.words[0];
    else
      scatter_bytes<Code, 8>(v, to);
  } else {
    const bool aligned = is_aligned(to, 16);
    PARAMDELTA_UNROLL
    for (int i = 0; i < bytes / 16; ++i) {
      Sixteen v;
      std::memcpy(&v, reinterpret_cast<const unsigned char*>(from) + 16 * i, 16);
      if (aligned)
        store_sixteen(to + 16 * i, v);
      else
        scatter_bytes<Code, 16>(v, to + 16 * i);
    }
  }
}

}  // namespace paramdelta::cuda

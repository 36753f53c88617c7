// The roofline of a merge: loops that read three streams, combine them by xor and write one with non-temporal
// stores, and do nothing else. What the best of them reaches is what memory gives; benchmarks/bound.py drives them.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t kLine = 64;

struct Streams {
  const std::uint8_t* post;
  const std::uint8_t* base;
  const std::uint8_t* new_base;
  std::uint8_t* out;  // aligned to a cache line
};

using Loop = void (*)(const Streams&, std::size_t first, std::size_t last);  // a range in bytes, whole blocks

#if defined(__x86_64__)

#define LOAD256(at) _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
#define LOAD512(at) _mm512_loadu_si512(at)

// Lines is the number of cache lines in one step; Ahead the distance of the software prefetch in bytes, 0 for none.
template <std::size_t Lines, std::size_t Ahead>
__attribute__((target("avx2"))) void xor256(const Streams& s, std::size_t first, std::size_t last) {
  for (std::size_t at = first; at < last; at += Lines * kLine) {
#pragma GCC unroll 16
    for (std::size_t k = 0; k < Lines; ++k) {
      const std::size_t i = at + k * kLine;
      if (Ahead) {
        __builtin_prefetch(s.post + i + Ahead);
        __builtin_prefetch(s.base + i + Ahead);
        __builtin_prefetch(s.new_base + i + Ahead);
      }
      for (std::size_t j = i; j < i + kLine; j += 32) {
        const __m256i x =
            _mm256_xor_si256(_mm256_xor_si256(LOAD256(s.post + j), LOAD256(s.base + j)), LOAD256(s.new_base + j));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(s.out + j), x);
      }
    }
  }
  _mm_sfence();
}

template <std::size_t Lines, std::size_t Ahead>
__attribute__((target("avx512f"))) void xor512(const Streams& s, std::size_t first, std::size_t last) {
  for (std::size_t at = first; at < last; at += Lines * kLine) {
#pragma GCC unroll 16
    for (std::size_t k = 0; k < Lines; ++k) {
      const std::size_t i = at + k * kLine;
      if (Ahead) {
        __builtin_prefetch(s.post + i + Ahead);
        __builtin_prefetch(s.base + i + Ahead);
        __builtin_prefetch(s.new_base + i + Ahead);
      }
      const __m512i x =
          _mm512_xor_si512(_mm512_xor_si512(LOAD512(s.post + i), LOAD512(s.base + i)), LOAD512(s.new_base + i));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(s.out + i), x);
    }
  }
  _mm_sfence();
}

bool has_avx2() { return __builtin_cpu_supports("avx2"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }

#else

// Elsewhere: what the compiler makes of a plain loop. Ordinary stores, so the bound is a lower one.
template <std::size_t Lines>
void xor_plain(const Streams& s, std::size_t first, std::size_t last) {
  for (std::size_t at = first; at < last; at += 8) {
    std::uint64_t p, b, n;
    std::memcpy(&p, s.post + at, 8);
    std::memcpy(&b, s.base + at, 8);
    std::memcpy(&n, s.new_base + at, 8);
    p ^= b ^ n;
    std::memcpy(s.out + at, &p, 8);
  }
}

#endif

bool always() { return true; }

struct Variant {
  const char* name;
  bool (*runs_here)();
  Loop loop;
};

const Variant kVariants[] = {
#if defined(__x86_64__)
    {"256-bit, 1 line", has_avx2, xor256<1, 0>},
    {"256-bit, 4 lines", has_avx2, xor256<4, 0>},
    {"256-bit, 8 lines", has_avx2, xor256<8, 0>},
    {"256-bit, 1 line, prefetch 512", has_avx2, xor256<1, 512>},
    {"256-bit, 4 lines, prefetch 1024", has_avx2, xor256<4, 1024>},
    {"512-bit, 1 line", has_avx512, xor512<1, 0>},
    {"512-bit, 4 lines", has_avx512, xor512<4, 0>},
    {"512-bit, 8 lines", has_avx512, xor512<8, 0>},
    {"512-bit, 1 line, prefetch 512", has_avx512, xor512<1, 512>},
    {"512-bit, 4 lines, prefetch 1024", has_avx512, xor512<4, 1024>},
    {"512-bit, 4 lines, prefetch 4096", has_avx512, xor512<4, 4096>},
#else
    {"plain", always, xor_plain<1>},
#endif
};
constexpr int kCount = sizeof(kVariants) / sizeof(kVariants[0]);
constexpr std::size_t kBlock = 4096;  // ranges are cut at multiples of this; every step above divides it

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

void pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a hint: failure changes nothing but the spread
}

}  // namespace

extern "C" {

int bound_variants() { return kCount; }

const char* bound_name(int variant) { return kVariants[variant].name; }

int bound_runs_here(int variant) {
  (void)always;
  return kVariants[variant].runs_here() ? 1 : 0;
}

// Returns the seconds from the moment all threads are ready until the last is done. `bytes` of each stream are
// used, cut down to whole blocks of 4096; `out` must be aligned to 64 bytes. The caller owns the memory.
double bound_run(int variant, int threads, const std::uint8_t* post, const std::uint8_t* base,
                 const std::uint8_t* new_base, std::uint8_t* out, std::size_t bytes) {
  using Clock = std::chrono::steady_clock;
  const Streams streams{post, base, new_base, out};
  const Loop loop = kVariants[variant].loop;
  const std::size_t blocks = bytes / kBlock;
  const std::vector<int> cpus = allowed_cpus();
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([&, t] {
      if (!cpus.empty()) pin_to(cpus[t % cpus.size()]);
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      loop(streams, blocks * t / threads * kBlock, blocks * (t + 1) / threads * kBlock);
    });
  while (ready.load() < threads) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  for (std::thread& worker : workers) worker.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}
}

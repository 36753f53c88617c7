// Threads for one call: started by it, gone when it returns. None are kept, so a fork or an import meets none.
#pragma once

#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace paramdelta::cpu {

// Cuts fall on multiples of this many elements: the leaves of the norms, and whole cache lines of every type.
inline constexpr std::size_t kCut = 4096;
// What threads take, one piece after the other: small, so that all of them work in one neighbourhood of memory at any
// time (far apart, two threads' eight streams kept closing each other's DRAM rows: half the bandwidth), and so that a
// thread on a busy core takes fewer; large enough that taking one costs nothing. Starting a thread takes as long as
// some 50,000 elements, so less than a piece is not worth one.
inline constexpr std::size_t kPiece = 32 * kCut;

inline std::size_t piece_size(std::size_t count, int threads) { return threads <= 1 ? count : kPiece; }

inline std::size_t pieces_for(std::size_t count, int threads) {
  const std::size_t size = piece_size(count, threads);
  return count == 0 ? 0 : (count + size - 1) / size;
}

// Calls work(worker, step) for every step below `steps`, on at most `threads` threads, of which the caller is worker 0.
// The first exception of any of them is thrown here, after all have ended.
template <class Work>
void for_each_step(std::size_t steps, int threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&](std::size_t worker) {
    try {
      for (std::size_t step = next.fetch_add(1); step < steps; step = next.fetch_add(1)) work(worker, step);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<std::size_t>(threads > 1 ? threads : 1));
  for (std::size_t worker = 1; static_cast<int>(worker) < threads && worker < steps; ++worker) {
    try {
      helpers.emplace_back(run, worker);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run do the rest
    }
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
}

// Calls work(worker, first, count) for pieces that together cover [0, count), likewise.
template <class Work>
void for_each_piece(std::size_t count, int threads, const Work& work) {
  const std::size_t size = piece_size(count, threads);
  for_each_step(pieces_for(count, threads), threads, [&](std::size_t worker, std::size_t piece) {
    const std::size_t first = piece * size;
    work(worker, first, count - first < size ? count - first : size);
  });
}

}  // namespace paramdelta::cpu

// What the emulated runtime keeps: calls that were made and those that are to fail, an error that stays, streams, which
// are threads with a queue, and events.
#pragma once

#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "device.hpp"

namespace emulated {

struct State {
  std::mutex mutex;
  std::map<const void*, std::string> kernels;  // by their host function
  std::map<std::string, std::pair<int, int>> failing;
  std::map<std::string, int> calls;
  std::set<void*> pinned;
  std::set<CUstream_st*> streams;
  std::map<std::uintptr_t, std::size_t> device_bytes;
  std::size_t in_use = 0, most = 0;
  int sticky = cudaSuccess;  // a kernel's error: all calls return it
  std::string text;
  std::uint64_t seed = 1;
};

inline State& state() {
  static State one;
  return one;
}

inline thread_local int last = cudaSuccess;
inline thread_local int current_device = 0;

inline cudaError_t returned(int code) {
  if (code != cudaSuccess) last = code;
  return static_cast<cudaError_t>(code);
}

// Counts a call, and says what it returns before it has done anything.
inline int begin(const char* call) {
  State& s = emulated::state();
  const std::lock_guard lock(s.mutex);
  const int n = ++s.calls[call];
  const auto failing = s.failing.find(call);
  if (failing != s.failing.end() && failing->second.first == n) {
    s.text = "as was asked for";
    return failing->second.second;
  }
  return s.sticky;
}

inline int refused(int code, const std::string& text) {
  State& s = emulated::state();
  const std::lock_guard lock(s.mutex);
  s.text = text;
  return code;
}

}  // namespace emulated

struct CUstream_st {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> work;
  bool busy = false, ends = false;
  std::mt19937_64 draw;
  std::thread thread;

  explicit CUstream_st(std::uint64_t seed) : draw(seed), thread([this] { run(); }) {}
  ~CUstream_st() {
    {
      const std::lock_guard lock(mutex);
      ends = true;
    }
    changed.notify_all();
    thread.join();
  }
  void enqueue(std::function<void()> function) {
    {
      const std::lock_guard lock(mutex);
      work.push_back(std::move(function));
    }
    changed.notify_all();
  }
  void finish() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return work.empty() && !busy; });
  }

 private:
  void run() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return ends || !work.empty(); });
      if (work.empty()) return;
      const auto function = std::move(work.front());
      work.pop_front();
      busy = true;
      lock.unlock();
      // Now and then others go first.
      if (draw() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw() % 200));
      bool skip;
      {
        const std::lock_guard all(emulated::state().mutex);
        skip = emulated::state().sticky != cudaSuccess;
      }
      try {
        if (!skip) function();
      } catch (const emulated::Fault& fault) {
        const std::lock_guard all(emulated::state().mutex);
        emulated::state().sticky = fault.code;
        emulated::state().text = fault.what();
      }
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
};

struct Rounds {
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t recorded = 0, happened = 0;
};

struct CUevent_st {
  std::shared_ptr<Rounds> rounds = std::make_shared<Rounds>();  // a stream may come to it after it is destroyed
};

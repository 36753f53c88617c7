// Memory of a device, page-locked memory of the host, and a queue of copies and launches; on the host, memory and
// memcpy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.hpp"

namespace paramdelta::cuda {

// Device memory that is released with the object. Throws DeviceError.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int device, std::size_t bytes);
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
  int device_ = 0;
};

// The caller's memory, locked into place while the object lives, so that a device copies from and to it by itself.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  PinnedMemory(int device, void* memory, std::size_t bytes);
  PinnedMemory(PinnedMemory&& other) noexcept;
  PinnedMemory& operator=(PinnedMemory&& other) noexcept;
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  ~PinnedMemory();

 private:
  void* memory_ = nullptr;
};

// A stream and an event of its own. Everything is enqueued and returns at once, except finish(), which sleeps until all
// of it is done.
class Queue {
 public:
  Queue() = default;
  explicit Queue(int device);
  Queue(Queue&& other) noexcept;
  Queue& operator=(Queue&& other) noexcept;
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;
  ~Queue();

  Stream stream() const { return stream_; }
  // Between host and device, whichever way.
  void copy(void* to, const void* from, std::size_t bytes) const;
  void clear(void* memory, std::size_t bytes) const;
  void finish() const;

 private:
  Stream stream_ = 0;
  void* event_ = nullptr;
  int device_ = 0;
};

}  // namespace paramdelta::cuda

// The calls of memory.hpp, to the CUDA runtime, or for a build without it on the host.
#include <utility>

#include "cuda/memory.hpp"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <cstdlib>
#include <cstring>
#include <new>
#endif

namespace paramdelta::cuda {
namespace {

#if defined(__CUDACC__)

std::byte* allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), ("allocating " + std::to_string(bytes) + " bytes on the device").c_str());
  return static_cast<std::byte*>(memory);
}
void release(std::byte* memory) { cudaFree(memory); }

void pin(void* memory, std::size_t bytes) {
  check(cudaHostRegister(memory, bytes, cudaHostRegisterDefault),
        ("page-locking " + std::to_string(bytes) + " bytes (ulimit -l may bound them)").c_str());
}
void unpin(void* memory) { cudaHostUnregister(memory); }

#else

std::byte* allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);  // as cudaMalloc aligns
  if (memory == nullptr) throw DeviceError("no memory for " + std::to_string(bytes) + " bytes");
  return static_cast<std::byte*>(memory);
}
void release(std::byte* memory) { std::free(memory); }
void pin(void*, std::size_t) {}
void unpin(void*) {}

#endif

}  // namespace

DeviceMemory::DeviceMemory(int device, std::size_t bytes) : bytes_(bytes), device_(device) {
  const OnDevice current(device);
  data_ = allocate(bytes);
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_), device_(other.device_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) release(data_);
}

PinnedMemory::PinnedMemory(int device, void* memory, std::size_t bytes) {
  const OnDevice current(device);
  pin(memory, bytes);
  memory_ = memory;
}

PinnedMemory::PinnedMemory(PinnedMemory&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}

PinnedMemory& PinnedMemory::operator=(PinnedMemory&& other) noexcept {
  std::swap(memory_, other.memory_);
  return *this;
}

PinnedMemory::~PinnedMemory() {
  if (memory_ != nullptr) unpin(memory_);
}

Queue::Queue(Queue&& other) noexcept
    : stream_(std::exchange(other.stream_, 0)), event_(std::exchange(other.event_, nullptr)), device_(other.device_) {}

Queue& Queue::operator=(Queue&& other) noexcept {
  std::swap(stream_, other.stream_);
  std::swap(event_, other.event_);
  std::swap(device_, other.device_);
  return *this;
}

#if defined(__CUDACC__)

namespace {
cudaStream_t handle(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
}  // namespace

Queue::Queue(int device) : device_(device) {
  const OnDevice current(device);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  stream_ = reinterpret_cast<Stream>(stream);
  cudaEvent_t event = nullptr;
  const cudaError_t code = cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming);
  if (code != cudaSuccess) cudaStreamDestroy(stream);
  check(code, "making an event");
  event_ = event;
}

Queue::~Queue() {
  if (event_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event_));
  if (stream_ != 0) cudaStreamDestroy(handle(stream_));
}

void Queue::copy(void* to, const void* from, std::size_t bytes) const {
  const OnDevice current(device_);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, handle(stream_)), "copying between host and device");
}

void Queue::clear(void* memory, std::size_t bytes) const {
  const OnDevice current(device_);
  check(cudaMemsetAsync(memory, 0, bytes, handle(stream_)), "clearing device memory");
}

void Queue::finish() const {
  const OnDevice current(device_);
  const auto event = static_cast<cudaEvent_t>(event_);
  check(cudaEventRecord(event, handle(stream_)), "recording an event");
  check(cudaEventSynchronize(event), "waiting for the device");
}

#else

Queue::Queue(int device) : device_(device) {}
Queue::~Queue() = default;
void Queue::copy(void* to, const void* from, std::size_t bytes) const { std::memcpy(to, from, bytes); }
void Queue::clear(void* memory, std::size_t bytes) const { std::memset(memory, 0, bytes); }
void Queue::finish() const {}

#endif

}  // namespace paramdelta::cuda

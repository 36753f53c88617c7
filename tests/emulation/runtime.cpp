// CUDA's runtime on the emulated device, as far as the extension calls it: what libcudart_static.a is to a GPU. Streams
// are threads, so that what is enqueued happens later, and beside everything else. Calls are counted, copies of memory
// that is not page-locked among them, and can be made to fail; an error of a kernel stays, as on a GPU.
#include <cstdlib>
#include <cstring>

#include "streams.hpp"

namespace {

using namespace emulated;

cudaStream_t stream_of(cudaStream_t stream) {
  static CUstream_st* const first = new CUstream_st(0);  // the default stream lives as long as the process
  return stream == nullptr ? first : stream;
}

// As freeing memory does.
void finish_all() {
  std::set<CUstream_st*> all;
  {
    const std::lock_guard lock(state().mutex);
    all = state().streams;
  }
  for (CUstream_st* stream : all) stream->finish();
  stream_of(nullptr)->finish();
}

struct Configuration {
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;

int launch(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared, cudaStream_t stream) {
  if (const int code = begin("cudaLaunchKernel"); code != cudaSuccess) return code;
  if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
    return refused(cudaErrorInvalidValue, "a grid of planes");
  std::string name;
  std::uint64_t seed;
  {
    State& s = state();
    const std::lock_guard lock(s.mutex);
    name = s.kernels[function];
    seed = s.seed++;
  }
  try {
    stream_of(stream)->enqueue([=, parameters = emulated::packed(name, arguments)] {
      if (const int code = begin("kernel"); code != cudaSuccess) throw Fault(code, "the device is lost");
      emulated::execute(name, grid.x, block.x, shared, parameters, seed);
    });
  } catch (const Fault& fault) {
    return refused(fault.code, fault.what());
  }
  if (all_are_allowed()) stream_of(stream)->finish();
  return cudaSuccess;
}

// Whether a copy needs memory of the host's that is not page-locked: then CUDA waits for it, and so it is counted.
bool is_pageable(const void* memory, std::size_t bytes) { return bytes != 0 && !emulated::is_allowed(memory, bytes); }

}  // namespace

extern "C" {

// What tests ask of the emulation.
__attribute__((visibility("default"))) void emulated_fail(const char* call, int nth, int code) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.failing[call] = {s.calls[call] + nth, code};
}
__attribute__((visibility("default"))) int emulated_calls(const char* call) {
  State& s = state();
  const std::lock_guard lock(s.mutex);
  return s.calls[call];
}
__attribute__((visibility("default"))) void emulated_reset() {
  finish_all();
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.sticky = cudaSuccess;
  s.failing.clear();
  s.calls.clear();
  s.text.clear();
  s.most = s.in_use;
  last = cudaSuccess;
}
__attribute__((visibility("default"))) std::size_t emulated_memory(int most) {
  return most ? state().most : state().in_use;
}
__attribute__((visibility("default"))) std::size_t emulated_pinned() { return state().pinned.size(); }
__attribute__((visibility("default"))) void emulated_become_host() { allow_all(); }

// Kernels that nobody registers with the runtime, such as Triton's: run at once. Returns 0, or the error's code.
__attribute__((visibility("default"))) int emulated_launch(const char* name, unsigned blocks, unsigned threads,
                                                           std::size_t shared, const void* const* arguments) {
  try {
    emulated::execute(name, blocks, threads, shared, emulated::packed(name, arguments), state().seed++);
    return 0;
  } catch (const Fault& fault) {
    return refused(fault.code, fault.what());
  }
}

// What the host code that nvcc makes calls.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  const std::lock_guard lock(state().mutex);
  state().kernels[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                               cudaStream_t stream) {
  return returned(launch(kernel, grid, block, arguments, shared, stream));
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, std::size_t shared,
                             cudaStream_t stream) {
  return returned(launch(function, grid, block, arguments, shared, stream));
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return returned(static_cast<std::size_t>(value) > emulated::kMostShared
                      ? refused(cudaErrorInvalidValue, "more shared memory than a block can have")
                      : cudaSuccess);
}

// The device. PARAMDELTA_EMULATED_SHARED is how much shared memory a processor has: kernels may ask.
static int shared_bytes() {
  const char* given = std::getenv("PARAMDELTA_EMULATED_SHARED");
  return given == nullptr ? 228 * 1024 : std::atoi(given);
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return returned(begin("cudaGetDeviceCount"));
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "emulated");
  properties->major = 9;
  properties->multiProcessorCount = 2;
  properties->totalGlobalMem = std::size_t{1} << 30;
  properties->sharedMemPerBlockOptin = emulated::kMostShared;
  return returned(begin("cudaGetDeviceProperties"));
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrSingleToDoublePrecisionPerfRatio: return *value = 2, cudaSuccess;
    case cudaDevAttrMultiProcessorCount: return *value = 2, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = shared_bytes(), cudaSuccess;
    default: return returned(refused(cudaErrorInvalidValue, "an attribute that is not known here"));
  }
}
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device != 0) return returned(cudaErrorInvalidDevice);
  current_device = device;
  return returned(begin("cudaSetDevice"));
}
cudaError_t cudaDeviceSynchronize() {
  finish_all();
  return returned(begin("cudaDeviceSynchronize"));
}

// Memory. What a GPU would find there is not zero.
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (const int code = begin("cudaMalloc"); code != cudaSuccess) return returned(code);
  const std::size_t whole = (bytes + 255) / 256 * 256;
  *memory = std::aligned_alloc(256, whole == 0 ? 256 : whole);
  if (*memory == nullptr) return returned(cudaErrorMemoryAllocation);
  std::memset(*memory, 0xA5, whole);
  emulated::allow(*memory, bytes);
  State& s = state();
  const std::lock_guard lock(s.mutex);
  s.device_bytes[reinterpret_cast<std::uintptr_t>(*memory)] = bytes;
  s.in_use += bytes;
  s.most = s.most > s.in_use ? s.most : s.in_use;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  finish_all();
  State& s = state();
  {
    const std::lock_guard lock(s.mutex);
    const auto found = s.device_bytes.find(reinterpret_cast<std::uintptr_t>(memory));
    if (found == s.device_bytes.end()) return returned(cudaErrorInvalidValue);
    s.in_use -= found->second;
    s.device_bytes.erase(found);
  }
  emulated::forbid(memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* memory, std::size_t bytes, unsigned) {
  if (const int code = begin("cudaHostRegister"); code != cudaSuccess) return returned(code);
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (!s.pinned.insert(memory).second) return returned(cudaErrorHostMemoryAlreadyRegistered);
  emulated::allow(memory, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* memory) {
  finish_all();
  State& s = state();
  const std::lock_guard lock(s.mutex);
  if (s.pinned.erase(memory) == 0) return returned(cudaErrorHostMemoryNotRegistered);
  emulated::forbid(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (const int code = begin("cudaMemcpyAsync"); code != cudaSuccess) return returned(code);
  stream_of(stream)->enqueue([=] { std::memmove(to, from, bytes); });
  if (is_pageable(to, bytes) || is_pageable(from, bytes)) {
    begin("pageable");
    stream_of(stream)->finish();
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  int code = begin("cudaMemsetAsync");
  if (code == cudaSuccess && is_pageable(memory, bytes)) code = refused(cudaErrorInvalidValue, "not the device's");
  if (code == cudaSuccess) stream_of(stream)->enqueue([=] { std::memset(memory, value, bytes); });
  return returned(code);
}

// Streams and events.
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (const int code = begin("cudaStreamCreateWithFlags"); code != cudaSuccess) return returned(code);
  const std::lock_guard lock(state().mutex);
  *stream = new CUstream_st(state().seed++);
  state().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  {
    const std::lock_guard lock(state().mutex);
    state().streams.erase(stream);
  }
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  stream_of(stream)->finish();
  return returned(begin("cudaStreamSynchronize"));
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const int code = begin("cudaEventCreateWithFlags");
  if (code == cudaSuccess) *event = new CUevent_st;
  return returned(code);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const int code = begin("cudaEventRecord"); code != cudaSuccess) return returned(code);
  const std::shared_ptr<Rounds> rounds = event->rounds;
  std::uint64_t round;
  {
    const std::lock_guard lock(rounds->mutex);
    round = ++rounds->recorded;
  }
  stream_of(stream)->enqueue([=] {
    const std::lock_guard lock(rounds->mutex);
    rounds->happened = round;
    rounds->changed.notify_all();
  });
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Rounds& rounds = *event->rounds;
  std::unique_lock lock(rounds.mutex);
  while (rounds.happened < rounds.recorded) {
    rounds.changed.wait_for(lock, std::chrono::milliseconds(2));
    const std::lock_guard all(state().mutex);
    if (state().sticky != cudaSuccess) break;  // a device that failed comes to no event
  }
  lock.unlock();
  return returned(begin("cudaEventSynchronize"));
}

// Errors.
cudaError_t cudaGetLastError() {
  const int code = last;
  last = cudaSuccess;
  return static_cast<cudaError_t>(code);
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorMisalignedAddress: return "cudaErrorMisalignedAddress";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "cudaError";
  }
}
const char* cudaGetErrorString(cudaError_t) {
  thread_local std::string text;
  const std::lock_guard lock(state().mutex);
  text = "emulated: " + state().text;
  return text.c_str();
}

}  // extern "C"

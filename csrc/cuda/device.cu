// The calls of device.hpp, to the CUDA runtime, or for a build without it on the host.
#include "cuda/device.hpp"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace paramdelta::cuda {

void check(int code, const char* what) {
  if (code == cudaSuccess) return;
  const cudaError_t error = static_cast<cudaError_t>(code);
  throw DeviceError(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(error) + " (" +
                    cudaGetErrorName(error) + ")");
}

std::string why_not() {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
    return "there is no NVIDIA driver";
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("CUDA finds no device it can use: ") + cudaGetErrorString(error) + " (driver for CUDA " +
           std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) + ", built with " +
           std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) + ")";
  }
  if (count == 0) return "there is no CUDA device";
  std::string old;
  for (const Device& device : devices()) {
    if (device.major >= 8) return "";
    old += (old.empty() ? "" : ", ") + device.name + " (" + std::to_string(device.major) + "." +
           std::to_string(device.minor) + ")";
  }
  return "every CUDA device is too old: " + old + "; kernels need compute capability 8.0";
}

std::vector<Device> devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "counting devices");
  std::vector<Device> found;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "asking for a device's properties");
    Device device;
    device.name = properties.name;
    device.major = properties.major;
    device.minor = properties.minor;
    device.processors = properties.multiProcessorCount;
    device.memory = properties.totalGlobalMem;
    device.shared_bytes = properties.sharedMemPerBlockOptin;
    check(cudaDeviceGetAttribute(&device.single_to_double, cudaDevAttrSingleToDoublePrecisionPerfRatio, i),
          "asking how fast binary64 is");
    found.push_back(device);
  }
  return found;
}

Processors processors(int device) {
  int count = 0, bytes = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "counting processors");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "asking for a processor's memory");
  return {count, static_cast<std::size_t>(bytes)};
}

bool on_host() { return false; }

OnDevice::OnDevice(int device) {
  check(cudaGetDevice(&before_), "asking for the current device");
  if (before_ == device) {
    before_ = -1;
    return;
  }
  check(cudaSetDevice(device), "changing the current device");
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace paramdelta::cuda

#else

namespace paramdelta::cuda {

void check(int, const char*) {}
std::string why_not() { return ""; }
std::vector<Device> devices() { return {}; }
// Few, so that each has several tiles to do.
Processors processors(int) { return {1, 228 * 1024}; }
bool on_host() { return true; }
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() {}

}  // namespace paramdelta::cuda

#endif

namespace paramdelta::cuda {

std::vector<int> targets() {
#if defined(__CUDA_ARCH_LIST__)
  std::vector<int> found{__CUDA_ARCH_LIST__};
  for (int& target : found) target /= 10;
  return found;
#else
  return {};
#endif
}

}  // namespace paramdelta::cuda

// Devices and errors of the CUDA runtime. Nothing here or behind it touches a driver before it is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace paramdelta::cuda {

// A cudaStream_t as a number, as torch hands it out; 0 is the default stream.
using Stream = std::uintptr_t;

// A call of the runtime failed; the message has its name and its own text.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws DeviceError unless `code` (a cudaError_t) is success. `what` says what was being done.
void check(int code, const char* what);

struct Device {
  std::string name;
  int major = 0, minor = 0;
  int processors = 0;
  std::size_t memory = 0;        // bytes
  int single_to_double = 0;      // how many times slower binary64 arithmetic is
  std::size_t shared_bytes = 0;  // that a block may have
};

// How many processors a device has, and the shared memory of each, without asking for anything else.
struct Processors {
  int count = 0;
  std::size_t shared_bytes = 0;
};
Processors processors(int device);

// Empty where a device can be used; else why not, in the runtime's words.
std::string why_not();

std::vector<Device> devices();

// The architectures that machine code was built for, such as 90; of the last there is PTX too.
std::vector<int> targets();

// Whether this is the build that runs kernel bodies on the host.
bool on_host();

// Makes `device` current for the calling thread, and on destruction the one before.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

}  // namespace paramdelta::cuda

// How fast a device merges, and how fast bytes reach it and come back: what the choice of a device is made by.
#pragma once

namespace paramdelta::cuda {

// Bytes per second: to the device and back, measured while both go on, and of operands merged (bf16, one delta).
struct Rates {
  double up = 0.0, down = 0.0, merge = 0.0;
};

// Takes some ten milliseconds, and 0.2 GB of device memory and of page-locked memory.
Rates measure(int device);

}  // namespace paramdelta::cuda

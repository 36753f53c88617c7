// The emulated device: memory it may touch, and the running of kernels. runtime.cpp makes CUDA's runtime of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "machine.hpp"

namespace emulated {

// Memory that kernels and copies may touch, from here on, and no longer.
void allow(const void* memory, std::size_t bytes);
void forbid(const void* memory);
// From here on all memory is, whatever its allocation.
void allow_all();
bool all_are_allowed();
bool is_allowed(const void* memory, std::size_t bytes);

// A block has at most as much shared memory as a block on sm_90.
inline constexpr std::size_t kMostShared = 227 * 1024;

// A kernel's parameters, from a pointer to each, as its entry wants them. Throws Fault where there is no such kernel.
std::vector<std::byte> packed(const std::string& name, const void* const* arguments);

// Runs a kernel to its end, block after block in an order drawn from `seed`. Throws Fault.
void execute(const std::string& name, b32 blocks, b32 threads, std::size_t shared_bytes,
             std::vector<std::byte> parameters, std::uint64_t seed);

}  // namespace emulated

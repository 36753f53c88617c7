// The CUDA backend's norms of one tensor's delta (core/norms.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/expression.hpp"
#include "core/norms.hpp"
#include "cuda/device.hpp"

namespace paramdelta::cuda {

// What leaves add to, in any order: the digits of three exact sums (delta², drift², inner), what of their leaves was
// not finite, and the bits of the largest |post − base|. Device memory that holds zeros before.
struct NormTotals {
  static constexpr int kSums = 3;
  std::int64_t digits[kSums][kExactDigits];
  std::uint32_t special[kSums];
  std::uint32_t largest_delta;
};

// Enqueues the norms of `count` elements, which are the whole tensor, in device memory; a null operand stands for
// zeros. No alignment is required. Nothing is allocated, copied or waited for, so that a graph can capture it. All
// memory must stay valid until the stream has passed the launch.
void add_norms(const Operand& post, const Operand& base, const Operand& new_base, std::uint64_t count,
               NormTotals* totals, int device, Stream stream);

// The sums, of totals that were copied to the host.
NormSums sums_of(const NormTotals& totals);

}  // namespace paramdelta::cuda

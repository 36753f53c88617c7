// The CUDA backend's merge of quantised matrices: what core/scaled.hpp describes, on device memory.
#pragma once

#include <cstddef>

#include "core/scaled.hpp"
#include "cuda/device.hpp"

namespace paramdelta::cuda {

// What a merge adds to: zeros before the first. `amax` holds the bits of the largest finite |x| of quantised output.
// The meanings are those of ScaledResult, and as there only the sums may depend on the order of the work.
struct ScaledTotals {
  std::uint64_t nan, inf, overflow;
  std::uint32_t touched, amax;
  double error_squared, value_squared;
};

enum class ScaledEffect : std::uint8_t { write, measure };

// How many terms a merge can have: what fits into the parameters of a kernel.
std::size_t most_scaled_terms();

// Device memory that a merge needs beside its operands while it runs: none where a unit fits into a block.
std::size_t workspace_bytes(const ScaledMerge& job, ScaledEffect effect);

// Enqueues the merge and returns; nothing is allocated, copied or waited for. The pointers of `job` are device
// addresses, but job.terms is read here. `workspace` is aligned to 8 bytes and need not be cleared. `out` and
// `out_scales` are memory apart from every operand. Everything must stay valid until the stream has passed the call.
void merge_scaled(const ScaledMerge& job, ScaledEffect effect, ScaledTotals* totals, void* workspace, int device,
                  Stream stream);

}  // namespace paramdelta::cuda

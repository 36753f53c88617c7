// The CUDA backend's merge of consecutive elements: many tensors of one signature in one launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/expression.hpp"
#include "cuda/device.hpp"

namespace paramdelta::cuda {

// The dtypes of a term's operands, and its factor.
struct TermTypes {
  DType post, base;
  double alpha;
};

// What every tensor of a batch has in common.
struct Signature {
  DType new_base, out;
  std::vector<TermTypes> terms;
};

// Device addresses; 0 stands for zeros (not for `out`). `pairs`: post and base of each term, in turn. `counts`: where
// the NaN, Inf and overflows of this tensor are added to, three 64-bit integers. All must stay valid until the stream
// has passed the launch. `out` may be exactly an operand's memory, never a part of it, and must be apart from all
// memory of the other tensors. No alignment is required; from addresses that are multiples of 16 merges are fastest.
struct TensorAddresses {
  std::uintptr_t new_base;
  std::vector<std::uintptr_t> pairs;
  std::uintptr_t out;
  std::uint64_t count;
  std::uintptr_t counts;
};

// How many terms a merge can have: what fits into the parameters of a kernel.
std::size_t most_terms();

// Enqueues the merges, in as few launches as the parameters of a kernel allow (some 200 tensors of one term each), and
// returns. Nothing is allocated, copied or waited for, so that a graph can capture it.
void merge(const Signature& signature, const std::vector<TensorAddresses>& tensors, int device, Stream stream);

}  // namespace paramdelta::cuda

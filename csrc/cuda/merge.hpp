// The CUDA backend's merge of consecutive elements: many tensors of one signature in one launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
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

// Post and base of each term, in turn. Those of one term, which is what most merges have, take no memory of their own.
class PairAddresses {
 public:
  PairAddresses() = default;
  PairAddresses(std::initializer_list<std::uintptr_t> list) {
    for (const std::uintptr_t address : list) push_back(address);
  }
  explicit PairAddresses(const std::vector<std::uintptr_t>& list) {
    for (const std::uintptr_t address : list) push_back(address);
  }

  void push_back(std::uintptr_t address) {
    if (size_ == kInline) more_.assign(few_, few_ + kInline);
    if (size_ < kInline)
      few_[size_] = address;
    else
      more_.push_back(address);
    ++size_;
  }
  std::size_t size() const { return size_; }
  const std::uintptr_t* begin() const { return size_ <= kInline ? few_ : more_.data(); }
  const std::uintptr_t* end() const { return begin() + size_; }

 private:
  static constexpr std::size_t kInline = 2;
  std::uintptr_t few_[kInline] = {};
  std::vector<std::uintptr_t> more_;  // all of them, where there are more
  std::size_t size_ = 0;
};

// Device addresses; 0 stands for zeros (not for `out`). `pairs`: post and base of each term, in turn. `counts`: where
// the NaN, Inf and overflows of this tensor are added to, three 64-bit integers. All must stay valid until the stream
// has passed the launch. `out` may be exactly an operand's memory, never a part of it, and must be apart from all
// memory of the other tensors. No alignment is required; from addresses that are multiples of 16 merges are fastest.
struct TensorAddresses {
  std::uintptr_t new_base;
  PairAddresses pairs;
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

// What a merge is, for every backend: out = new_base + sum_k alpha_k * (post_k - base_k) over `count` elements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtypes.hpp"

namespace paramdelta {

// `count` consecutive elements. A null pointer stands for zeros. The memory belongs to the caller and must stay valid
// until the call returns. No alignment is required, not even the element's own.
struct Operand {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// The operand from its element number `elements` on.
inline Operand advanced(Operand operand, std::size_t elements) {
  if (operand.data != nullptr)
    operand.data = static_cast<const unsigned char*>(operand.data) + elements * size_of(operand.dtype);
  return operand;
}

struct Term {
  Operand post;
  Operand base;
  double alpha = 1.0;
};

// What came out that a user should know of: outputs that are NaN; outputs that are infinite because the exact binary64
// result was; finite results beyond the largest finite value of the output type (and, for e4m3, which has no Inf,
// infinite ones too).
struct Counts {
  std::uint64_t nan = 0;
  std::uint64_t inf = 0;
  std::uint64_t overflow = 0;

  Counts& operator+=(const Counts& other) {
    nan += other.nan;
    inf += other.inf;
    overflow += other.overflow;
    return *this;
  }
};

struct Merge {
  Operand new_base;
  const Term* terms = nullptr;  // in the order in which they are added
  std::size_t n_terms = 0;
  void* out = nullptr;  // may be exactly an operand's memory, never a part of it
  DType out_dtype = DType::f32;
  std::size_t count = 0;
};

}  // namespace paramdelta

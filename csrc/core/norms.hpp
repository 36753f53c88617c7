// Norms of a delta, the same bits however the work is cut and wherever it is done: ‖post − base‖², ‖new_base − base‖²,
// their inner product, and max |post − base|.
//
// Operands are rounded to binary32 (exact except for f64) and subtracted in binary32. A leaf is 4096 consecutive
// elements from the tensor's start, zero-padded. Lane l of 256 adds the products of elements l, l + 256, … in order,
// product and sum each rounded to binary32; lanes become binary64 and are added halves to halves, 128 + 128 down to
// one. A tensor's sum is the correctly rounded sum of its leaves. A NaN in a leaf makes its sums NaN, and the maximum
// too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/exact_sum.hpp"

namespace paramdelta {

inline constexpr std::size_t kLeaf = 4096;
inline constexpr std::size_t kLanes = 256;

// What a part of a tensor contributes. Parts merge in any order.
struct NormSums {
  ExactSum delta_squared;
  ExactSum drift_squared;
  ExactSum inner;
  std::uint32_t largest_delta = 0;  // |difference| as binary32 bits, which order as the numbers do, NaN above all

  void merge(const NormSums& other) {
    delta_squared.merge(other.delta_squared);
    drift_squared.merge(other.drift_squared);
    inner.merge(other.inner);
    if (other.largest_delta > largest_delta) largest_delta = other.largest_delta;
  }
  double largest() const {
    return largest_delta > 0x7F800000u ? bits_as<double>(Format<DType::f64>::nan)
                                       : static_cast<double>(bits_as<float>(largest_delta));
  }
};

}  // namespace paramdelta

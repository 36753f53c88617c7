// The merge of one element, literally as the contract says it, from stored bits to stored bits: what every faster loop
// of every backend falls back to where something is NaN, infinite or overflows.
#pragma once

#include "core/codec.hpp"
#include "core/expression.hpp"

namespace paramdelta {

template <DType D>
PARAMDELTA_HOST_DEVICE inline typename Format<D>::Code code_at(const void* data, std::size_t i) {
  typename Format<D>::Code code;
  std::memcpy(&code, static_cast<const unsigned char*>(data) + i * sizeof(code), sizeof(code));
  return code;
}

// The stored bits of element `i`.
PARAMDELTA_HOST_DEVICE inline std::uint64_t bits_at(const Operand& operand, std::size_t i) {
  switch (size_of(operand.dtype)) {
    case 1: return code_at<DType::f8_e4m3>(operand.data, i);
    case 2: return code_at<DType::bf16>(operand.data, i);
    case 4: return code_at<DType::f32>(operand.data, i);
    default: return code_at<DType::f64>(operand.data, i);
  }
}

PARAMDELTA_HOST_DEVICE inline double value_at(const Operand& operand, std::size_t i) {
  if (operand.data == nullptr) return 0.0;
  switch (operand.dtype) {
    case DType::bf16: return decode<DType::bf16>(code_at<DType::bf16>(operand.data, i));
    case DType::f16: return decode<DType::f16>(code_at<DType::f16>(operand.data, i));
    case DType::f32: return decode<DType::f32>(code_at<DType::f32>(operand.data, i));
    case DType::f64: return decode<DType::f64>(code_at<DType::f64>(operand.data, i));
    case DType::f8_e4m3: return decode<DType::f8_e4m3>(code_at<DType::f8_e4m3>(operand.data, i));
    default: return decode<DType::f8_e5m2>(code_at<DType::f8_e5m2>(operand.data, i));
  }
}

template <DType D>
PARAMDELTA_HOST_DEVICE inline bool encode_at(double x, void* out) {
  const Encoded<D> encoded = encode<D>(x);
  std::memcpy(out, &encoded.code, sizeof(encoded.code));
  return encoded.overflow;
}

// Writes x, rounded once; returns whether it overflowed.
PARAMDELTA_HOST_DEVICE inline bool store_at(DType dtype, double x, void* out) {
  switch (dtype) {
    case DType::bf16: return encode_at<DType::bf16>(x, out);
    case DType::f16: return encode_at<DType::f16>(x, out);
    case DType::f32: return encode_at<DType::f32>(x, out);
    case DType::f64: return encode_at<DType::f64>(x, out);
    case DType::f8_e4m3: return encode_at<DType::f8_e4m3>(x, out);
    default: return encode_at<DType::f8_e5m2>(x, out);
  }
}

// Equal by their stored bits, so that NaN equals the same NaN and Inf − Inf is no difference.
PARAMDELTA_HOST_DEVICE inline bool same_code(const Operand& a, const Operand& b, std::size_t i) {
  if (a.data == nullptr && b.data == nullptr) return true;
  if (a.data == nullptr || b.data == nullptr || a.dtype != b.dtype) return false;
  return bits_at(a, i) == bits_at(b, i);
}

// acc, and whether a delta that is not zero went into it.
struct Sum {
  double acc = 0.0;
  bool touched = false;

  PARAMDELTA_HOST_DEVICE void add(double alpha, double post, double base) {
    const double delta = post - base;
    if (delta == 0.0) return;
    const double product = alpha * delta;
    acc = acc + product;
    touched = true;
  }
};

// acc of element `i`. No term has alpha == 0.
PARAMDELTA_HOST_DEVICE inline Sum sum_at(const Operand& new_base, const Term* terms, std::size_t n_terms,
                                         std::size_t i) {
  Sum sum{value_at(new_base, i), false};
  for (std::size_t t = 0; t < n_terms; ++t) {
    const Term& term = terms[t];
    if (same_code(term.post, term.base, i)) continue;
    sum.add(term.alpha, value_at(term.post, i), value_at(term.base, i));
  }
  return sum;
}

PARAMDELTA_HOST_DEVICE inline bool is_nan(double x) { return x != x; }
PARAMDELTA_HOST_DEVICE inline bool is_inf(double x) {
  return (bits_as<std::uint64_t>(x) & ~(std::uint64_t{1} << 63)) == Format<DType::f64>::beyond;
}

PARAMDELTA_HOST_DEVICE inline void count(Counts& counts, double acc, bool overflow) {
  if (is_nan(acc))
    ++counts.nan;
  else if (overflow)
    ++counts.overflow;
  else if (is_inf(acc))
    ++counts.inf;
}

// Writes the sum for element `i` of `new_base` to `out`, that element's place.
PARAMDELTA_HOST_DEVICE inline void store_sum(const Sum& sum, const Operand& new_base, std::size_t i, DType out_dtype,
                                             void* out, Counts& counts) {
  const bool overflow = store_at(out_dtype, sum.acc, out);
  if (!sum.touched && new_base.data != nullptr && new_base.dtype == out_dtype) {
    const unsigned char* from = static_cast<const unsigned char*>(new_base.data) + i * size_of(out_dtype);
    for (std::size_t k = 0; k < size_of(out_dtype); ++k) static_cast<unsigned char*>(out)[k] = from[k];
  }
  count(counts, sum.acc, overflow);
}

}  // namespace paramdelta

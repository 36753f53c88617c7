// The literal element-wise merge of exact.hpp.
#include "cpu/exact.hpp"

#include <cmath>

#include "core/codec.hpp"

namespace paramdelta::cpu {
namespace {

template <DType D>
double decode_at(const void* data, std::size_t i) {
  typename Format<D>::Code code;
  std::memcpy(&code, static_cast<const char*>(data) + i * sizeof(code), sizeof(code));
  return decode<D>(code);
}

double value_at(const Operand& operand, std::size_t i) {
  if (operand.data == nullptr) return 0.0;
  switch (operand.dtype) {
    case DType::bf16: return decode_at<DType::bf16>(operand.data, i);
    case DType::f16: return decode_at<DType::f16>(operand.data, i);
    case DType::f32: return decode_at<DType::f32>(operand.data, i);
    case DType::f64: return decode_at<DType::f64>(operand.data, i);
    case DType::f8_e4m3: return decode_at<DType::f8_e4m3>(operand.data, i);
    default: return decode_at<DType::f8_e5m2>(operand.data, i);
  }
}

template <DType D>
bool encode_at(double x, void* out, std::size_t i) {
  const Encoded<D> encoded = encode<D>(x);
  std::memcpy(static_cast<char*>(out) + i * sizeof(encoded.code), &encoded.code, sizeof(encoded.code));
  return encoded.overflow;
}

bool store_at(DType dtype, double x, void* out, std::size_t i) {
  switch (dtype) {
    case DType::bf16: return encode_at<DType::bf16>(x, out, i);
    case DType::f16: return encode_at<DType::f16>(x, out, i);
    case DType::f32: return encode_at<DType::f32>(x, out, i);
    case DType::f64: return encode_at<DType::f64>(x, out, i);
    case DType::f8_e4m3: return encode_at<DType::f8_e4m3>(x, out, i);
    default: return encode_at<DType::f8_e5m2>(x, out, i);
  }
}

// Equal by their stored bits, so that NaN equals the same NaN and Inf − Inf is no difference.
bool same_code(const Operand& a, const Operand& b, std::size_t i) {
  if (a.data == nullptr && b.data == nullptr) return true;
  if (a.data == nullptr || b.data == nullptr || a.dtype != b.dtype) return false;
  const std::size_t size = size_of(a.dtype);
  return std::memcmp(static_cast<const char*>(a.data) + i * size, static_cast<const char*>(b.data) + i * size, size) ==
         0;
}

}  // namespace

Counts merge_exact(const Merge& job, std::size_t first, std::size_t n, void* out) {
  Counts counts;
  const std::size_t out_size = size_of(job.out_dtype);
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t i = first + k;
    double acc = value_at(job.new_base, i);
    bool touched = false;
    for (std::size_t t = 0; t < job.n_terms; ++t) {
      const Term& term = job.terms[t];
      if (same_code(term.post, term.base, i)) continue;
      const double delta = value_at(term.post, i) - value_at(term.base, i);
      if (delta == 0.0) continue;
      const double product = term.alpha * delta;
      acc = acc + product;
      touched = true;
    }
    const bool overflow = store_at(job.out_dtype, acc, out, k);
    if (!touched && job.new_base.data != nullptr && job.new_base.dtype == job.out_dtype)
      std::memcpy(static_cast<char*>(out) + k * out_size, static_cast<const char*>(job.new_base.data) + i * out_size,
                  out_size);
    if (std::isnan(acc))
      ++counts.nan;
    else if (overflow)
      ++counts.overflow;
    else if (std::isinf(acc))
      ++counts.inf;
  }
  return counts;
}

}  // namespace paramdelta::cpu

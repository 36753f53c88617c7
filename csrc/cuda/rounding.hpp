// Decoding and encoding for ordinary values, in a few operations of binary32 and integers: finite numbers whose
// rounding is finite. They give what core/codec.hpp gives, and everything else is left to that.
#pragma once

#include "core/codec.hpp"
#include "cuda/launch.hpp"

namespace paramdelta::cuda {

// What a code of a type shorter than binary32 stands for. Multiplying by a power of two puts the exponent right,
// exactly, subnormals included; Inf and NaN, which would come out finite, come out as one of the two, so that whoever
// looks takes the literal way. Of f16 a device has an instruction.
template <DType D>
PARAMDELTA_DEVICE float widen_float(typename Format<D>::Code code) {
  using F = Format<D>;
  if constexpr (D == DType::bf16) {
    return bits_as<float>(static_cast<std::uint32_t>(code) << 16);
#if defined(__CUDACC__)
  } else if constexpr (D == DType::f16) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(code));
    return value;
#endif
  } else {
    const std::uint32_t bits = code;
    const std::uint32_t magnitude = bits & static_cast<std::uint32_t>(F::sign - 1);
    const std::uint32_t sign = (bits & static_cast<std::uint32_t>(F::sign)) << (32 - F::width);
    constexpr std::uint32_t power = static_cast<std::uint32_t>(127 + 127 - F::bias) << 23;
    const float value = bits_as<float>(sign | (magnitude << (23 - F::mantissa))) * bits_as<float>(power);
    return magnitude <= static_cast<std::uint32_t>(F::largest) ? value : bits_as<float>(0x7FC00000u);
  }
}

template <DType D>
PARAMDELTA_DEVICE double widen(typename Format<D>::Code code) {
  if constexpr (D == DType::f64)
    return bits_as<double>(code);
  else if constexpr (D == DType::f32)
    return static_cast<double>(bits_as<float>(code));
  else
    return static_cast<double>(widen_float<D>(code));
}

// x rounded to binary32 to odd: towards zero, and an inexact result made odd. Rounding that to nearest even, to a type
// of 2 bits less or more, gives what rounding x once gives: the odd last bit lies below every boundary between two of
// its codes, and on the side where x is. binary32's quantum of 2^-149 is at most a quarter of any such type's.
PARAMDELTA_DEVICE float round_to_odd(double x) {
  const float near = static_cast<float>(x);
  const double back = static_cast<double>(near);
  const double magnitude = x < 0.0 ? -x : x, reached = back < 0.0 ? -back : back;
  std::uint32_t bits = bits_as<std::uint32_t>(near);
  bits -= reached > magnitude ? 1u : 0u;
  bits |= reached != magnitude ? 1u : 0u;
  return bits_as<float>(bits);
}

// The code nearest to x, ties to even, of |x| that rounds to a finite code of a type shorter than binary32.
template <DType D>
PARAMDELTA_DEVICE typename Format<D>::Code narrow_float(float x) {
  using F = Format<D>;
  constexpr int shift = 23 - F::mantissa;
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t code = (magnitude + ((1u << (shift - 1)) - 1) + ((magnitude >> shift) & 1u)) >> shift;
  if constexpr (F::bias != 127) {
    code -= static_cast<std::uint32_t>(127 - F::bias) << F::mantissa;
    // Below the normal numbers, a sum whose last place is the quantum has the code in its low bits.
    constexpr std::uint32_t align = static_cast<std::uint32_t>(127 + F::emin - F::mantissa + 23) << 23;
    const std::uint32_t low = bits_as<std::uint32_t>(bits_as<float>(magnitude) + bits_as<float>(align)) - align;
    code = magnitude < static_cast<std::uint32_t>(127 + F::emin) << 23 ? low : code;
  }
  return static_cast<typename F::Code>(code | ((bits >> 31) << (F::width - 1)));
}

// Two of them, of bf16 or f16, for which devices have an instruction.
template <DType D>
PARAMDELTA_DEVICE void narrow_two(const float* x, typename Format<D>::Code* codes) {
#if defined(__CUDACC__)
  std::uint32_t both;
  if constexpr (D == DType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(x[1]), "f"(x[0]));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(x[1]), "f"(x[0]));
  codes[0] = static_cast<std::uint16_t>(both);
  codes[1] = static_cast<std::uint16_t>(both >> 16);
#else
  codes[0] = narrow_float<D>(x[0]);
  codes[1] = narrow_float<D>(x[1]);
#endif
}

// The same of a binary64, for every type: |x| < Format<D>::limit.
template <DType D>
PARAMDELTA_DEVICE typename Format<D>::Code narrow(double x) {
  if constexpr (D == DType::f64)
    return bits_as<std::uint64_t>(x);
  else if constexpr (D == DType::f32)
    return bits_as<std::uint32_t>(static_cast<float>(x));
  else
    return narrow_float<D>(round_to_odd(x));
}

// Whether narrow() may be asked: false for NaN, Inf and what overflows.
template <DType D>
PARAMDELTA_DEVICE bool is_ordinary(double x) {
  const double magnitude = x < 0.0 ? -x : x;
  if constexpr (D == DType::f64)
    return magnitude <= 0x1.FFFFFFFFFFFFFp1023;
  else
    return magnitude < Format<D>::limit;
}

}  // namespace paramdelta::cuda

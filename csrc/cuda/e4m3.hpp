// Four codes of f8_e4m3 at a time, in a word: to binary64, from binary32, and whether one is NaN. From compute
// capability 8.9 on, devices have instructions for what goes to and from binary32; elsewhere integers do it.
#pragma once

#include "cuda/operations.hpp"
#include "cuda/rounding.hpp"

namespace paramdelta::cuda {

// Where a code's sign and magnitude go in the upper word of a binary64: its field of four bits becomes the exponent's
// low end. That is 2^-1016 of the code's value, subnormals (which are binary64's own then) and −0 included; a scale
// takes the power back. The codes of NaN become ±480.
inline constexpr double kCodePower = 0x1p1016;

// A scale s serves while s · kCodePower is finite: |s| < 256.
inline constexpr double kMostScale = 256.0;

struct FourCodes {
  std::uint32_t codes, doubled;

  PARAMDELTA_DEVICE explicit FourCodes(std::uint32_t word) : codes(word), doubled(word << 1) {}

  // Byte k of the codes has the sign on top; of the doubled ones, the magnitude where the field ends at bit 20.
  template <int k>
  PARAMDELTA_DEVICE double value() const {
    const std::uint32_t both = permuted_bytes(doubled, codes, 0x4000u + 0x1000u * k + 0x100u * k);
    return double_of_upper(both & 0x80FE0000u);
  }
};

// Bit 7 of every byte that is a NaN, with other bits below: to be looked at with 0x80808080.
PARAMDELTA_DEVICE std::uint32_t nan_bits(std::uint32_t word) { return (word & 0x7F7F7F7Fu) + 0x01010101u; }

// encode_code() of core/quantise.hpp of y0 (to the lowest byte) … y3.
PARAMDELTA_DEVICE std::uint32_t encode_four(float y0, float y1, float y2, float y3) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  std::uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(y1), "f"(y0));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(y3), "f"(y2));
  return low | static_cast<std::uint32_t>(high) << 16;
#else
  const float ys[4] = {y0, y1, y2, y3};
  std::uint32_t word = 0;
  PARAMDELTA_UNROLL
  for (int k = 0; k < 4; ++k) {
    const std::uint32_t bits = bits_as<std::uint32_t>(ys[k]);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t held = magnitude < 0x43E00000u ? magnitude : 0x43E00000u;  // 448
    const std::uint32_t code = narrow_float<DType::f8_e4m3>(bits_as<float>((bits & 0x80000000u) | held));
    word |= (magnitude > 0x7F800000u ? 0x7Fu : code) << (8 * k);
  }
  return word;
#endif
}

// What the codes stand for, of finite ones.
PARAMDELTA_DEVICE void decode_four(std::uint32_t word, float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  PARAMDELTA_UNROLL
  for (int half = 0; half < 2; ++half) {
    std::uint32_t two;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"(static_cast<std::uint16_t>(word >> (16 * half))));
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(values[2 * half]), "=f"(values[2 * half + 1])
        : "r"(two));
  }
#else
  const float power = bits_as<float>((127u + 120u) << 23);
  PARAMDELTA_UNROLL
  for (int k = 0; k < 4; ++k) {
    const std::uint32_t code = word >> (8 * k);
    values[k] = bits_as<float>((code & 0x80u) << 24 | (code & 0x7Fu) << 20) * power;
  }
#endif
}

}  // namespace paramdelta::cuda

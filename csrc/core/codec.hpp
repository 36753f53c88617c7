// One element at a time, by integer bits: decode a stored code to binary64 (never rounds: every type here embeds in it)
// and encode a binary64 with one rounding, nearest even. These are the definitions that every tile loop must equal;
// they use no rounding operation of the processor, so no floating-point mode can change them.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/dtypes.hpp"

namespace paramdelta {

template <class To, class From>
PARAMDELTA_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps every bit");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A binary format: `mantissa` stored bits, exponents from `emin` (also that of the subnormals), the codes that mean
// something special, and `limit`: every |x| < limit rounds to a finite code. Beyond it lies `beyond`: Inf, or for
// f8_e4m3, which has none, the largest finite value.
template <class CodeType, int kMantissa, int kEmin, std::uint64_t kLargest, std::uint64_t kNan, std::uint64_t kBeyond>
struct BinaryFormat {
  using Code = CodeType;
  static constexpr int width = 8 * static_cast<int>(sizeof(Code));
  static constexpr int mantissa = kMantissa;
  static constexpr int emin = kEmin;
  static constexpr int bias = 1 - kEmin;
  static constexpr std::uint64_t sign = std::uint64_t{1} << (width - 1);
  static constexpr std::uint64_t largest = kLargest;
  static constexpr std::uint64_t nan = kNan;  // the canonical one
  static constexpr std::uint64_t beyond = kBeyond;
  static constexpr bool has_inf = kBeyond != kLargest;
};

template <DType>
struct Format;
template <>
struct Format<DType::bf16> : BinaryFormat<std::uint16_t, 7, -126, 0x7F7F, 0x7FC0, 0x7F80> {
  static constexpr double limit = 0x1.FFp127;
};
template <>
struct Format<DType::f16> : BinaryFormat<std::uint16_t, 10, -14, 0x7BFF, 0x7E00, 0x7C00> {
  static constexpr double limit = 0x1.FFEp15;
};
template <>
struct Format<DType::f32> : BinaryFormat<std::uint32_t, 23, -126, 0x7F7FFFFF, 0x7FC00000, 0x7F800000> {
  static constexpr double limit = 0x1.FFFFFFp127;
};
template <>
struct Format<DType::f64>
    : BinaryFormat<std::uint64_t, 52, -1022, 0x7FEFFFFFFFFFFFFF, 0x7FF8000000000000, 0x7FF0000000000000> {
  static constexpr double limit = __builtin_huge_val();
};
template <>
struct Format<DType::f8_e4m3> : BinaryFormat<std::uint8_t, 3, -6, 0x7E, 0x7F, 0x7E> {
  static constexpr double limit = 0x1.Dp8;  // 464, the middle of 448 and 480; itself it rounds to 448, the even one
};
template <>
struct Format<DType::f8_e5m2> : BinaryFormat<std::uint8_t, 2, -14, 0x7B, 0x7E, 0x7C> {
  static constexpr double limit = 0x1.Ep15;
};

template <DType D>
PARAMDELTA_HOST_DEVICE inline double decode(typename Format<D>::Code code) {
  using F = Format<D>;
  if constexpr (D == DType::f64) {
    return bits_as<double>(code);
  } else {
    const std::uint64_t magnitude = code & (F::sign - 1);
    const std::uint64_t sign = (code & F::sign) ? std::uint64_t{1} << 63 : 0;
    const std::uint64_t exponent = magnitude >> F::mantissa;
    if (magnitude > F::largest) {
      const bool inf = F::has_inf && magnitude == F::beyond;
      return bits_as<double>(sign | (inf ? Format<DType::f64>::beyond : Format<DType::f64>::nan));
    }
    if (exponent == 0) {  // magnitude · 2^(emin − mantissa), exact: both factors are small integers' worth of bits
      const double quantum = bits_as<double>(static_cast<std::uint64_t>(1023 + F::emin - F::mantissa) << 52);
      return bits_as<double>(sign | bits_as<std::uint64_t>(static_cast<double>(magnitude) * quantum));
    }
    return bits_as<double>(sign |
                           ((magnitude << (52 - F::mantissa)) + (static_cast<std::uint64_t>(1023 - F::bias) << 52)));
  }
}

template <DType D>
struct Encoded {
  typename Format<D>::Code code;
  bool overflow;  // the rounding exceeded the largest finite value (an infinite x counts only where there is no Inf)
};

template <DType D>
PARAMDELTA_HOST_DEVICE inline Encoded<D> encode(double x) {
  using F = Format<D>;
  using Code = typename F::Code;
  constexpr std::uint64_t kInf = Format<DType::f64>::beyond;
  const std::uint64_t bits = bits_as<std::uint64_t>(x);
  const std::uint64_t magnitude = bits & ~(std::uint64_t{1} << 63);
  const std::uint64_t sign = (bits >> 63) ? F::sign : 0;
  if (magnitude > kInf) return {static_cast<Code>(F::nan), false};
  if (magnitude == kInf) return {static_cast<Code>(sign | F::beyond), !F::has_inf};
  if constexpr (D == DType::f64) {
    return {bits, false};
  } else {
    const int field = static_cast<int>(magnitude >> 52);
    const int exponent = (field == 0 ? 1 : field) - 1023;
    const std::uint64_t significand =
        (magnitude & ((std::uint64_t{1} << 52) - 1)) | (field == 0 ? 0 : std::uint64_t{1} << 52);
    // Bits that do not fit: those of the mantissa, and one more for every step below the smallest normal exponent.
    const bool normal = exponent >= F::emin;
    const int shift = 52 - F::mantissa + (normal ? 0 : F::emin - exponent);
    if (shift > 54) return {static_cast<Code>(sign), false};  // below half of the smallest subnormal
    std::uint64_t rounded = significand >> shift;
    const std::uint64_t rest = significand & ((std::uint64_t{1} << shift) - 1);
    const std::uint64_t half = std::uint64_t{1} << (shift - 1);
    rounded += (rest > half || (rest == half && (rounded & 1))) ? 1 : 0;
    // `rounded` of a normal value holds the hidden bit, which stands for one exponent step; a carry goes the same way.
    const std::uint64_t code = rounded + (normal ? static_cast<std::uint64_t>(exponent - F::emin) << F::mantissa : 0);
    if (code > F::largest) return {static_cast<Code>(sign | F::beyond), true};
    return {static_cast<Code>(sign | code), false};
  }
}

}  // namespace paramdelta

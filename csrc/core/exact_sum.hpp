// A sum of binary64 numbers without any rounding until the end: the order of additions, and so the cutting of the work,
// cannot matter. The result is what Python's math.fsum gives.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "core/codec.hpp"

namespace paramdelta {

// A fixed-point number of 70 digits to base 2^32, digit 0 counting 2^-1088: every finite binary64 (2^-1074 to 2^1024)
// lies within, with 2^128 times its largest above. Digits are signed 64-bit integers; an addition changes three of them
// by less than 2^33, so that kExactAdditions of them need no carries.
inline constexpr int kExactDigits = 70;
inline constexpr int kExactLowest = 1088;
inline constexpr std::uint32_t kExactAdditions = 1u << 29;

// What is not finite, as bits beside the digits.
inline constexpr std::uint32_t kExactNan = 1, kExactPositiveInf = 2, kExactNegativeInf = 4;

// What one number adds: `parts` to the digits from `digit` on, or, where it is not finite, a bit of the above.
struct ExactParts {
  int digit = 0;
  std::int64_t parts[3] = {};
  std::uint32_t special = 0;
};

PARAMDELTA_HOST_DEVICE inline ExactParts exact_parts(double x) {
  const std::uint64_t bits = bits_as<std::uint64_t>(x);
  const int field = static_cast<int>((bits >> 52) & 0x7FF);
  ExactParts result;
  if (field == 0x7FF) {
    result.special = x != x ? kExactNan : x > 0 ? kExactPositiveInf : kExactNegativeInf;
    return result;
  }
  const std::uint64_t fraction = bits & ((std::uint64_t{1} << 52) - 1);
  const std::uint64_t significand = field == 0 ? fraction : fraction | (std::uint64_t{1} << 52);
  const int place = (field == 0 ? 1 : field) - 1075 + kExactLowest;  // of the significand's last bit
  const int shift = place % 32;
  const std::uint64_t low = (significand & 0xFFFFFFFFu) << shift;  // below 2^63
  const std::uint64_t high = (significand >> 32) << shift;         // below 2^53
  const std::int64_t sign = (bits >> 63) ? -1 : 1;
  result.digit = place / 32;
  result.parts[0] = sign * static_cast<std::int64_t>(low & 0xFFFFFFFFu);
  result.parts[1] = sign * static_cast<std::int64_t>((low >> 32) + (high & 0xFFFFFFFFu));
  result.parts[2] = sign * static_cast<std::int64_t>(high >> 32);
  return result;
}

class ExactSum {
 public:
  ExactSum() = default;

  // From digits that at most kExactAdditions numbers were added to elsewhere, and the bits of what was not finite.
  ExactSum(const std::int64_t* digits, std::uint32_t special) : additions_(1), special_(special) {
    for (int i = 0; i < kExactDigits; ++i) digits_[i] = digits[i];
    carry();
  }

  void add(double x) {
    const ExactParts added = exact_parts(x);
    special_ |= added.special;
    for (int i = 0; i < 3; ++i) digits_[added.digit + i] += added.parts[i];
    if (++additions_ == kExactAdditions) carry();
  }

  void merge(ExactSum other) {
    carry();
    other.carry();
    for (int i = 0; i < kExactDigits; ++i) digits_[i] += other.digits_[i];
    additions_ = 1;
    special_ |= other.special_;
  }

  // The sum rounded once, nearest even. Zero is +0.
  double rounded() const {
    constexpr std::uint32_t both = kExactPositiveInf | kExactNegativeInf;
    if ((special_ & kExactNan) != 0 || (special_ & both) == both) return bits_as<double>(Format<DType::f64>::nan);
    if (special_ != 0) return (special_ & kExactPositiveInf) != 0 ? HUGE_VAL : -HUGE_VAL;
    ExactSum sum = *this;
    sum.carry();
    const bool negative = sum.digits_[kExactDigits - 1] < 0;
    if (negative) {
      for (std::int64_t& digit : sum.digits_) digit = -digit;
      sum.carry();
    }
    int top = kExactDigits - 1;
    while (top >= 0 && sum.digits_[top] == 0) --top;
    if (top < 0) return 0.0;
    // The leading 64 bits, from three digits, the last bit made sticky for all that is below.
    const auto digit_at = [&](int i) { return i < 0 ? std::uint64_t{0} : static_cast<std::uint64_t>(sum.digits_[i]); };
    std::uint64_t leading = (digit_at(top) << 32) | digit_at(top - 1);
    const int zeros = __builtin_clzll(leading);  // below 32
    leading = (leading << zeros) | ((digit_at(top - 2) << zeros) >> 32);
    bool rest = (digit_at(top - 2) & ((std::uint64_t{1} << (32 - zeros)) - 1)) != 0;
    for (int i = top - 3; i >= 0 && !rest; --i) rest = sum.digits_[i] != 0;
    // leading · 2^place. At place −1074 and above the value is a multiple of binary64's smallest, so that a result
    // among the subnormals is exact and the only rounding is the one to 53 bits.
    const int place = 32 * (top - 1) - zeros - kExactLowest;
    std::uint64_t significand = leading >> 11;
    const std::uint64_t tail = (leading & 0x7FF) | (rest ? 1 : 0);
    significand += (tail > 0x400 || (tail == 0x400 && (significand & 1))) ? 1 : 0;
    const double value = std::ldexp(static_cast<double>(significand), place + 11);
    return negative ? -value : value;
  }

 private:
  // Makes every digit but the top one lie in [0, 2^32); the top one keeps the sign.
  void carry() {
    for (int i = 0; i + 1 < kExactDigits; ++i) {
      const std::int64_t over = digits_[i] >> 32;
      digits_[i] -= over * (std::int64_t{1} << 32);
      digits_[i + 1] += over;
    }
    additions_ = 0;
  }

  std::int64_t digits_[kExactDigits] = {};
  std::uint32_t additions_ = 0;
  std::uint32_t special_ = 0;
};

}  // namespace paramdelta

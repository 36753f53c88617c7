// A sum of binary64 numbers without any rounding until the end: the order of additions, and so the cutting of the work,
// cannot matter. The result is what Python's math.fsum gives.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/codec.hpp"

namespace paramdelta::cpu {

// A fixed-point number of 70 digits to base 2^32, digit 0 counting 2^-1088: every finite binary64 (2^-1074 to 2^1024)
// lies within, with 2^128 times its largest above. Digits are signed 64-bit integers and take carries only every 2^29
// additions; each addition changes three of them by less than 2^33.
class ExactSum {
 public:
  void add(double x) {
    const std::uint64_t bits = bits_as<std::uint64_t>(x);
    const int field = static_cast<int>((bits >> 52) & 0x7FF);
    if (field == 0x7FF) {
      if (x != x)
        nan_ = true;
      else if (x > 0)
        positive_inf_ = true;
      else
        negative_inf_ = true;
      return;
    }
    const std::uint64_t fraction = bits & ((std::uint64_t{1} << 52) - 1);
    const std::uint64_t significand = field == 0 ? fraction : fraction | (std::uint64_t{1} << 52);
    const int place = (field == 0 ? 1 : field) - 1075 + kLowest;  // of the significand's last bit
    const int digit = place / 32, shift = place % 32;
    const std::uint64_t low = (significand & 0xFFFFFFFFu) << shift;  // below 2^63
    const std::uint64_t high = (significand >> 32) << shift;         // below 2^53
    const std::int64_t parts[3] = {static_cast<std::int64_t>(low & 0xFFFFFFFFu),
                                   static_cast<std::int64_t>((low >> 32) + (high & 0xFFFFFFFFu)),
                                   static_cast<std::int64_t>(high >> 32)};
    for (int i = 0; i < 3; ++i) digits_[digit + i] += (bits >> 63) ? -parts[i] : parts[i];
    if (++additions_ == kCarryAfter) carry();
  }

  void merge(ExactSum other) {
    carry();
    other.carry();
    for (int i = 0; i < kDigits; ++i) digits_[i] += other.digits_[i];
    additions_ = 1;
    nan_ |= other.nan_;
    positive_inf_ |= other.positive_inf_;
    negative_inf_ |= other.negative_inf_;
  }

  // The sum rounded once, nearest even. Zero is +0.
  double rounded() const {
    if (nan_ || (positive_inf_ && negative_inf_)) return bits_as<double>(Format<DType::f64>::nan);
    if (positive_inf_ || negative_inf_) return positive_inf_ ? HUGE_VAL : -HUGE_VAL;
    ExactSum sum = *this;
    sum.carry();
    const bool negative = sum.digits_[kDigits - 1] < 0;
    if (negative) {
      for (std::int64_t& digit : sum.digits_) digit = -digit;
      sum.carry();
    }
    int top = kDigits - 1;
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
    const int place = 32 * (top - 1) - zeros - kLowest;
    std::uint64_t significand = leading >> 11;
    const std::uint64_t tail = (leading & 0x7FF) | (rest ? 1 : 0);
    significand += (tail > 0x400 || (tail == 0x400 && (significand & 1))) ? 1 : 0;
    const double value = std::ldexp(static_cast<double>(significand), place + 11);
    return negative ? -value : value;
  }

 private:
  static constexpr int kDigits = 70;
  static constexpr int kLowest = 1088;
  static constexpr std::uint32_t kCarryAfter = 1u << 29;

  // Makes every digit but the top one lie in [0, 2^32); the top one keeps the sign.
  void carry() {
    for (int i = 0; i + 1 < kDigits; ++i) {
      const std::int64_t over = digits_[i] >> 32;
      digits_[i] -= over * (std::int64_t{1} << 32);
      digits_[i + 1] += over;
    }
    additions_ = 0;
  }

  std::int64_t digits_[kDigits] = {};
  std::uint32_t additions_ = 0;
  bool nan_ = false;
  bool positive_inf_ = false;
  bool negative_inf_ = false;
};

}  // namespace paramdelta::cpu

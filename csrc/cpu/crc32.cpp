// Three ways to the same remainder: tables of 16 bytes at a time, carry-less products of 128-bit lanes (PCLMULQDQ), and
// of four such lanes in a register (VPCLMULQDQ). The latter two fold the message onto its last 16 bytes; the table
// takes it from there. All constants are computed here, from P.
#include "cpu/crc32.hpp"

#include <array>
#include <cstring>

#include "cpu/targets.hpp"

#if PARAMDELTA_X86
#include <immintrin.h>
#endif

namespace paramdelta::cpu {
namespace {

constexpr std::uint32_t kP = 0xEDB88320u;  // P without x^32, bit 31 − k for x^k
constexpr std::uint32_t kOne = 0x80000000u;

constexpr std::uint32_t times_x(std::uint32_t a) { return a & 1u ? (a >> 1) ^ kP : a >> 1; }

constexpr std::uint32_t multiply_by_bits(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (int k = 31; k >= 0; --k) {
    product ^= b & (0u - ((a >> k) & 1u));
    b = times_x(b);
  }
  return product;
}

// x^exponent mod P.
constexpr std::uint32_t x_to_the(std::uint64_t exponent) {
  std::uint32_t power = kOne, square = times_x(kOne);
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) power = multiply_by_bits(power, square);
    square = multiply_by_bits(square, square);
  }
  return power;
}

constexpr std::size_t kStride = 16;  // bytes that the tables take at once

// ByteTables[k][b] is the remainder of byte b with k bytes behind it.
using ByteTables = std::array<std::array<std::uint32_t, 256>, kStride>;
constexpr ByteTables make_byte_tables() {
  ByteTables tables{};
  for (std::uint32_t b = 0; b < 256; ++b) {
    std::uint32_t remainder = b;
    for (int bit = 0; bit < 8; ++bit) remainder = times_x(remainder);
    tables[0][b] = remainder;
  }
  for (std::size_t k = 1; k < kStride; ++k)
    for (std::size_t b = 0; b < 256; ++b) tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 255u];
  return tables;
}
constexpr ByteTables kBytes = make_byte_tables();

// PowerTables[w][d] = x^(8 · d · 256^w): a distance in bytes is a product of at most eight of them.
using PowerTables = std::array<std::array<std::uint32_t, 256>, 8>;
constexpr PowerTables make_power_tables() {
  PowerTables tables{};
  std::uint32_t step = x_to_the(8);
  for (std::size_t w = 0; w < 8; ++w) {
    tables[w][0] = kOne;
    for (std::size_t d = 1; d < 256; ++d) tables[w][d] = multiply_by_bits(tables[w][d - 1], step);
    step = multiply_by_bits(tables[w][255], step);
  }
  return tables;
}

const PowerTables& power_tables() {
  static const PowerTables tables = make_power_tables();
  return tables;
}

std::uint32_t continued_by_table(std::uint32_t remainder, const std::byte* data, std::size_t bytes) {
  for (; bytes >= kStride; data += kStride, bytes -= kStride) {
    std::uint64_t low, high;
    std::memcpy(&low, data, 8);
    std::memcpy(&high, data + 8, 8);
    low ^= remainder;
    remainder = 0;
    for (std::size_t i = 0; i < 8; ++i)
      remainder ^= kBytes[15 - i][(low >> (8 * i)) & 255u] ^ kBytes[7 - i][(high >> (8 * i)) & 255u];
  }
  for (; bytes; ++data, --bytes)
    remainder = (remainder >> 8) ^ kBytes[0][(remainder ^ std::to_integer<std::uint32_t>(*data)) & 255u];
  return remainder;
}

std::uint32_t raw_by_table(const std::byte* data, std::size_t bytes) { return continued_by_table(0, data, bytes); }

constexpr Crc32 kByTable = {raw_by_table, multiply_by_bits};

#if PARAMDELTA_X86

// A lane of 128 bits holds the polynomial L · x^64 + H: L in its low word, which comes first in memory. A product of
// two words comes out one place too low (bit 126 instead of 127 is x^0), so that moving a lane by D bits takes
// x^(D + 63) for L and x^(D − 1) for H, each at the upper end of its word.
constexpr std::uint64_t low_factor(std::uint64_t bits) { return std::uint64_t{x_to_the(bits + 63)} << 32; }
constexpr std::uint64_t high_factor(std::uint64_t bits) { return std::uint64_t{x_to_the(bits - 1)} << 32; }

#define PARAMDELTA_CLMUL __attribute__((target("pclmul,sse4.1")))
#define PARAMDELTA_INLINE_CLMUL __attribute__((target("pclmul,sse4.1"), always_inline)) inline

template <std::uint64_t Bits>
PARAMDELTA_INLINE_CLMUL __m128i moved(__m128i lane) {
  constexpr std::uint64_t kLow = low_factor(Bits), kHigh = high_factor(Bits);
  const __m128i factors = _mm_set_epi64x(static_cast<long long>(kHigh), static_cast<long long>(kLow));
  return _mm_xor_si128(_mm_clmulepi64_si128(lane, factors, 0x00), _mm_clmulepi64_si128(lane, factors, 0x11));
}

PARAMDELTA_INLINE_CLMUL __m128i lane_at(const std::byte* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// Folds what follows a lane onto it, then leaves the rest to the table.
PARAMDELTA_INLINE_CLMUL std::uint32_t raw_from(__m128i lane, const std::byte* data, std::size_t bytes) {
  for (; bytes >= 16; data += 16, bytes -= 16) lane = _mm_xor_si128(moved<128>(lane), lane_at(data));
  std::byte last[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(last), lane);
  return continued_by_table(raw_by_table(last, 16), data, bytes);
}

PARAMDELTA_CLMUL std::uint32_t raw_by_lanes(const std::byte* data, std::size_t bytes) {
  constexpr std::size_t kLanes = 8;  // enough to hide a product's latency
  if (bytes < 32) return raw_by_table(data, bytes);
  if (bytes < 16 * kLanes) return raw_from(lane_at(data), data + 16, bytes - 16);
  __m128i lanes[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = lane_at(data + 16 * i);
  data += 16 * kLanes;
  bytes -= 16 * kLanes;
  for (; bytes >= 16 * kLanes; data += 16 * kLanes, bytes -= 16 * kLanes)
    for (std::size_t i = 0; i < kLanes; ++i)
      lanes[i] = _mm_xor_si128(moved<128 * kLanes>(lanes[i]), lane_at(data + 16 * i));
  __m128i lane = lanes[0];
  for (std::size_t i = 1; i < kLanes; ++i) lane = _mm_xor_si128(moved<128>(lane), lanes[i]);
  return raw_from(lane, data, bytes);
}

// The product of two remainders as a word, one place too low, and its upper half divided by P by the table.
PARAMDELTA_CLMUL std::uint32_t multiply_by_product(std::uint32_t a, std::uint32_t b) {
  const __m128i product =
      _mm_clmulepi64_si128(_mm_cvtsi32_si128(static_cast<int>(a)), _mm_cvtsi32_si128(static_cast<int>(b)), 0x00);
  const std::uint64_t word = static_cast<std::uint64_t>(_mm_cvtsi128_si64(product)) << 1;
  std::uint32_t remainder = static_cast<std::uint32_t>(word >> 32);
  for (std::size_t i = 0; i < 4; ++i) remainder ^= kBytes[3 - i][(word >> (8 * i)) & 255u];
  return remainder;
}

constexpr Crc32 kByLanes = {raw_by_lanes, multiply_by_product};

#define PARAMDELTA_WIDE __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.1")))
#define PARAMDELTA_INLINE_WIDE \
  __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.1"), always_inline)) inline

template <std::uint64_t Bits>
PARAMDELTA_INLINE_WIDE __m512i moved_onto(__m512i lanes, __m512i onto) {
  constexpr std::uint64_t kLow = low_factor(Bits), kHigh = high_factor(Bits);
  const auto low = static_cast<long long>(kLow), high = static_cast<long long>(kHigh);
  const __m512i factors = _mm512_set_epi64(high, low, high, low, high, low, high, low);
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lanes, factors, 0x00),
                                   _mm512_clmulepi64_epi128(lanes, factors, 0x11), onto,
                                   0x96);  // exclusive or of three
}

PARAMDELTA_WIDE std::uint32_t raw_by_wide_lanes(const std::byte* data, std::size_t bytes) {
  constexpr std::size_t kRegisters = 4, kStep = 64 * kRegisters;
  if (bytes < kStep) return raw_by_lanes(data, bytes);
  __m512i sums[kRegisters];
  for (std::size_t i = 0; i < kRegisters; ++i) sums[i] = _mm512_loadu_si512(data + 64 * i);
  data += kStep;
  bytes -= kStep;
  for (; bytes >= kStep; data += kStep, bytes -= kStep)
    for (std::size_t i = 0; i < kRegisters; ++i)
      sums[i] = moved_onto<8 * kStep>(sums[i], _mm512_loadu_si512(data + 64 * i));
  __m512i sum = sums[0];
  for (std::size_t i = 1; i < kRegisters; ++i) sum = moved_onto<512>(sum, sums[i]);
  for (; bytes >= 64; data += 64, bytes -= 64) sum = moved_onto<512>(sum, _mm512_loadu_si512(data));
  alignas(64) std::byte last[64];
  _mm512_store_si512(last, sum);
  __m128i lane = lane_at(last);
  for (std::size_t i = 1; i < 4; ++i) lane = _mm_xor_si128(moved<128>(lane), lane_at(last + 16 * i));
  return raw_from(lane, data, bytes);
}

constexpr Crc32 kByWideLanes = {raw_by_wide_lanes, multiply_by_product};

bool has_products() { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }
bool has_wide_products() { return has_products() && __builtin_cpu_supports("vpclmulqdq"); }

#endif  // PARAMDELTA_X86

}  // namespace

const Crc32& crc32_for(Isa isa) {
#if PARAMDELTA_X86
  static const Crc32& lanes = has_products() ? kByLanes : kByTable;
  static const Crc32& wide_lanes = has_wide_products() ? kByWideLanes : lanes;
  if (isa == Isa::avx512) return wide_lanes;
  if (isa == Isa::avx2) return lanes;
#endif
  (void)isa;
  return kByTable;
}

std::uint32_t power_of_x(std::uint64_t bytes) {
  const PowerTables& tables = power_tables();
  std::uint32_t power = kOne;
  for (std::size_t w = 0; bytes; ++w, bytes >>= 8)
    if (bytes & 255) power = power == kOne ? tables[w][bytes & 255] : multiply_by_bits(power, tables[w][bytes & 255]);
  return power;
}

std::uint32_t shifted(std::uint32_t remainder, std::uint64_t bytes) {
  return remainder == 0 || bytes == 0 ? remainder : multiply_by_bits(remainder, power_of_x(bytes));
}

std::uint32_t crc32_of_raw(std::uint32_t raw, std::uint64_t message_bytes) {
  return raw ^ shifted(0xFFFFFFFFu, message_bytes) ^ 0xFFFFFFFFu;
}

}  // namespace paramdelta::cpu

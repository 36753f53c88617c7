// The arithmetic of quantising, one value at a time: which scale a unit gets, and which code a value. What
// paramdelta/formats.py says in words; every loop must equal these functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/codec.hpp"
#include "core/scaled.hpp"

namespace paramdelta {

// Bytes of one scale; f8_e8m0 and f8_e4m3 have one.
PARAMDELTA_HOST_DEVICE constexpr std::size_t scale_size(DType dtype) { return size_of(dtype); }

// Bytes 0 … 255 of f8_e8m0 as binary32: 2^(byte − 127), of which byte 0 is subnormal, and NaN.
PARAMDELTA_HOST_DEVICE inline float decode_e8m0(std::uint32_t byte) {
  return bits_as<float>(byte == 0 ? 0x00400000u : byte == 255 ? 0x7FC00000u : byte << 23);
}

// The scale whose stored bits these are; every type of a scale embeds in binary32.
PARAMDELTA_HOST_DEVICE inline float decode_scale(DType dtype, std::uint32_t bits) {
  switch (dtype) {
    case DType::f32: return bits_as<float>(bits);
    case DType::bf16: return bits_as<float>(bits << 16);
    case DType::f16: return static_cast<float>(decode<DType::f16>(static_cast<std::uint16_t>(bits)));
    case DType::f8_e4m3: return static_cast<float>(decode<DType::f8_e4m3>(static_cast<std::uint8_t>(bits)));
    default: return decode_e8m0(bits);
  }
}

// Rounded once to the stored type. Of f8_e8m0, powers of two only: the rules that go with it yield no others.
PARAMDELTA_HOST_DEVICE inline std::uint32_t encode_scale(DType dtype, float scale) {
  switch (dtype) {
    case DType::f32: return bits_as<std::uint32_t>(scale);
    case DType::bf16: return encode<DType::bf16>(static_cast<double>(scale)).code;
    case DType::f16: return encode<DType::f16>(static_cast<double>(scale)).code;
    case DType::f8_e4m3: return encode<DType::f8_e4m3>(static_cast<double>(scale)).code;
    default: return bits_as<std::uint32_t>(scale) >> 23;
  }
}

template <class Stored>
PARAMDELTA_HOST_DEVICE inline std::uint32_t load_as(const void* data, std::ptrdiff_t i) {
  Stored bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(data) + i * static_cast<std::ptrdiff_t>(sizeof(bits)),
              sizeof(bits));
  return bits;
}

template <class Stored>
PARAMDELTA_HOST_DEVICE inline void store_as(void* data, std::ptrdiff_t i, std::uint32_t from) {
  const Stored bits = static_cast<Stored>(from);
  std::memcpy(static_cast<unsigned char*>(data) + i * static_cast<std::ptrdiff_t>(sizeof(bits)), &bits, sizeof(bits));
}

PARAMDELTA_HOST_DEVICE inline std::uint32_t load_scale(DType dtype, const void* data, std::ptrdiff_t i) {
  switch (scale_size(dtype)) {
    case 1: return load_as<std::uint8_t>(data, i);
    case 2: return load_as<std::uint16_t>(data, i);
    default: return load_as<std::uint32_t>(data, i);
  }
}

PARAMDELTA_HOST_DEVICE inline void store_scale(DType dtype, void* data, std::ptrdiff_t i, std::uint32_t bits) {
  switch (scale_size(dtype)) {
    case 1: return store_as<std::uint8_t>(data, i, bits);
    case 2: return store_as<std::uint16_t>(data, i, bits);
    default: return store_as<std::uint32_t>(data, i, bits);
  }
}

// What codes of a plane are multiplied with, exactly, where a scale is stored as this number.
PARAMDELTA_HOST_DEVICE inline double value_scale(Second second, float second_value, float scale) {
  if (second == Second::multiply) return static_cast<double>(scale) * static_cast<double>(second_value);
  if (second == Second::divide) return static_cast<double>(scale / second_value);
  return static_cast<double>(scale);
}

// The scale of one unit: its stored bits, the number that its codes stand for multiples of, and how a code comes about:
// from x · factor, or from x / factor.
struct UnitScale {
  std::uint32_t stored = 0;
  float scale = 1.0f;
  float factor = 1.0f;
};

PARAMDELTA_HOST_DEVICE inline bool multiplies(const Recipe& recipe) {
  return recipe.reciprocal || recipe.rule == ScaleRule::inverse;
}

// How codes are made against a scale that is stored as these bits.
PARAMDELTA_HOST_DEVICE inline UnitScale unit_of_stored(const Recipe& recipe, float second, DType dtype,
                                                       std::uint32_t bits) {
  UnitScale unit;
  unit.stored = bits;
  unit.scale = decode_scale(dtype, bits);
  if (recipe.rule == ScaleRule::nv_multiply) unit.scale = unit.scale * second;
  if (recipe.rule == ScaleRule::nv_divide) unit.scale = unit.scale / second;
  unit.factor = multiplies(recipe) ? 1.0f / unit.scale : unit.scale;
  return unit;
}

// 2^(field − 127) as stored, 2^-127 for a field of 0: the codes of f8_e8m0.
PARAMDELTA_HOST_DEVICE inline std::uint32_t stored_power(DType dtype, std::uint32_t field) {
  return encode_scale(dtype, decode_e8m0(field > 254 ? 254 : field));
}

// The scale of a unit whose largest finite |x| is `amax`, by the recipe's rule.
PARAMDELTA_HOST_DEVICE inline UnitScale unit_of_amax(const Recipe& recipe, float second, float amax) {
  const DType dtype = recipe.scale_dtype;
  if (amax < recipe.floor) amax = recipe.floor;
  std::uint32_t stored = 0;
  bool zero = !(amax > 0.0f);
  if (!zero) {
    switch (recipe.rule) {
      case ScaleRule::ratio: stored = encode_scale(dtype, amax / recipe.largest); break;
      case ScaleRule::ceil2: {
        const std::uint32_t bits = bits_as<std::uint32_t>(amax / recipe.largest);
        const std::uint32_t field = (bits + 0x7FFFFFu) >> 23;
        stored = stored_power(dtype, field == 0 && dtype != DType::f8_e8m0 ? 1 : field);
        break;
      }
      case ScaleRule::near2: {
        const std::uint32_t field = (bits_as<std::uint32_t>(amax) + 0x200000u) >> 23;
        stored = stored_power(dtype, field < 2 ? 0 : field - 2);
        break;
      }
      case ScaleRule::inverse: {
        const float ratio = 448.0f / amax;
        const float factor = ratio < 448.0f * 512.0f ? ratio : 448.0f * 512.0f;
        UnitScale unit;
        unit.stored = encode_scale(dtype, 1.0f / factor);
        unit.scale = decode_scale(dtype, unit.stored);
        unit.factor = factor;
        return unit;
      }
      case ScaleRule::nv_multiply: {
        const float ratio = amax / (6.0f * second);
        zero = ratio == 0.0f;
        stored = encode_scale(dtype, ratio < 0x1p-9f ? 0x1p-9f : ratio > 448.0f ? 448.0f : ratio);
        break;
      }
      case ScaleRule::nv_divide: {
        const float ratio = second * (amax / 6.0f);
        stored = encode_scale(dtype, ratio > 448.0f ? 448.0f : ratio);
        break;
      }
    }
    // A scale that underflows would divide by zero: it becomes what a unit of zeros has.
    zero = zero || (stored == 0 && dtype != DType::f8_e8m0);
  }
  if (zero) stored = encode_scale(dtype, recipe.zero);
  return unit_of_stored(recipe, second, dtype, stored);
}

PARAMDELTA_HOST_DEVICE inline bool is_power_of_two(float scale) {
  const std::uint32_t bits = bits_as<std::uint32_t>(scale);
  return bits >= 0x00800000u && bits < 0x7F800000u && (bits & 0x7FFFFFu) == 0;
}

// The code of x · factor or x / factor, to nearest even; ±Inf gives the largest code, NaN that of NaN or else of 0.
// E2M1 has a sign where y < 0; f8_e4m3 has that of y always.
PARAMDELTA_HOST_DEVICE inline std::uint32_t encode_code(Codec codec, float y) {
  if (codec == Codec::f8_e4m3) {
    if (y != y) return 0x7F;
    return encode<DType::f8_e4m3>(static_cast<double>(y)).code;
  }
  if (codec == Codec::f4) {
    const float m = y < 0.0f ? -y : y;  // NaN passes none of the tests
    const std::uint32_t code = (m > 0.25f ? 1u : 0u) + (m >= 0.75f ? 1u : 0u) + (m > 1.25f ? 1u : 0u) +
                               (m >= 1.75f ? 1u : 0u) + (m > 2.5f ? 1u : 0u) + (m >= 3.5f ? 1u : 0u) +
                               (m > 5.0f ? 1u : 0u);
    return code | (y < 0.0f ? 8u : 0u);
  }
  if (y != y) return 8;
  const float clamped = y < -8.0f ? -8.0f : y > 7.0f ? 7.0f : y;
  // To nearest even by integers: k ≤ clamped < k + 1.
  int k = static_cast<int>(clamped);
  if (static_cast<float>(k) > clamped) --k;
  const float rest = clamped - static_cast<float>(k);
  if (rest > 0.5f || (rest == 0.5f && (k & 1) != 0)) ++k;
  return static_cast<std::uint32_t>(k + 8);
}

// The number that a code of eight or four bits stands for, before its scale; i4 with its zero point at 8.
PARAMDELTA_HOST_DEVICE inline double decode_code(Codec codec, std::uint32_t code) {
  constexpr double kE2M1[8] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
  switch (codec) {
    case Codec::f8_e4m3: return decode<DType::f8_e4m3>(static_cast<std::uint8_t>(code));
    case Codec::f8_e5m2: return decode<DType::f8_e5m2>(static_cast<std::uint8_t>(code));
    case Codec::f8_e4m3fnuz:
    case Codec::f8_e5m2fnuz: {
      // As the types above, with one more in the exponent's bias, no Inf, and −0 for the only NaN.
      if (code == 0x80) return bits_as<double>(Format<DType::f64>::nan);
      const int mantissa = codec == Codec::f8_e4m3fnuz ? 3 : 2;
      const int bias = codec == Codec::f8_e4m3fnuz ? 8 : 16;
      const std::uint32_t field = (code & 0x7F) >> mantissa, low = code & ((1u << mantissa) - 1);
      const double significand = static_cast<double>(field == 0 ? low : low + (1u << mantissa));
      const int exponent = static_cast<int>(field == 0 ? 1 : field) - bias - mantissa;
      const double power = bits_as<double>(static_cast<std::uint64_t>(1023 + exponent) << 52);
      return (code & 0x80) ? -(significand * power) : significand * power;
    }
    case Codec::f4: return (code & 8) ? -kE2M1[code & 7] : kE2M1[code & 7];
    default: return static_cast<double>(static_cast<int>(code) - 8);
  }
}

}  // namespace paramdelta

// Codes of a row of values, and what quantising lost. Included like tile-inl.hpp, by scaled-inl.hpp. The values are
// finite and the factors are finite and not zero.

// To nearest even by integers, as narrow() of tile-inl.hpp, of |y| up to the largest code; beyond it, that. Returns the
// code without its sign; `value` is the magnitude that it stands for.
template <Codec C>
inline std::uint32_t magnitude_code(std::uint32_t magnitude, float& value) {
  constexpr std::uint32_t mantissa = C == Codec::f4 ? 1 : 3;
  constexpr std::uint32_t bias = C == Codec::f4 ? 1 : 7;
  constexpr std::uint32_t limit = C == Codec::f4 ? 0x40C00000u : 0x43E00000u;  // 6, 448
  constexpr std::uint32_t shift = 23 - mantissa;
  constexpr std::uint32_t smallest = (127 + 1 - bias) << 23;
  constexpr std::uint32_t align = (127 + 1 - bias - mantissa + 23) << 23;
  const std::uint32_t m = magnitude < limit ? magnitude : limit;
  const std::uint32_t normal =
      ((m + ((1u << (shift - 1)) - 1) + ((m >> shift) & 1u)) >> shift) - ((127 - bias) << mantissa);
  const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(m) + bits_as<float>(align)) - align;
  const std::uint32_t code = m < smallest ? subnormal : normal;
  value = bits_as<float>(code << shift) * bits_as<float>((127 + 127 - bias) << 23);
  return code;
}

// kPlaces columns share a factor and two weights. Codes go to `out`, one to a byte.
template <Codec C, bool kMultiply, std::size_t kPlaces>
inline void encode_codes(const float* x, const ScaledWork& work, std::size_t n, unsigned char* out, float* errors,
                         float* values) {
  float error[kChunk], value[kChunk];
  for (std::size_t i = 0; i < kChunk; ++i) error[i] = errors[i];
  for (std::size_t i = 0; i < kChunk; ++i) value[i] = values[i];
  for (std::size_t first = 0; first < n; first += kChunk) {
    for (std::size_t i = 0; i < kChunk; ++i) {
      const std::size_t place = (first + i) / kPlaces;
      const float factor = work.factor[place];
      const float y = kMultiply ? x[first + i] * factor : x[first + i] / factor;
      const std::uint32_t bits = bits_as<std::uint32_t>(y);
      const float magnitude = bits_as<float>(bits & 0x7FFFFFFFu);
      float lost;
      if constexpr (C == Codec::i4) {
        const float low = y < -8.0f ? -8.0f : y;
        const float clamped = low > 7.0f ? 7.0f : low;
        const float shifted = clamped + 12582912.0f;  // 1.5 · 2^23: its last place is 1
        out[first + i] = static_cast<unsigned char>(bits_as<std::uint32_t>(shifted) - 0x4B400000u + 8u);
        lost = (shifted - 12582912.0f) - y;
      } else {
        float near;
        const std::uint32_t code = magnitude_code<C>(bits & 0x7FFFFFFFu, near);
        if constexpr (C == Codec::f4)
          out[first + i] = static_cast<unsigned char>(code | (y < 0.0f ? 8u : 0u));
        else
          out[first + i] = static_cast<unsigned char>(code | ((bits >> 24) & 0x80u));
        lost = near - magnitude;
      }
      lost = lost * work.error_weight[place];
      const float kept = magnitude * work.weight[place];
      error[i] = error[i] + lost * lost;
      value[i] = value[i] + kept * kept;
    }
  }
  for (std::size_t i = 0; i < kChunk; ++i) errors[i] = error[i];
  for (std::size_t i = 0; i < kChunk; ++i) values[i] = value[i];
}

inline void pack_nibbles(const unsigned char* codes, std::size_t n, unsigned char* out) {
  for (std::size_t i = 0; i < n / 2; ++i) out[i] = static_cast<unsigned char>(codes[2 * i] | (codes[2 * i + 1] << 4));
}

template <Codec C, bool kMultiply>
inline void encode_row_as(const float* x, ScaledWork& work, std::size_t n, bool by_chunk) {
  unsigned char codes[kTileCols];
  unsigned char* to = C == Codec::f8_e4m3 ? work.out : codes;
  if (by_chunk)
    encode_codes<C, kMultiply, kChunk>(x, work, n, to, work.error, work.value);
  else
    encode_codes<C, kMultiply, 1>(x, work, n, to, work.error, work.value);
  if (C != Codec::f8_e4m3) pack_nibbles(codes, n, work.out);
}

// Codes of `n` columns, a multiple of kStep, to work.out, by the factors and weights in `work`.
inline void encode_row(const Recipe& recipe, const float* x, ScaledWork& work, std::size_t n, bool by_chunk) {
  const bool multiply = multiplies(recipe);
  switch (recipe.codec) {
    case Codec::f4:
      return multiply ? encode_row_as<Codec::f4, true>(x, work, n, by_chunk)
                      : encode_row_as<Codec::f4, false>(x, work, n, by_chunk);
    case Codec::i4:
      return multiply ? encode_row_as<Codec::i4, true>(x, work, n, by_chunk)
                      : encode_row_as<Codec::i4, false>(x, work, n, by_chunk);
    default:
      return multiply ? encode_row_as<Codec::f8_e4m3, true>(x, work, n, by_chunk)
                      : encode_row_as<Codec::f8_e4m3, false>(x, work, n, by_chunk);
  }
}

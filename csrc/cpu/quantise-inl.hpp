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
  const std::uint32_t code = static_cast<std::int32_t>(m) < static_cast<std::int32_t>(smallest) ? subnormal : normal;
  value = bits_as<float>(code << shift) * bits_as<float>((127 + 127 - bias) << 23);
  return code;
}

#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
// By hand, 16 columns at a time, because the compiler spills what the loop below keeps between its stages. The steps
// are those of encode_block(). Two to a byte are packed here: of two codes in 64 bits, v | v >> 28 has both in its low
// byte.
template <Codec C, bool kMultiply, std::size_t kPlaces>
inline void encode_codes(const float* x, ScaledWork& work, std::size_t n, unsigned char* out) {
  constexpr unsigned mantissa = C == Codec::f4 ? 1 : 3;
  constexpr unsigned bias = C == Codec::f4 ? 1 : 7;
  constexpr unsigned shift = 23 - mantissa;
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  const __m512i limit = _mm512_set1_epi32(C == Codec::f4 ? 0x40C00000 : 0x43E00000);
  const __m512i smallest = _mm512_set1_epi32((127 + 1 - bias) << 23);
  const __m512i align = _mm512_set1_epi32((127 + 1 - bias - mantissa + 23) << 23);
  const __m512i up = _mm512_set1_epi32(static_cast<int>((1u << (shift - 1)) - 1 - ((127 - bias) << 23)));
  const __m512i one = _mm512_set1_epi32(1);
  const __m512 rebias = _mm512_castsi512_ps(_mm512_set1_epi32((127 + 127 - bias) << 23));
  __m512 error = _mm512_load_ps(work.error), value = _mm512_load_ps(work.value);
  for (std::size_t i = 0; i < n; i += kChunk) {
    __m512 factor, weight, error_weight;
    if constexpr (kPlaces == 1) {
      factor = _mm512_load_ps(work.factor + i);
      weight = _mm512_load_ps(work.weight + i);
      error_weight = _mm512_load_ps(work.error_weight + i);
    } else {
      factor = _mm512_set1_ps(work.factor[i / kChunk]);
      weight = _mm512_set1_ps(work.weight[i / kChunk]);
      error_weight = _mm512_set1_ps(work.error_weight[i / kChunk]);
    }
    const __m512 v = _mm512_loadu_ps(x + i);
    const __m512 y = kMultiply ? _mm512_mul_ps(v, factor) : _mm512_div_ps(v, factor);
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i magnitude = _mm512_and_si512(bits, magnitude_bits);
    __m512i codes;
    __m512 lost;
    if constexpr (C == Codec::i4) {
      const __m512 low = _mm512_maskz_max_ps(0xFFFF, y, _mm512_set1_ps(-8.0f));
      const __m512 clamped = _mm512_maskz_min_ps(0xFFFF, low, _mm512_set1_ps(7.0f));
      const __m512 shifted = _mm512_add_ps(clamped, _mm512_set1_ps(12582912.0f));
      codes = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4B400000 - 8));
      lost = _mm512_sub_ps(_mm512_sub_ps(shifted, _mm512_set1_ps(12582912.0f)), y);
    } else {
      const __m512i m = _mm512_maskz_min_epu32(0xFFFF, magnitude, limit);
      const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(0xFFFF, m, shift), one);
      const __m512i normal = _mm512_maskz_srli_epi32(0xFFFF, _mm512_add_epi32(_mm512_add_epi32(m, up), odd), shift);
      const __m512 aligned = _mm512_add_ps(_mm512_castsi512_ps(m), _mm512_castsi512_ps(align));
      const __mmask16 small = _mm512_cmplt_epi32_mask(m, smallest);
      codes = _mm512_mask_sub_epi32(normal, small, _mm512_castps_si512(aligned), align);
      const __m512 near = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, codes, shift)), rebias);
      lost = _mm512_sub_ps(near, _mm512_castsi512_ps(magnitude));
    }
    lost = _mm512_mul_ps(lost, error_weight);
    const __m512 kept = _mm512_mul_ps(y, weight);
    error = _mm512_add_ps(error, _mm512_mul_ps(lost, lost));
    value = _mm512_add_ps(value, _mm512_mul_ps(kept, kept));
    if constexpr (C == Codec::f8_e4m3) {
      const __m512i sign = _mm512_maskz_srli_epi32(0xFFFF, bits, 24);
      codes = _mm512_ternarylogic_epi32(codes, sign, _mm512_set1_epi32(0x80), 0xF8);  // a | (b & c)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_maskz_cvtepi32_epi8(0xFFFF, codes));
    } else {
      if constexpr (C == Codec::f4)
        codes = _mm512_mask_or_epi32(codes, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), codes,
                                     _mm512_set1_epi32(8));
      codes = _mm512_or_si512(codes, _mm512_maskz_srli_epi64(0xFF, codes, 28));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm512_maskz_cvtepi64_epi8(0xFF, codes));
    }
  }
  _mm512_store_ps(work.error, error);
  _mm512_store_ps(work.value, value);
}
#else
// kBlock columns, in stages that the compiler vectorises. Returns codes, one to a word.
template <Codec C, bool kMultiply>
inline void encode_block(const float* x, const float* factor, std::uint32_t* codes, float* y, float* lost) {
  for (std::size_t i = 0; i < kBlock; ++i) y[i] = kMultiply ? x[i] * factor[i] : x[i] / factor[i];
  if constexpr (C == Codec::i4) {
    for (std::size_t i = 0; i < kBlock; ++i) {
      const float low = y[i] < -8.0f ? -8.0f : y[i];
      const float clamped = low > 7.0f ? 7.0f : low;
      const float shifted = clamped + 12582912.0f;  // 1.5 · 2^23: its last place is 1
      codes[i] = bits_as<std::uint32_t>(shifted) - 0x4B400000u + 8u;
      lost[i] = (shifted - 12582912.0f) - y[i];
    }
  } else {
    for (std::size_t i = 0; i < kBlock; ++i) {
      const std::uint32_t bits = bits_as<std::uint32_t>(y[i]);
      float near;
      const std::uint32_t code = magnitude_code<C>(bits & 0x7FFFFFFFu, near);
      lost[i] = near - bits_as<float>(bits & 0x7FFFFFFFu);
      const std::uint32_t sign = C == Codec::f4 ? (y[i] < 0.0f ? 8u : 0u) : ((bits >> 24) & 0x80u);
      codes[i] = code | sign;
    }
  }
}

// kPlaces columns share a factor and two weights.
template <Codec C, bool kMultiply, std::size_t kPlaces>
inline void encode_codes(const float* x, ScaledWork& work, std::size_t n, unsigned char* out) {
  float factor[kBlock], y[kBlock], lost[kBlock];
  std::uint32_t codes[kBlock];
  float error[kChunk], value[kChunk];
  std::memcpy(error, work.error, sizeof(error));
  std::memcpy(value, work.value, sizeof(value));
  for (std::size_t first = 0; first < n; first += kBlock) {
    for (std::size_t k = 0; k < kBlock; k += kPlaces)
      for (std::size_t i = 0; i < kPlaces; ++i) factor[k + i] = work.factor[(first + k) / kPlaces];
    encode_block<C, kMultiply>(x + first, factor, codes, y, lost);
    for (std::size_t k = 0; k < kBlock; k += kChunk) {
      for (std::size_t i = 0; i < kChunk; ++i) {
        const std::size_t place = kPlaces == 1 ? first + k + i : (first + k) / kPlaces;
        const float e = lost[k + i] * work.error_weight[place];
        const float v = y[k + i] * work.weight[place];
        error[i] = error[i] + e * e;
        value[i] = value[i] + v * v;
      }
    }
    if constexpr (C == Codec::f8_e4m3) {
      for (std::size_t i = 0; i < kBlock; ++i) out[first + i] = static_cast<unsigned char>(codes[i]);
    } else {
      for (std::size_t i = 0; i < kBlock / 2; ++i)
        out[first / 2 + i] = static_cast<unsigned char>(codes[2 * i] | (codes[2 * i + 1] << 4));
    }
  }
  std::memcpy(work.error, error, sizeof(error));
  std::memcpy(work.value, value, sizeof(value));
}
#endif

template <Codec C, bool kMultiply>
inline void encode_row_as(const float* x, ScaledWork& work, std::size_t n, bool by_chunk) {
  if (by_chunk)
    encode_codes<C, kMultiply, kChunk>(x, work, n, work.out);
  else
    encode_codes<C, kMultiply, 1>(x, work, n, work.out);
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

// Codes of a row of values, and what quantising lost. Included like tile-inl.hpp, by scaled-inl.hpp. The values are
// finite and the factors are finite and not zero.

// The loops for AVX-512 make codes of f8_e4m3 from values this many powers of two smaller than those they stand for.
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
constexpr int kE4m3Down = 13;
#else
constexpr int kE4m3Down = 0;
#endif

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
// By hand, 16 columns at a time, because the compiler spills what the loop below keeps between its stages. Two to a
// byte are packed here: of two codes in 64 bits, v | v >> 28 has both in its low byte.

// Codes of y, and what rounding |y| (of i4: y) to them adds to it. A number of the binade 2^e and 2^(e + 23 − mantissa)
// add up to one whose last places are the number's own, rounded to nearest even: for e at least the exponent of the
// smallest normal number these are the code's, above 2^mantissa times the field of the exponent less 1. Of e4m3, y
// comes 2^-13 times as large, so that in the low byte nothing is left to be subtracted from exponent and sum.
template <Codec C>
inline __m512i codes_of(__m512 y, __m512& lost) {
  if constexpr (C == Codec::i4) {
    const __m512 low = _mm512_maskz_max_ps(0xFFFF, y, _mm512_set1_ps(-8.0f));
    const __m512 clamped = _mm512_maskz_min_ps(0xFFFF, low, _mm512_set1_ps(7.0f));
    const __m512 shifted = _mm512_add_ps(clamped, _mm512_set1_ps(12582912.0f));
    lost = _mm512_sub_ps(_mm512_sub_ps(shifted, _mm512_set1_ps(12582912.0f)), y);
    return _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4B400000 - 8));
  } else {
    constexpr int mantissa = C == Codec::f4 ? 1 : 3;
    constexpr int smallest = C == Codec::f4 ? 127 : 127 - 6 - kE4m3Down;
    const __m512i limit = _mm512_set1_epi32(C == Codec::f4 ? 0x40C00000 : 0x43E00000 - (kE4m3Down << 23));
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __m512i m = _mm512_maskz_min_epu32(0xFFFF, magnitude, limit);
    const __m512i binade = _mm512_maskz_max_epu32(0xFFFF, _mm512_and_si512(m, _mm512_set1_epi32(0x7F800000)),
                                                  _mm512_set1_epi32(smallest << 23));
    const __m512i above = _mm512_add_epi32(binade, _mm512_set1_epi32((23 - mantissa) << 23));
    const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(m), _mm512_castsi512_ps(above));
    lost = _mm512_sub_ps(_mm512_sub_ps(sum, _mm512_castsi512_ps(above)), _mm512_castsi512_ps(magnitude));
    const __m512i codes =
        _mm512_add_epi32(_mm512_castps_si512(sum), _mm512_maskz_srli_epi32(0xFFFF, above, 23 - mantissa));
    if constexpr (C == Codec::f8_e4m3) {
      static_assert(((127 - 6 - kE4m3Down + 20) << 3) % 256 == 0, "what the low byte of the exponent adds");
      const __m512i sign = _mm512_maskz_srli_epi32(0xFFFF, bits, 24);
      return _mm512_ternarylogic_epi32(codes, sign, _mm512_set1_epi32(0x80), 0xF8);  // a | (b & c)
    } else {
      constexpr int exponents = (127 + 22) << mantissa;  // of what lies above the smallest normal number
      const __m512i code =
          _mm512_and_si512(_mm512_sub_epi32(codes, _mm512_set1_epi32(exponents)), _mm512_set1_epi32(7));
      return _mm512_mask_or_epi32(code, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_LT_OQ), code,
                                  _mm512_set1_epi32(8));
    }
  }
}

// kPlaces columns share a factor and two weights; where it is 1, each has its own.
template <Codec C, bool kMultiply, std::size_t kPlaces>
inline void encode_codes(const float* x, ScaledWork& work, std::size_t n, unsigned char* out) {
  constexpr std::size_t step = kPlaces == 1 ? kChunk : kPlaces;
  __m512 error = _mm512_load_ps(work.error), value = _mm512_load_ps(work.value);
  for (std::size_t first = 0; first < n; first += step) {
    __m512 factor, weight, error_weight;
    if constexpr (kPlaces == 1) {
      factor = _mm512_load_ps(work.factor + first);
      weight = _mm512_load_ps(work.weight + first);
      error_weight = _mm512_load_ps(work.error_weight + first);
    } else {
      factor = _mm512_set1_ps(work.factor[first / kChunk]);
      weight = _mm512_set1_ps(work.weight[first / kChunk]);
      error_weight = _mm512_set1_ps(work.error_weight[first / kChunk]);
    }
    // For the report: no bit of the output depends on these sums, so they may be fused.
    __m512 lost_here = _mm512_setzero_ps(), kept_here = _mm512_setzero_ps();
    for (std::size_t i = first; i < first + step; i += kChunk) {
      const __m512 v = _mm512_loadu_ps(x + i);
      const __m512 y = kMultiply ? _mm512_mul_ps(v, factor) : _mm512_div_ps(v, factor);
      __m512 lost;
      __m512i codes = codes_of<C>(y, lost);
      lost_here = _mm512_fmadd_ps(lost, lost, lost_here);
      kept_here = _mm512_fmadd_ps(y, y, kept_here);
      if constexpr (C == Codec::f8_e4m3) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_maskz_cvtepi32_epi8(0xFFFF, codes));
      } else {
        codes = _mm512_or_si512(codes, _mm512_maskz_srli_epi64(0xFF, codes, 28));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i / 2), _mm512_maskz_cvtepi64_epi8(0xFF, codes));
      }
    }
    // Columns without weight are left to the literal path, and may hold anything.
    const __mmask16 counts = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    error =
        _mm512_mask_add_ps(error, counts, error, _mm512_mul_ps(_mm512_mul_ps(lost_here, error_weight), error_weight));
    value = _mm512_mask_add_ps(value, counts, value, _mm512_mul_ps(_mm512_mul_ps(kept_here, weight), weight));
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
        const bool counts = work.weight[place] != 0.0f;  // else left to the literal path: it may be anything
        error[i] = error[i] + (counts ? e * e : 0.0f);
        value[i] = value[i] + (counts ? v * v : 0.0f);
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
inline void encode_row_as(const float* x, ScaledWork& work, std::size_t n, std::size_t places) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  if (places == kWide) return encode_codes<C, kMultiply, kWide>(x, work, n, work.out);
#endif
  if (places >= kChunk)
    encode_codes<C, kMultiply, kChunk>(x, work, n, work.out);
  else
    encode_codes<C, kMultiply, 1>(x, work, n, work.out);
}

// Codes of `n` columns, a multiple of kStep, to work.out, by the factors and weights in `work`, which `places` columns
// share.
inline void encode_row(const Recipe& recipe, const float* x, ScaledWork& work, std::size_t n, std::size_t places) {
  const bool multiply = multiplies(recipe);
  switch (recipe.codec) {
    case Codec::f4:
      return multiply ? encode_row_as<Codec::f4, true>(x, work, n, places)
                      : encode_row_as<Codec::f4, false>(x, work, n, places);
    case Codec::i4:
      return multiply ? encode_row_as<Codec::i4, true>(x, work, n, places)
                      : encode_row_as<Codec::i4, false>(x, work, n, places);
    default:
      return multiply ? encode_row_as<Codec::f8_e4m3, true>(x, work, n, places)
                      : encode_row_as<Codec::f8_e4m3, false>(x, work, n, places);
  }
}

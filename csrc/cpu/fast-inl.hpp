// The fused lane for out = new_base + (post − base) where all four have one type, bf16, f16 or f32. Included like
// tile-inl.hpp. Each function returns whether the tile must be done again by the general lane; its output is then
// meaningless.
//
// d = post − base is computed as z = (base − post) + 0, s as new_base − z: the same values, and because z is never −0,
// an element whose post equals its base keeps new_base's own −0.
//
// bf16 and f16 work in binary32. Write x for the exact new_base + d, and let d be exact, which the test by Fast2Sum
// proves: of the two tests p + z = b and b − z = p, the one that belongs to the larger operand fails exactly when z is
// inexact. The contract wants round(fl64(x)); the lane has round(fl32(x)). Rounding is monotone and every boundary t
// between two codes is both a binary32 and a binary64, so fl32(x) > t implies x > t and fl64(x) ≥ t; fl64(x) = t would
// need |x − t| below binary64's half place, and then fl32(x) = t. Hence the two agree unless fl32(x) is itself a
// boundary (a tie) and inexact; that is what the last test looks for, by Fast2Sum again. With f16, an exact d is a
// multiple of 2^-24, so s is inexact only for |s| ≥ 1, in the normal range, where a boundary ends in 0x1000.
//
// The tests compare bits, and gather them by "or", all but the sign. So they take ±0 for equal, as they should, and
// would take v for −v; but p + z = −b would mean that the rounding of b − p to z was off by 2|b|, while −p is a number
// and only |b| away; likewise for the other tests. NaN and Inf need no test of their own: wherever one comes up, s is
// NaN or infinite, and the output is looked at for those (and for overflow). A NaN s ends in 16 zero bits (13 with
// f16), as every NaN that an operation passes on or makes here does, so rounding cannot carry out of it.
//
// f32 works in binary64, and is the contract itself.

template <DType D>
inline bool fast_tile(const void* post, const void* base, const void* new_base, void* out, std::size_t n);

// Differing bits of two numbers, gathered by "or"; the caller looks at all but the sign, which differs for zeros only.
inline std::uint32_t differ(float a, float b) { return bits_as<std::uint32_t>(a) ^ bits_as<std::uint32_t>(b); }

#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
// By hand, because this loop is bound by instructions where memory is fast: ternary logic gathers in one instruction
// what the compiler makes two of, masks replace selects, and a 16-bit maximum serves both halves of a word.
constexpr int kOrXor = 0xF6;  // ternary logic a | (b ^ c)

inline __m512i gather(__m512i bad, __m512 a, __m512 b) {
  return _mm512_ternarylogic_epi32(bad, _mm512_castps_si512(a), _mm512_castps_si512(b), kOrXor);
}

// 16 elements of bf16, all as binary32: returns s rounded, in the upper halves, and gathers in `bad`. The steps are
// those of the portable fast_bf16() below.
inline __m512i fast_bf16(__m512i post, __m512i base, __m512i new_base, __m512i& bad) {
  const __m512 p = _mm512_castsi512_ps(post), b = _mm512_castsi512_ps(base), x = _mm512_castsi512_ps(new_base);
  const __m512 z = _mm512_add_ps(_mm512_sub_ps(b, p), _mm512_setzero_ps());
  const __m512 s = _mm512_sub_ps(x, z);
  bad = gather(bad, _mm512_add_ps(p, z), b);
  bad = gather(bad, _mm512_sub_ps(b, z), p);
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(s), _mm512_set1_epi32(0x8000));
  const __mmask16 tie = _mm512_testn_epi32_mask(up, _mm512_set1_epi32(0xFFFF));
  const __m512i inexact = gather(_mm512_castps_si512(_mm512_xor_ps(_mm512_sub_ps(x, s), z)), _mm512_add_ps(s, z), x);
  bad = _mm512_mask_or_epi32(bad, tie, bad, inexact);
  return _mm512_mask_andnot_epi32(up, tie, _mm512_set1_epi32(0x10000), up);
}

template <>
inline bool fast_tile<DType::bf16>(const void* post, const void* base, const void* new_base, void* out, std::size_t n) {
  const Code32* ps = static_cast<const Code32*>(post);
  const Code32* bs = static_cast<const Code32*>(base);
  const Code32* ns = static_cast<const Code32*>(new_base);
  Code32* os = static_cast<Code32*>(out);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  __m512i bad = _mm512_setzero_si512(), largest = _mm512_setzero_si512();
  for (std::size_t i = 0; i < n / 2; i += 16) {
    const __m512i p = _mm512_loadu_si512(ps + i), b = _mm512_loadu_si512(bs + i), x = _mm512_loadu_si512(ns + i);
    const __m512i low = fast_bf16(_mm512_slli_epi32(p, 16), _mm512_slli_epi32(b, 16), _mm512_slli_epi32(x, 16), bad);
    const __m512i high =
        fast_bf16(_mm512_and_si512(p, upper), _mm512_and_si512(b, upper), _mm512_and_si512(x, upper), bad);
    const __m512i codes = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(low, 16), high);
    largest = _mm512_max_epu16(largest, _mm512_add_epi16(codes, codes));  // doubled: without the sign
    _mm512_storeu_si512(os + i, codes);
  }
  return _mm512_test_epi32_mask(bad, _mm512_set1_epi32(0x7FFFFFFF)) != 0 ||
         _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<short>(0xFF00))) != 0;
}
#else
// One element of bf16, all as binary32: returns s rounded, in the upper half of the word, and gathers in `bad`.
inline std::uint32_t fast_bf16(float p, float b, float x, std::uint32_t& bad) {
  const float z = (b - p) + 0.0f;
  const float s = x - z;
  bad |= differ(p + z, b) | differ(b - z, p);
  // Half up; a tie leaves zeros below, and then the last place kept must become even.
  const std::uint32_t up = bits_as<std::uint32_t>(s) + 0x8000u;
  const std::uint32_t tie = (up & 0xFFFFu) == 0 ? ~0u : 0u;
  bad |= tie & (differ(x - s, z) | differ(s + z, x));
  return up & ~(tie & 0x10000u);
}

// Two elements per 32-bit word: the lower is shifted up, the upper is masked, and no lane ever moves.
template <>
inline bool fast_tile<DType::bf16>(const void* post, const void* base, const void* new_base, void* out, std::size_t n) {
  const Code32* ps = static_cast<const Code32*>(post);
  const Code32* bs = static_cast<const Code32*>(base);
  const Code32* ns = static_cast<const Code32*>(new_base);
  Code32* os = static_cast<Code32*>(out);
  std::uint32_t bad = 0;
  std::uint32_t largest_low = 0, largest_high = 0;
  for (std::size_t i = 0; i < n / 2; ++i) {
    const std::uint32_t p = ps[i], b = bs[i], x = ns[i];
    const std::uint32_t low = fast_bf16(bits_as<float>(p << 16), bits_as<float>(b << 16), bits_as<float>(x << 16), bad);
    const std::uint32_t high = fast_bf16(bits_as<float>(p & 0xFFFF0000u), bits_as<float>(b & 0xFFFF0000u),
                                         bits_as<float>(x & 0xFFFF0000u), bad);
    const std::uint32_t word = (low >> 16) | (high & 0xFFFF0000u);
    largest_low = larger(largest_low, word << 17);
    largest_high = larger(largest_high, word & 0x7FFFFFFFu);
    os[i] = word;
  }
  return (bad & 0x7FFFFFFFu) != 0 || largest_low >= 0xFF000000u || largest_high >= 0x7F800000u;
}
#endif

// One rounding each, to nearest even, whatever the floating-point mode. NaN and overflow are the caller's to notice.
inline void floats_to_halves(const float* in, Code16* out) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  for (std::size_t i = 0; i < kBlock; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(in + i), 0));
#elif PARAMDELTA_TARGET == PARAMDELTA_AVX2
  for (std::size_t i = 0; i < kBlock; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#else
  // As narrow() of tile-inl.hpp, from binary32: adding 1/2 aligns its last place with the quantum 2^-24.
  for (std::size_t i = 0; i < kBlock; ++i) {
    const std::uint32_t u = bits_as<std::uint32_t>(in[i]);
    const std::uint32_t magnitude = u & 0x7FFFFFFFu;
    const std::uint32_t normal = ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    const std::uint32_t code = magnitude < 0x38800000u ? subnormal : normal;
    out[i] = static_cast<std::uint16_t>(code | ((u >> 16) & 0x8000u));
  }
#endif
}

template <>
inline bool fast_tile<DType::f16>(const void* post, const void* base, const void* new_base, void* out, std::size_t n) {
  alignas(64) float ps[kBlock], bs[kBlock], xs[kBlock];
  std::uint32_t bad = 0;
  std::uint32_t largest = 0;
  for (std::size_t first = 0; first < n; first += kBlock) {
    block_to_floats<DType::f16>(static_cast<const Code16*>(post) + first, ps);
    block_to_floats<DType::f16>(static_cast<const Code16*>(base) + first, bs);
    block_to_floats<DType::f16>(static_cast<const Code16*>(new_base) + first, xs);
    for (std::size_t i = 0; i < kBlock; ++i) {
      const float p = ps[i], b = bs[i], x = xs[i];
      const float z = (b - p) + 0.0f;
      const float s = x - z;
      const std::uint32_t u = bits_as<std::uint32_t>(s);
      const std::uint32_t tie = (u & 0x1FFFu) == 0x1000u ? ~0u : 0u;
      bad |= differ(p + z, b) | differ(b - z, p) | (tie & (differ(x - s, z) | differ(s + z, x)));
      largest = larger(largest, u & 0x7FFFFFFFu);
      xs[i] = s;
    }
    floats_to_halves(xs, static_cast<Code16*>(out) + first);
  }
  return (bad & 0x7FFFFFFFu) != 0 || largest >= 0x477FF000u;  // 65520 and above round to Inf; NaN lies above too
}

template <>
inline bool fast_tile<DType::f32>(const void* post, const void* base, const void* new_base, void* out, std::size_t n) {
  const Code32* ps = static_cast<const Code32*>(post);
  const Code32* bs = static_cast<const Code32*>(base);
  const Code32* ns = static_cast<const Code32*>(new_base);
  Code32* os = static_cast<Code32*>(out);
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double z = (static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(bs[i]))) -
                      static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(ps[i])))) +
                     0.0;
    const float s = static_cast<float>(static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(ns[i]))) - z);
    const std::uint32_t u = bits_as<std::uint32_t>(s);
    largest = larger(largest, u & 0x7FFFFFFFu);
    os[i] = u;
  }
  return largest >= 0x7F800000u;
}

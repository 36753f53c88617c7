// Loops over one tile: decode to binary64, add a term, encode. Included once per instruction set, inside its target
// region and namespace, by merge-inl.hpp. Plain loops, which the compiler vectorises; intrinsics only where it cannot.
//
// Every loop takes a multiple of kStep elements, so none has a remainder; merge-inl.hpp pads the last tile of a range.

// Reads that need no alignment and may alias anything.
typedef std::uint8_t Code8 __attribute__((aligned(1), may_alias));
typedef std::uint16_t Code16 __attribute__((aligned(1), may_alias));
typedef std::uint32_t Code32 __attribute__((aligned(1), may_alias));
typedef std::uint64_t Code64 __attribute__((aligned(1), may_alias));

template <std::size_t>
struct CodeOf;
template <>
struct CodeOf<1> {
  using type = Code8;
};
template <>
struct CodeOf<2> {
  using type = Code16;
};
template <>
struct CodeOf<4> {
  using type = Code32;
};
template <>
struct CodeOf<8> {
  using type = Code64;
};
template <DType D>
using Code = typename CodeOf<sizeof(typename Format<D>::Code)>::type;

inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// A stored code as binary32, without branches; for the types that binary32 holds.
template <DType D>
inline float widen(std::uint32_t code) {
  using F = Format<D>;
  if constexpr (D == DType::f32) {
    return bits_as<float>(code);
  } else if constexpr (D == DType::bf16) {
    return bits_as<float>(code << 16);
  } else {
    // The exponent field is moved to binary32's place and rebiased by an exact product, which also turns the format's
    // subnormals into normal numbers.
    constexpr std::uint32_t sign_bit = static_cast<std::uint32_t>(F::sign);
    constexpr std::uint32_t largest = static_cast<std::uint32_t>(F::largest);
    const std::uint32_t sign = (code & sign_bit) << (32 - F::width);
    const std::uint32_t magnitude = code & (sign_bit - 1);
    const float rebias = bits_as<float>(static_cast<std::uint32_t>(127 + 127 - F::bias) << 23);
    const float value = bits_as<float>(magnitude << (23 - F::mantissa)) * rebias;
    const std::uint32_t special = magnitude > largest ? (F::has_inf ? 0x7F800000u : 0x7FC00000u) : 0u;
    return bits_as<float>(bits_as<std::uint32_t>(value) | special | sign);
  }
}

// Where the processor converts f16 to binary32, f16 and the fp8 types go that way, in blocks that stay in L1: its
// conversion has no form that a plain loop is turned into. e5m2 is the upper half of an f16; e4m3 is one but for its
// exponent's bias, which an exact product corrects.
constexpr std::size_t kBlock = 64;
static_assert(kStep % kBlock == 0, "a tile is whole blocks");

#if PARAMDELTA_TARGET != PARAMDELTA_SCALAR
inline void halves_to_floats(const Code16* in, float* out) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  for (std::size_t i = 0; i < kBlock; i += 16)
    _mm512_storeu_ps(out + i,
                     _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#else
  for (std::size_t i = 0; i < kBlock; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
}
#endif

// kBlock elements as binary32; f64 is rounded to it.
template <DType D>
inline void block_to_floats(const Code<D>* in, float* out) {
  if constexpr (D == DType::f64) {
    for (std::size_t i = 0; i < kBlock; ++i)
      out[i] = static_cast<float>(bits_as<double>(static_cast<std::uint64_t>(in[i])));
    return;
  }
#if PARAMDELTA_TARGET != PARAMDELTA_SCALAR
  if constexpr (D == DType::f16) {
    halves_to_floats(in, out);
    return;
  }
  if constexpr (D == DType::f8_e5m2 || D == DType::f8_e4m3) {
    std::uint16_t halves[kBlock];
    for (std::size_t i = 0; i < kBlock; ++i) {
      const std::uint16_t code = in[i];
      if constexpr (D == DType::f8_e5m2)
        halves[i] = static_cast<std::uint16_t>(code << 8);
      else
        halves[i] = static_cast<std::uint16_t>(((code & 0x80) << 8) | ((code & 0x7F) << 7) |
                                               ((code & 0x7F) == 0x7F ? 0x7E00 : 0));
    }
    halves_to_floats(reinterpret_cast<const Code16*>(halves), out);
    if constexpr (D == DType::f8_e4m3)
      for (std::size_t i = 0; i < kBlock; ++i) out[i] = out[i] * 256.0f;
    return;
  }
#endif
  if constexpr (D != DType::f64)
    for (std::size_t i = 0; i < kBlock; ++i) out[i] = widen<D>(in[i]);
}

template <DType D>
inline void decode_tile(const void* source, float* out, std::size_t n) {
  for (std::size_t i = 0; i < n; i += kBlock) block_to_floats<D>(static_cast<const Code<D>*>(source) + i, out + i);
}

template <DType D>
inline void decode_tile(const void* source, double* out, std::size_t n) {
  const Code<D>* in = static_cast<const Code<D>*>(source);
  if constexpr (D == DType::f64) {
    for (std::size_t i = 0; i < n; ++i) out[i] = bits_as<double>(static_cast<std::uint64_t>(in[i]));
  } else {
    float block[kBlock];
    for (std::size_t first = 0; first < n; first += kBlock) {
      block_to_floats<D>(in + first, block);
      for (std::size_t i = 0; i < kBlock; ++i) out[first + i] = static_cast<double>(block[i]);
    }
  }
}

// acc += alpha · (post − base), product and sum rounded separately. A zero delta becomes −0, the one number whose
// addition changes nothing, not even the sign of −0. `Value` is binary32 where that holds both operands' type.
template <class Value>
inline void add_term_tile(const Value* post, const Value* base, double alpha, double* acc, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const double delta = static_cast<double>(post[i]) - static_cast<double>(base[i]);
    const double product = alpha * delta;
    acc[i] = acc[i] + (delta == 0.0 ? -0.0 : product);
  }
}

// One rounding to the format's precision by integers, where the result is finite. In the normal range the carry of
// `+ half` runs into the exponent as it should. Below it, adding 2^(emin − mantissa + 52) aligns binary64's last place
// with the format's quantum, so that the addition itself rounds; the sum's low bits are the code.
template <DType D>
inline std::uint64_t narrow(double x) {
  using F = Format<D>;
  constexpr int shift = 52 - F::mantissa;
  constexpr std::uint64_t half = (std::uint64_t{1} << (shift - 1)) - 1;
  constexpr std::uint64_t rebias = static_cast<std::uint64_t>(1023 - F::bias) << F::mantissa;
  constexpr std::uint64_t align = static_cast<std::uint64_t>(1023 + F::emin - F::mantissa + 52) << 52;
  const std::uint64_t bits = bits_as<std::uint64_t>(x);
  const std::uint64_t magnitude = bits & ~(std::uint64_t{1} << 63);
  const std::uint64_t normal = ((magnitude + half + ((magnitude >> shift) & 1)) >> shift) - rebias;
  const std::uint64_t subnormal = bits_as<std::uint64_t>(bits_as<double>(magnitude) + bits_as<double>(align)) - align;
  const std::uint64_t smallest = static_cast<std::uint64_t>(1023 + F::emin) << 52;
  return (magnitude < smallest ? subnormal : normal) | ((bits >> 63) << (F::width - 1));
}

// Returns whether something in the tile needs the literal path: NaN, Inf, or (for every format) |x| ≥ limit. The output
// is then meaningless.
template <DType D>
inline bool encode_tile(const double* in, void* target, std::size_t n) {
  constexpr double limit = Format<D>::limit;
  Code<D>* out = static_cast<Code<D>*>(target);
  std::uint64_t special = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double x = in[i];
    special |= bits_as<double>(bits_as<std::uint64_t>(x) & ~(std::uint64_t{1} << 63)) < limit ? 0u : 1u;
    if constexpr (D == DType::f64)
      out[i] = bits_as<std::uint64_t>(x);
    else if constexpr (D == DType::f32)
      out[i] = bits_as<std::uint32_t>(static_cast<float>(x));
    else
      out[i] = static_cast<typename Format<D>::Code>(narrow<D>(x));
  }
  return special != 0;
}

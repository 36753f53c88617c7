// The fused lane for out = new_base + (post − base) where all four have one type, bf16, f16 or f32. Included like
// tile-inl.hpp. Each function returns whether the tile must be done again by the general lane; its output is then
// meaningless.
//
// d = post − base is computed as z = (base − post) + 0, s as new_base − z: the same values, and because z is never −0,
// an element whose post equals its base keeps new_base's own −0.
//
// bf16 and f16 work in binary32. Write x for the exact new_base + d, and let d be exact, which the test by Fast2Sum
// proves: of the two tests p + z = b and b − z = p, the one that belongs to the larger operand fails exactly when z is
// inexact (and an overflow or a NaN fails one of them). The contract wants round(fl64(x)); the lane has round(fl32(x)).
// Rounding is monotone and every boundary t between two codes is both a binary32 and a binary64, so fl32(x) > t implies
// x > t and fl64(x) ≥ t; fl64(x) = t would need |x − t| below binary64's half place, and then fl32(x) = t. Hence the
// two agree unless fl32(x) is itself a boundary (a tie) and inexact; that is what the last test looks for, by Fast2Sum
// again. With f16, an exact d is a multiple of 2^-24, so s is inexact only for |s| ≥ 1, in the normal range, where
// boundaries have 0x1000 as their last 13 bits.
//
// f32 works in binary64, and is the contract itself.

template <DType D>
inline bool fast_tile(const void* post, const void* base, const void* new_base, void* out, std::size_t n);

template <>
inline bool fast_tile<DType::bf16>(const void* post, const void* base, const void* new_base, void* out,
                                   std::size_t n) {
  const Code16* ps = static_cast<const Code16*>(post);
  const Code16* bs = static_cast<const Code16*>(base);
  const Code16* ns = static_cast<const Code16*>(new_base);
  Code16* os = static_cast<Code16*>(out);
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float p = widen<DType::bf16>(ps[i]);
    const float b = widen<DType::bf16>(bs[i]);
    const float x = widen<DType::bf16>(ns[i]);
    const float z = (b - p) + 0.0f;
    const float s = x - z;
    const std::uint32_t u = bits_as<std::uint32_t>(s);
    const std::uint32_t inexact = ((x - s) != z ? 1u : 0u) | ((s + z) != x ? 1u : 0u);
    const std::uint32_t tie = (u & 0xFFFFu) == 0x8000u ? 1u : 0u;
    bad |= (tie & inexact) | ((p + z) != b ? 1u : 0u) | ((b - z) != p ? 1u : 0u);
    const std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    bad |= (rounded & 0x7F80u) == 0x7F80u ? 1u : 0u;
    os[i] = static_cast<std::uint16_t>(rounded);
  }
  return bad != 0;
}

template <>
inline bool fast_tile<DType::f16>(const void* post, const void* base, const void* new_base, void* out,
                                  std::size_t n) {
  const Code16* ps = static_cast<const Code16*>(post);
  const Code16* bs = static_cast<const Code16*>(base);
  const Code16* ns = static_cast<const Code16*>(new_base);
  Code16* os = static_cast<Code16*>(out);
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const float p = widen<DType::f16>(ps[i]);
    const float b = widen<DType::f16>(bs[i]);
    const float x = widen<DType::f16>(ns[i]);
    const float z = (b - p) + 0.0f;
    const float s = x - z;
    const std::uint32_t u = bits_as<std::uint32_t>(s);
    const std::uint32_t inexact = ((x - s) != z ? 1u : 0u) | ((s + z) != x ? 1u : 0u);
    const std::uint32_t tie = (u & 0x1FFFu) == 0x1000u ? 1u : 0u;
    bad |= (tie & inexact) | ((p + z) != b ? 1u : 0u) | ((b - z) != p ? 1u : 0u);
    const std::uint32_t magnitude = u & 0x7FFFFFFFu;
    const std::uint32_t normal = ((magnitude + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    const std::uint32_t subnormal = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    bad |= magnitude >= 0x477FF000u ? 1u : 0u;  // 65520 and above round to Inf
    const std::uint32_t code = magnitude < 0x38800000u ? subnormal : normal;
    os[i] = static_cast<std::uint16_t>(code | ((u >> 16) & 0x8000u));
  }
  return bad != 0;
}

template <>
inline bool fast_tile<DType::f32>(const void* post, const void* base, const void* new_base, void* out,
                                  std::size_t n) {
  const Code32* ps = static_cast<const Code32*>(post);
  const Code32* bs = static_cast<const Code32*>(base);
  const Code32* ns = static_cast<const Code32*>(new_base);
  Code32* os = static_cast<Code32*>(out);
  std::uint32_t bad = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double z = (static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(bs[i]))) -
                      static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(ps[i])))) +
                     0.0;
    const float s = static_cast<float>(static_cast<double>(bits_as<float>(static_cast<std::uint32_t>(ns[i]))) - z);
    const std::uint32_t u = bits_as<std::uint32_t>(s);
    bad |= (u & 0x7F800000u) == 0x7F800000u ? 1u : 0u;
    os[i] = u;
  }
  return bad != 0;
}

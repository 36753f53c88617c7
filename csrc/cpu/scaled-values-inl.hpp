// Merged values of a row of quantised matrices: decode, scale, add up, round to binary32 or bf16. Included like
// tile-inl.hpp, by scaled-inl.hpp. Loops take a multiple of kStep columns.

// How far ahead rows are fetched.
constexpr std::ptrdiff_t kRowsAhead = 2;

// kBlock codes of eight or four bits as binary32, which holds every one of their values.
template <Codec C>
inline void codes_to_floats(const unsigned char* in, float* out) {
  if constexpr (C == Codec::f8_e4m3fnuz || C == Codec::f8_e5m2fnuz) {
    constexpr int mantissa = C == Codec::f8_e4m3fnuz ? 3 : 2;
    constexpr int bias = C == Codec::f8_e4m3fnuz ? 8 : 16;
    const float rebias = bits_as<float>(static_cast<std::uint32_t>(127 + 127 - bias) << 23);
    for (std::size_t i = 0; i < kBlock; ++i) {
      const std::uint32_t code = in[i];
      const float value = bits_as<float>((code & 0x7Fu) << (23 - mantissa)) * rebias;
      const std::uint32_t nan = code == 0x80u ? 0x7FC00000u : 0u;
      out[i] = bits_as<float>(bits_as<std::uint32_t>(value) | ((code & 0x80u) << 24) | nan);
    }
  } else {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
    // A register holds the 16 values. Of a byte b in 64 bits, b | b << 28 has its halves in the low 4 bits of each 32.
    const __m512 table = C == Codec::f4 ? _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                                         -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f)
                                        : _mm512_setr_ps(-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f,
                                                         1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f);
    for (std::size_t i = 0; i < kBlock / 2; i += 8) {
      const __m512i wide = _mm512_maskz_cvtepu8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in + i)));
      const __m512i index = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
      _mm512_storeu_ps(out + 2 * i, _mm512_permutexvar_ps(index, table));
    }
#else
    const float rebias = bits_as<float>(static_cast<std::uint32_t>(127 + 126) << 23);
    for (std::size_t i = 0; i < kBlock / 2; ++i) {
      const std::uint32_t byte = in[i], low = byte & 15u, high = byte >> 4;
      if constexpr (C == Codec::f4) {
        out[2 * i] = bits_as<float>(((low & 7u) << 22) | ((low & 8u) << 28)) * rebias;
        out[2 * i + 1] = bits_as<float>(((high & 7u) << 22) | ((high & 8u) << 28)) * rebias;
      } else {
        out[2 * i] = static_cast<float>(static_cast<int>(low) - 8);
        out[2 * i + 1] = static_cast<float>(static_cast<int>(high) - 8);
      }
    }
#endif
  }
}

template <Codec C>
inline void codes_to_row(const unsigned char* in, float* out, std::size_t n) {
  constexpr std::size_t bytes = kBlock * static_cast<std::size_t>(bits_of(C)) / 8;
  for (std::size_t i = 0; i < n; i += kBlock) codes_to_floats<C>(in + i / kBlock * bytes, out + i);
}

#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
// decode_tile() of f8_e4m3 by way of f16, 32 codes at a time and without a stop in memory.
inline void decode_e4m3(const unsigned char* in, float* out, std::size_t n) {
  const __m512i seven = _mm512_set1_epi16(0x7F);
  const __m512 rebias = _mm512_set1_ps(256.0f);
  for (std::size_t i = 0; i < n; i += 32) {
    // Sign-extended, a code has its sign in bits 15 and 14 once its magnitude is in place.
    const __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(code, seven), seven);
    __m512i halves = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16(static_cast<short>(0xBF80)));
    halves = _mm512_mask_mov_epi16(halves, nan, _mm512_set1_epi16(0x7E00));
    const __m512 low = _mm512_maskz_cvtph_ps(0xFFFF, _mm512_castsi512_si256(halves));
    const __m512 high = _mm512_maskz_cvtph_ps(0xFFFF, _mm512_maskz_extracti64x4_epi64(0xFF, halves, 1));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(low, rebias));
    _mm512_storeu_ps(out + i + 16, _mm512_mul_ps(high, rebias));
  }
}
#endif

// The codes of `n` columns from column c of row r on, an even one where two share a byte, before their scales.
inline void decode_row(const Plane& plane, std::size_t r, std::size_t c, std::size_t n, unsigned char* buffer,
                       float* out) {
  const Matrix& matrix = *plane.matrix;
  const std::size_t steps = rounded_up(n);
  if (matrix.data == nullptr) {
    std::memset(out, 0, steps * sizeof(float));
    return;
  }
  const unsigned char* data = static_cast<const unsigned char*>(matrix.data) +
                              static_cast<std::ptrdiff_t>(r) * matrix.pitch + bytes_of(matrix.codec, c);
  // A tile is a short run in each of many rows, too short for the processor to see where the next begins.
  for (std::size_t at = 0; at < bytes_of(matrix.codec, n); at += 64)
    __builtin_prefetch(data + kRowsAhead * matrix.pitch + at, 0, 2);
  if (n != steps) {
    const std::size_t bytes = bytes_of(matrix.codec, n);
    std::memcpy(buffer, data, bytes);
    std::memset(buffer + bytes, 0, bytes_of(matrix.codec, steps) - bytes);
    data = buffer;
  }
  switch (matrix.codec) {
    case Codec::bf16: return decode_tile<DType::bf16>(data, out, steps);
    case Codec::f16: return decode_tile<DType::f16>(data, out, steps);
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
    case Codec::f8_e4m3: return decode_e4m3(data, out, steps);
#else
    case Codec::f8_e4m3: return decode_tile<DType::f8_e4m3>(data, out, steps);
#endif
    case Codec::f8_e5m2: return decode_tile<DType::f8_e5m2>(data, out, steps);
    case Codec::f8_e4m3fnuz: return codes_to_row<Codec::f8_e4m3fnuz>(data, out, steps);
    case Codec::f8_e5m2fnuz: return codes_to_row<Codec::f8_e5m2fnuz>(data, out, steps);
    case Codec::f4: return codes_to_row<Codec::f4>(data, out, steps);
    case Codec::i4: return codes_to_row<Codec::i4>(data, out, steps);
    default: return decode_tile<DType::f32>(data, out, steps);
  }
}

// With zero points: adds 8 − zero point, exactly, to the codes of a row.
inline void apply_zero_points(Plane& plane, std::size_t r, std::size_t c, std::size_t n, float* codes) {
  const Scales& s = plane.matrix->scales;
  const std::size_t row = r + s.zero_phase;
  const Code32* words = static_cast<const Code32*>(s.zero_points) + static_cast<std::ptrdiff_t>(row / 8) * s.zero_pitch;
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t cell = s.cols == 0 ? 0 : (c + i + s.col_phase) / s.cols;
    plane.zeros[i] = static_cast<float>(8 - static_cast<int>((words[cell] >> (row % 8 * 4)) & 15u));
  }
  for (std::size_t i = 0; i < n; ++i) codes[i] = codes[i] + plane.zeros[i];
}

inline double scale_at(const Plane& plane, std::ptrdiff_t i) {
  const Scales& s = plane.matrix->scales;
  if (plane.direct)
    return 0x1p1016 * value_scale(s.second, s.second_value, decode_scale(s.dtype, load_scale(s.dtype, s.data, i)));
  if (plane.bytes) return plane.table[static_cast<const Code8*>(s.data)[i]];
  return value_scale(s.second, s.second_value, decode_scale(s.dtype, load_scale(s.dtype, s.data, i)));
}

// The scales of `n` columns from column c of row r on: one for each chunk, or one for each column.
inline void find_scales(Plane& plane, std::size_t r, std::size_t c, std::size_t n, bool by_chunk) {
  const Scales& s = plane.matrix->scales;
  if (s.data == nullptr || plane.matrix->data == nullptr) return;
  const std::size_t grid_row = s.rows == 0 ? 0 : (r + s.row_phase) / s.rows;
  if (plane.grid_row == grid_row && plane.first == c && plane.count == n) return;
  plane.grid_row = grid_row;
  plane.first = c;
  plane.count = n;
  const std::ptrdiff_t row = static_cast<std::ptrdiff_t>(grid_row) * s.pitch;
  const std::size_t step = by_chunk ? kChunk : 1;
  const std::size_t places = (n + step - 1) / step;
  const std::size_t start = c + s.col_phase;
  for (std::size_t k = places; k < rounded_up(n) / step; ++k) plane.scales[k] = 1.0;  // of padding
  if (s.cols == 0) {
    const double scale = scale_at(plane, row);
    for (std::size_t k = 0; k < places; ++k) plane.scales[k] = scale;
    return;
  }
  const std::size_t width = s.cols / step;  // of a cell of the grid, in places
  std::ptrdiff_t cell = row + static_cast<std::ptrdiff_t>(start / s.cols);
  std::size_t k = 0, end = width - start % s.cols / step;
  for (; k < places; ++cell, end += width) {
    const double scale = scale_at(plane, cell);
    const std::size_t stop = end < places ? end : places;
    for (; k < stop; ++k) plane.scales[k] = scale;
  }
}

inline void read_row(Plane& plane, std::size_t r, std::size_t c, std::size_t n, ScaledWork& work, float* out) {
  decode_row(plane, r, c, n, work.padded, out);
  if (plane.matrix->scales.zero_points != nullptr && plane.matrix->codec == Codec::i4 && plane.matrix->data != nullptr)
    apply_zero_points(plane, r, c, n, out);
  for (std::size_t i = n; i < rounded_up(n); ++i) out[i] = 0.0f;
  find_scales(plane, r, c, n, work.by_chunk);
}

// acc = code · scale, exactly. kPlaces: columns that share a scale.
template <std::size_t kPlaces>
inline void start_row(const float* codes, const double* scales, double* acc, std::size_t n) {
  for (std::size_t k = 0; k < n / kPlaces; ++k)
    for (std::size_t i = k * kPlaces; i < (k + 1) * kPlaces; ++i) acc[i] = static_cast<double>(codes[i]) * scales[k];
}

// acc += alpha · (post − base), as add_term_tile(), of scaled operands; notes which columns a delta touches.
template <std::size_t kPlaces>
inline void add_row(const float* post, const double* post_scales, const float* base, const double* base_scales,
                    double alpha, double* acc, std::uint32_t* touched, std::size_t n) {
  for (std::size_t k = 0; k < n / kPlaces; ++k) {
    const double p = post_scales[k], b = base_scales[k];
    for (std::size_t i = k * kPlaces; i < (k + 1) * kPlaces; ++i) {
      const double delta = static_cast<double>(post[i]) * p - static_cast<double>(base[i]) * b;
      const double product = alpha * delta;
      acc[i] = acc[i] + (delta == 0.0 ? -0.0 : product);
      touched[i] |= delta == 0.0 ? 0u : 1u;
    }
  }
}

// x = acc rounded once. Whatever is not finite has all bits of the exponent set, and the literal path looks at it.
inline void round_row(const double* acc, bool to_bf16, float* x, std::uint32_t* largest, std::size_t n) {
  if (to_bf16) {
    for (std::size_t i = 0; i < n; ++i) {
      const double magnitude = bits_as<double>(bits_as<std::uint64_t>(acc[i]) & ~(std::uint64_t{1} << 63));
      const std::uint64_t code = magnitude < Format<DType::bf16>::limit ? narrow<DType::bf16>(acc[i]) : 0x7F80u;
      x[i] = bits_as<float>(static_cast<std::uint32_t>(code) << 16);
    }
  } else {
    for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(acc[i]);
  }
  for (std::size_t i = 0; i < n; ++i) largest[i] = larger(largest[i], bits_as<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
}

#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
// Eight columns of merge_chunk(), of codes as binary32.
inline __m512d merge_eight(__m256 next, __m256 post, __m256 base, __m512d ns, __m512d ps, __m512d bs, __m512d alpha,
                           __mmask8& touched) {
  const __m512d p = _mm512_mul_pd(_mm512_maskz_cvtps_pd(0xFF, post), ps);
  const __m512d b = _mm512_mul_pd(_mm512_maskz_cvtps_pd(0xFF, base), bs);
  const __m512d acc = _mm512_mul_pd(_mm512_maskz_cvtps_pd(0xFF, next), ns);
  const __m512d delta = _mm512_sub_pd(p, b);
  touched = _mm512_cmp_pd_mask(delta, _mm512_setzero_pd(), _CMP_NEQ_UQ);
  return _mm512_mask_add_pd(acc, touched, acc, _mm512_mul_pd(alpha, delta));
}

// start_row(), add_row() and round_row() of one chunk in one, for one term and one scale for each operand.
inline void merge_chunk(__m512 next, __m512 post, __m512 base, double ns, double ps, double bs, __m512d alpha,
                        ScaledWork& work, std::size_t i, float* x) {
  const __m512d n8 = _mm512_set1_pd(ns), p8 = _mm512_set1_pd(ps), b8 = _mm512_set1_pd(bs);
  __mmask8 t0, t1;
  const __m512d low = merge_eight(_mm512_castps512_ps256(next), _mm512_castps512_ps256(post),
                                  _mm512_castps512_ps256(base), n8, p8, b8, alpha, t0);
  const __m512d high =
      merge_eight(_mm512_maskz_extractf32x8_ps(0xFF, next, 1), _mm512_maskz_extractf32x8_ps(0xFF, post, 1),
                  _mm512_maskz_extractf32x8_ps(0xFF, base, 1), n8, p8, b8, alpha, t1);
  const __m512 v = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_maskz_cvtpd_ps(0xFF, low)),
                                      _mm512_maskz_cvtpd_ps(0xFF, high), 1);
  _mm512_storeu_ps(x + i, v);
  const __m512i largest = _mm512_load_si512(work.largest + i), touched = _mm512_load_si512(work.touched + i);
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
  _mm512_store_si512(work.largest + i, _mm512_maskz_max_epu32(0xFFFF, largest, bits));
  _mm512_store_si512(work.touched + i, _mm512_mask_mov_epi32(touched, _mm512_kunpackb(t1, t0), _mm512_set1_epi32(1)));
}

inline void merge_row(ScaledWork& work, const double* post_scales, const double* base_scales, double alpha, float* x,
                      std::size_t n) {
  for (std::size_t i = 0; i < n; i += kChunk)
    merge_chunk(_mm512_load_ps(work.next + i), _mm512_load_ps(work.post + i), _mm512_load_ps(work.base + i),
                work.new_base.scales[i / kChunk], post_scales[i / kChunk], base_scales[i / kChunk],
                _mm512_set1_pd(alpha), work, i, x);
}

// Eight codes of f8_e4m3 with their bits where binary64 has its own: 2^-1016 of their values, subnormals and −0
// included. NaN comes out as a number.
inline __m512d load_e4m3(const unsigned char* in) {
  const __m512i codes = _mm512_maskz_cvtepi8_epi64(0xFF, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  const __m512i sign_and_magnitude = _mm512_set1_epi64(static_cast<long long>(0x80FE000000000000ull));
  return _mm512_castsi512_pd(_mm512_and_si512(_mm512_maskz_slli_epi64(0xFF, codes, 49), sign_and_magnitude));
}

// Of eight columns: z = base − post, never −0, and acc = new_base − z, which is new_base + (post − base). Fusing
// changes no bit: a product of a code (4 bits) and a scale (28 at most) is exact.
inline __m256 merge_e4m3(const unsigned char* next, const unsigned char* post, const unsigned char* base, __m512d ns,
                         __m512d ps, __m512d bs, __m512i& touched) {
  const __m512d b = _mm512_mul_pd(load_e4m3(base), bs);
  const __m512d z = _mm512_add_pd(_mm512_fnmadd_pd(load_e4m3(post), ps, b), _mm512_setzero_pd());
  touched = _mm512_or_si512(touched, _mm512_castpd_si512(z));
  return _mm512_maskz_cvtpd_ps(0xFF, _mm512_fmsub_pd(load_e4m3(next), ns, z));
}

inline bool any_nan_e4m3(const unsigned char* in) {
  const __m512i seven = _mm512_set1_epi8(0x7F);
  return _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(in), seven), seven) != 0;
}

// row_values() where work.direct: straight from the codes, by scales that are 2^1016 times as large. Where one is NaN,
// the whole row is sent to the literal path; a scale for which that factor is too much sends its chunk there, too.
// kPlaces columns share all scales and belong to one unit: what is found of them is noted for the first kChunk.
template <std::size_t kPlaces>
inline void merge_row_e4m3(ScaledWork& work, const unsigned char* const* codes, float* x, std::size_t n) {
  const double* ns = work.new_base.scales;
  const double* ps = work.terms[0].scales;
  const double* bs = work.terms[1].scales;
  bool nan = false;
  for (std::size_t i = 0; i < n; i += kStep)
    nan = nan || any_nan_e4m3(codes[0] + i) || any_nan_e4m3(codes[1] + i) || any_nan_e4m3(codes[2] + i);
  for (std::size_t first = 0; first < n; first += kPlaces) {
    const __m512d n8 = _mm512_set1_pd(ns[first / kChunk]), p8 = _mm512_set1_pd(ps[first / kChunk]),
                  b8 = _mm512_set1_pd(bs[first / kChunk]);
    __m512i touched = _mm512_load_si512(work.touched + first), largest = _mm512_load_si512(work.largest + first);
    for (std::size_t i = first; i < first + kPlaces; i += kChunk) {
      const __m256 low = merge_e4m3(codes[0] + i, codes[1] + i, codes[2] + i, n8, p8, b8, touched);
      const __m256 high = merge_e4m3(codes[0] + i + 8, codes[1] + i + 8, codes[2] + i + 8, n8, p8, b8, touched);
      const __m512 v = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
      _mm512_storeu_ps(x + i, v);
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
      largest = _mm512_maskz_max_epu32(0xFFFF, largest, bits);
    }
    _mm512_store_si512(work.largest + first, largest);
    _mm512_store_si512(work.touched + first, touched);
  }
  if (nan)
    for (std::size_t i = 0; i < n; ++i) work.largest[i] = 0x7FC00000u;
}

// The codes of `n` columns from column c of row r on, followed by zeros up to a multiple of kStep.
inline const unsigned char* e4m3_row(const Plane& plane, std::size_t r, std::size_t c, std::size_t n,
                                     unsigned char* buffer) {
  const Matrix& matrix = *plane.matrix;
  const unsigned char* row =
      static_cast<const unsigned char*>(matrix.data) + static_cast<std::ptrdiff_t>(r) * matrix.pitch + c;
  for (std::size_t at = 0; at < n; at += 64) __builtin_prefetch(row + kRowsAhead * matrix.pitch + at, 0, 2);
  return static_cast<const unsigned char*>(whole_steps(row, 1, n, buffer));
}

// Whether a merge is the one that merge_row_e4m3() does.
inline bool is_direct(const ScaledMerge& job, bool by_chunk) {
  if (!by_chunk || job.n_terms != 1 || job.terms[0].alpha != 1.0 || job.recipe.values_bf16) return false;
  const Matrix* operands[3] = {&job.new_base, &job.terms[0].post, &job.terms[0].base};
  for (const Matrix* m : operands)
    if (m->data == nullptr || m->codec != Codec::f8_e4m3 || m->scales.data == nullptr) return false;
  return true;
}
#endif

// The merged values of `n` columns from column c of row r on: as binary64 in work.acc where `x` is null, else rounded
// in `x`. Columns up to the next multiple of kStep are zeros, and touched by nothing.
inline void row_values(const ScaledMerge& job, ScaledWork& work, std::size_t r, std::size_t c, std::size_t n,
                       float* x) {
  const std::size_t steps = rounded_up(n);
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  if (work.direct) {
    const unsigned char* codes[3] = {
        e4m3_row(work.new_base, r, c, n, work.padded),
        e4m3_row(work.terms[0], r, c, n, work.padded + kTileCols),
        e4m3_row(work.terms[1], r, c, n, work.padded + 2 * kTileCols),
    };
    find_scales(work.new_base, r, c, n, true);
    find_scales(work.terms[0], r, c, n, true);
    find_scales(work.terms[1], r, c, n, true);
    if (work.wide && n % kWide == 0) return merge_row_e4m3<kWide>(work, codes, x, steps);
    return merge_row_e4m3<kChunk>(work, codes, x, steps);
  }
  if (x != nullptr && job.n_terms == 1 && work.by_chunk && !job.recipe.values_bf16) {
    Plane& post = work.terms[0];
    Plane& base = work.terms[1];
    const double alpha = job.terms[0].alpha;
    read_row(work.new_base, r, c, n, work, work.next);
    read_row(post, r, c, n, work, work.post);
    read_row(base, r, c, n, work, work.base);
    return merge_row(work, post.scales, base.scales, alpha, x, steps);
  }
#endif
  read_row(work.new_base, r, c, n, work, work.next);
  if (work.by_chunk)
    start_row<kChunk>(work.next, work.new_base.scales, work.acc, steps);
  else
    start_row<1>(work.next, work.new_base.scales, work.acc, steps);
  for (std::size_t t = 0; t < job.n_terms; ++t) {
    Plane& post = work.terms[2 * t];
    Plane& base = work.terms[2 * t + 1];
    read_row(post, r, c, n, work, work.post);
    read_row(base, r, c, n, work, work.base);
    const double alpha = job.terms[t].alpha;
    if (work.by_chunk)
      add_row<kChunk>(work.post, post.scales, work.base, base.scales, alpha, work.acc, work.touched, steps);
    else
      add_row<1>(work.post, post.scales, work.base, base.scales, alpha, work.acc, work.touched, steps);
  }
  if (x != nullptr) round_row(work.acc, job.recipe.values_bf16, x, work.largest, steps);
}

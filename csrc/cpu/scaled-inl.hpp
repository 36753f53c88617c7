// The way of a region of quantised matrices: values of a strip of units, their scales, their codes. Included once per
// instruction set, inside its target region, by target_*.cpp, after merge-inl.hpp.

namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE {
namespace {

// clang-format off: each builds on the one before
#include "cpu/scaled-values-inl.hpp"
#include "cpu/quantise-inl.hpp"
// clang-format on

enum Way : unsigned char { kByLoops, kCopied, kLiteral };

inline std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Units of cols columns side by side, all of the same rows. A unit wider than a tile is alone; its tiles share the
// columns of work.largest and work.touched.
struct Strip {
  Region region;
  std::size_t unit_cols;
  std::size_t units;
  bool kept;      // the values stay in work.kept
  bool by_chunk;  // each chunk of columns is of one unit
};

inline float* values_at(const Strip& strip, ScaledWork& work, std::size_t row, std::size_t col) {
  return strip.kept ? work.kept + row * rounded_up(strip.region.cols) + col : work.x;
}

inline Region unit_region(const Strip& strip, std::size_t u) {
  const std::size_t col = u * strip.unit_cols;
  return {strip.region.row, strip.region.col + col, strip.region.rows, least(strip.unit_cols, strip.region.cols - col)};
}

inline void find_values(const ScaledMerge& job, ScaledWork& work, const Strip& strip) {
  const Region& region = strip.region;
  const std::size_t tile = least(kTileCols, rounded_up(region.cols));
  std::memset(work.largest, 0, tile * sizeof(work.largest[0]));
  std::memset(work.touched, 0, tile * sizeof(work.touched[0]));
  for (std::size_t r = 0; r < region.rows; ++r)
    for (std::size_t c = 0; c < region.cols; c += kTileCols)
      row_values(job, work, region.row + r, region.col + c, least(kTileCols, region.cols - c),
                 values_at(strip, work, r, c));
}

// Whether every round(x / scale) of a unit of i4 is a code.
inline bool fits_scale(const Strip& strip, ScaledWork& work, std::size_t u, float scale) {
  const Region unit = unit_region(strip, u);
  std::uint32_t out = 0;
  for (std::size_t r = 0; r < unit.rows; ++r) {
    const float* x = values_at(strip, work, r, u * strip.unit_cols);
    for (std::size_t i = 0; i < unit.cols; ++i) {
      const float steps = x[i] / scale;
      out |= steps >= -8.5f ? 0u : 1u;
      out |= steps < 7.5f ? 0u : 1u;
    }
  }
  return out == 0;
}

inline std::uint32_t largest_of(const std::uint32_t* x) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  return _mm512_reduce_max_epu32(_mm512_loadu_si512(x));
#else
  std::uint32_t all = 0;
  for (std::size_t i = 0; i < kChunk; ++i) all = larger(all, x[i]);
  return all;
#endif
}

inline std::uint32_t any_of(const std::uint32_t* x) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  const __m512i all = _mm512_loadu_si512(x);
  return _mm512_test_epi32_mask(all, all) != 0 ? 1u : 0u;
#else
  std::uint32_t all = 0;
  for (std::size_t i = 0; i < kChunk; ++i) all |= x[i];
  return all;
#endif
}

// Decides for every unit of a strip; returns whether any is left to the loops.
inline bool find_scales_of_units(const ScaledMerge& job, ScaledWork& work, const Strip& strip, double& reference,
                                 ScaledResult& result) {
  const bool keeping = !work.measure && keeps(job);
  const Recipe& recipe = job.recipe;
  const Scales& from = job.new_base.scales;
  const std::ptrdiff_t to = unit_index(job, strip.region.row, strip.region.col);
  const std::ptrdiff_t kept_from = keeping ? scale_index(from, strip.region.row, strip.region.col) : 0;
  bool loops = false;
  float top = 0.0f;
  std::size_t filled = 0;
  for (std::size_t u = 0; u < strip.units; ++u) {
    const std::size_t begin = strip.units == 1 ? 0 : u * strip.unit_cols;
    const std::size_t end = least(begin + strip.unit_cols, least(strip.region.cols, kTileCols));
    const std::size_t place = strip.by_chunk ? begin / kChunk : begin;
    const std::size_t last = strip.by_chunk ? (end + kChunk - 1) / kChunk : end;
    std::uint32_t bits = 0, touched = 0;
    std::size_t i = begin;
    for (; i + kChunk <= end; i += kChunk) {
      bits = larger(bits, largest_of(work.largest + i));
      touched |= any_of(work.touched + i);
    }
    if (i < end && strip.by_chunk) touched |= any_of(work.touched + i);  // padding is touched by nothing
    for (; i < end; ++i) {
      bits = larger(bits, work.largest[i]);
      touched |= work.touched[i];
    }
    UnitChoice choice;
    work.way[u] = kLiteral;
    const float amax = bits_as<float>(bits);
    if (bits < 0x7F800000u) {
      const std::ptrdiff_t unit = static_cast<std::ptrdiff_t>(u);
      const bool integers = keeping && touched != 0 && recipe.codec == Codec::i4;
      const std::uint32_t stored = keeping ? load_scale(from.dtype, from.data, kept_from + unit) : 0;
      if (work.measure) {
        work.way[u] = kByLoops;
      } else if (!integers || strip.kept) {
        const bool fits = integers && fits_scale(strip, work, u, decode_scale(from.dtype, stored));
        choice = choose(job, keeping ? &stored : nullptr, touched != 0, amax, fits);
        // Room on either side for what the loops multiply it by.
        constexpr std::uint32_t room = static_cast<std::uint32_t>(kE4m3Down) << 23;
        const std::uint32_t factor = bits_as<std::uint32_t>(choice.scale.factor) & 0x7FFFFFFFu;
        if (factor > (room == 0 ? 0 : 0x00800000u + room) && factor < 0x7F800000u - room) {
          work.way[u] = choice.copied ? kCopied : kByLoops;
          if (!job.given) store_scale(recipe.scale_dtype, job.out_scales, to + unit, choice.scale.stored);
          loops = true;
        }
      }
    }
    const bool mine = work.way[u] != kLiteral;
    if (mine) {
      result.touched = result.touched || touched != 0;
      if (amax > result.amax) result.amax = amax;
    }
    const float scale = mine ? choice.scale.scale : 0.0f;
    if (scale > top) top = scale;
    for (std::size_t k = place; k < last; ++k) {
      work.factor[k] = mine ? choice.scale.factor : 1.0f;
      work.weight[k] = scale;
      work.error_weight[k] = work.way[u] == kByLoops ? scale : 0.0f;
    }
    filled = last;
  }
  for (const std::size_t end = least(filled + kStep, kTileCols); filled < end; ++filled) {  // columns of padding
    work.factor[filled] = 1.0f;
    work.weight[filled] = 0.0f;
    work.error_weight[filled] = 0.0f;
  }
  // Relative to the largest scale, squares do not leave binary32's range.
  const float relative = top > 0.0f ? 1.0f / top : 0.0f;
  for (std::size_t k = 0; k < filled; ++k) work.weight[k] = work.weight[k] * relative;
  for (std::size_t k = 0; k < filled; ++k) work.error_weight[k] = work.error_weight[k] * relative;
  reference = static_cast<double>(top);
  return loops;
}

inline void write_codes(const ScaledMerge& job, ScaledWork& work, const Strip& strip, double reference,
                        ScaledResult& result) {
  const Region& region = strip.region;
  const Codec codec = job.recipe.codec;
  // x · factor or x / factor, and back.
  const float down = bits_as<float>(static_cast<std::uint32_t>(127 - (codec == Codec::f8_e4m3 ? kE4m3Down : 0)) << 23);
  const float up = 1.0f / down;
  const float turn = multiplies(job.recipe) ? down : up;
  const std::size_t places = strip.by_chunk ? kTileChunks : kTileCols;
  for (std::size_t k = 0; k < places; ++k) {
    work.factor[k] = work.factor[k] * turn;
    work.weight[k] = work.weight[k] * up;
    work.error_weight[k] = work.error_weight[k] * up;
  }
  double error = 0.0, value = 0.0;
  std::memset(work.error, 0, sizeof(work.error));
  std::memset(work.value, 0, sizeof(work.value));
  if (region.cols > kTileCols)  // one unit: the same everywhere
    for (std::size_t k = 1; k < kTileCols; ++k) {
      work.factor[k] = work.factor[0];
      work.weight[k] = work.weight[0];
      work.error_weight[k] = work.error_weight[0];
    }
  for (std::size_t r = 0; r < region.rows; ++r) {
    unsigned char* out = static_cast<unsigned char*>(job.out) +
                         static_cast<std::ptrdiff_t>(region.row + r) * job.out_pitch + bytes_of(codec, region.col);
    for (std::size_t c = 0; c < region.cols; c += kTileCols) {
      const std::size_t n = least(kTileCols, region.cols - c);
      float* x = values_at(strip, work, r, c);
      if (!strip.kept) row_values(job, work, region.row + r, region.col + c, n, x);
      encode_row(job.recipe, x, work, rounded_up(n),
                 !strip.by_chunk                           ? 1
                 : work.wide && rounded_up(n) % kWide == 0 ? kWide
                                                           : kChunk);
      if (bits_of(codec) == 4 && n % 2 != 0) work.out[n / 2] &= 15u;
      std::memcpy(out + bytes_of(codec, c), work.out, bytes_of(codec, n));
    }
  }
  for (std::size_t i = 0; i < kChunk; ++i) {
    error = error + static_cast<double>(work.error[i]);
    value = value + static_cast<double>(work.value[i]);
  }
  result.error_squared += error * reference * reference;
  result.value_squared += value * reference * reference;
}

inline void do_strip(const ScaledMerge& job, ScaledWork& work, const Strip& strip, ScaledResult& result) {
  double reference = 0.0;
  find_values(job, work, strip);
  if (find_scales_of_units(job, work, strip, reference, result)) write_codes(job, work, strip, reference, result);
  for (std::size_t u = 0; u < strip.units; ++u) {
    if (work.way[u] == kCopied) copy_codes(job, unit_region(strip, u));
    if (work.way[u] == kLiteral)
      unit_exact(job, unit_region(strip, u), work.measure ? Effect::measure : Effect::write, result);
  }
}

// Whether `places` columns, counted from a multiple of them, always have one scale.
inline bool chunked(const Matrix& matrix, std::size_t places) {
  const Scales& s = matrix.scales;
  if (matrix.data == nullptr || s.data == nullptr || s.cols == 0) return true;
  return s.cols % places == 0 && s.col_phase % places == 0;
}

inline bool all_chunked(const ScaledMerge& job, std::size_t places) {
  bool all = chunked(job.new_base, places);
  for (std::size_t t = 0; t < job.n_terms; ++t)
    all = all && chunked(job.terms[t].post, places) && chunked(job.terms[t].base, places);
  return all;
}

inline bool any_of_bits(const ScaledMerge& job, int bits) {
  bool any = bits_of(job.new_base.codec) == bits;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    any = any || bits_of(job.terms[t].post.codec) == bits || bits_of(job.terms[t].base.codec) == bits;
  return any;
}

void quantised_region(const ScaledMerge& job, ScaledWork& work, ScaledResult& result) {
  // Where no amax decides, the region is cut as suits the loops.
  const bool free = job.given || work.measure;
  const std::size_t unit_rows = free ? 64 : job.grid_rows == 0 ? job.rows : least(job.grid_rows, job.rows);
  const std::size_t unit_cols = free ? kTileCols : job.grid_cols == 0 ? job.cols : least(job.grid_cols, job.cols);
  std::size_t width = unit_cols <= kTileCols ? kTileCols / unit_cols * unit_cols : unit_cols;
  if (width % 2 != 0 && width > unit_cols) width -= unit_cols;
  const bool starts_in_bytes = width % 2 != 0 && width < job.cols;
  const bool nibbles = any_of_bits(job, 4) || bits_of(job.recipe.codec) == 4;
  const bool literal = any_of_bits(job, 64) || (starts_in_bytes && nibbles);
  work.by_chunk = all_chunked(job, kChunk) && (width % kChunk == 0 || width >= job.cols);
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
  work.direct = is_direct(job, work.by_chunk && (unit_cols % kChunk == 0 || unit_cols >= job.cols));
  work.wide = all_chunked(job, kWide) && unit_cols % kWide == 0 && width % kWide == 0;
  work.new_base.direct = work.direct;
  for (std::size_t t = 0; t < 2 * job.n_terms; ++t) work.terms[t].direct = work.direct;
#endif
  for (std::size_t row = 0; row < job.rows; row += unit_rows) {
    for (std::size_t col = 0; col < job.cols; col += width) {
      Strip strip;
      strip.region = {row, col, least(unit_rows, job.rows - row), least(width, job.cols - col)};
      strip.unit_cols = unit_cols;
      strip.units = (strip.region.cols + unit_cols - 1) / unit_cols;
      strip.kept = strip.region.rows * rounded_up(strip.region.cols) <= kKept;
      strip.by_chunk = unit_cols % kChunk == 0 || strip.units == 1;
      if (!literal) {
        do_strip(job, work, strip, result);
        continue;
      }
      for (std::size_t u = 0; u < strip.units; ++u)
        unit_exact(job, unit_region(strip, u), work.measure ? Effect::measure : Effect::write, result);
    }
  }
}

void plain_region(const ScaledMerge& job, ScaledWork& work, ScaledResult& result) {
  const Effect effect = work.measure ? Effect::measure : Effect::write;
  const std::size_t size = size_of(job.out_dtype);
  const bool literal = any_of_bits(job, 64);
  work.by_chunk = all_chunked(job, kChunk);
  for (std::size_t r = 0; r < job.rows; ++r) {
    for (std::size_t c = 0; c < job.cols; c += kTileCols) {
      const std::size_t n = least(kTileCols, job.cols - c), steps = rounded_up(n);
      bool again = literal;
      std::uint32_t touched = 0;
      if (!literal) {
        std::memset(work.touched, 0, sizeof(work.touched));
        row_values(job, work, r, c, n, nullptr);
        for (std::size_t i = n; i < steps; ++i) work.acc[i] = 0.0;
        again = encode_to(job.out_dtype, work.acc, work.out, steps);
        for (std::size_t i = 0; i < steps; ++i) touched |= work.touched[i];
      }
      if (again) {
        plain_exact(job, {r, c, 1, n}, effect, result);
        continue;
      }
      result.touched = result.touched || touched != 0;
      if (effect == Effect::write)
        std::memcpy(static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch + c * size,
                    work.out, n * size);
    }
  }
}

}  // namespace

ScaledResult scaled_region(const ScaledMerge& job, ScaledWork& work) {
  ScaledResult result;
  if (job.quantised)
    quantised_region(job, work, result);
  else
    plain_region(job, work, result);
  return result;
}

}  // namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE

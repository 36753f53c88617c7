// The merge of one element of quantised matrices, and the choice of a unit's scale, literally from the stored bits: the
// definition that every loop of every backend must equal, and the way out where something is not finite.
#pragma once

#include "core/literal.hpp"
#include "core/quantise.hpp"
#include "core/scaled.hpp"

namespace paramdelta {

// What a unit becomes. `copied`: codes and scale are new_base's.
struct UnitChoice {
  UnitScale scale;
  bool copied = false;
};

// Where in its grid the scale of an element is, and where in the output's the scale of the unit that holds it.
PARAMDELTA_HOST_DEVICE inline std::ptrdiff_t scale_index(const Scales& s, std::size_t r, std::size_t c) {
  const std::size_t row = s.rows == 0 ? 0 : (r + s.row_phase) / s.rows;
  const std::size_t col = s.cols == 0 ? 0 : (c + s.col_phase) / s.cols;
  return static_cast<std::ptrdiff_t>(row) * s.pitch + static_cast<std::ptrdiff_t>(col);
}

PARAMDELTA_HOST_DEVICE inline std::ptrdiff_t unit_index(const ScaledMerge& job, std::size_t row, std::size_t col) {
  const std::size_t r = job.grid_rows == 0 ? 0 : row / job.grid_rows;
  const std::size_t c = job.grid_cols == 0 ? 0 : col / job.grid_cols;
  return static_cast<std::ptrdiff_t>(r) * job.out_scale_pitch + static_cast<std::ptrdiff_t>(c);
}

PARAMDELTA_HOST_DEVICE inline const unsigned char* row_of(const Matrix& matrix, std::size_t r) {
  return static_cast<const unsigned char*>(matrix.data) + static_cast<std::ptrdiff_t>(r) * matrix.pitch;
}

PARAMDELTA_HOST_DEVICE inline std::uint64_t code_at(const Matrix& matrix, std::size_t r, std::size_t c) {
  const unsigned char* row = row_of(matrix, r);
  switch (bits_of(matrix.codec)) {
    case 4: return (row[c / 2] >> (c % 2 * 4)) & 15u;
    case 8: return row[c];
    case 16: return code_at<DType::bf16>(row, c);
    case 32: return code_at<DType::f32>(row, c);
    default: return code_at<DType::f64>(row, c);
  }
}

struct Value {
  std::uint64_t code = 0;
  std::uint32_t scale = 0;  // as stored
  int zero = 8;
  double value = 0.0;
};

// The binary64 that element (r, c)'s code is multiplied with, and its zero point.
PARAMDELTA_HOST_DEVICE inline double scale_at(const Scales& s, std::size_t r, std::size_t c) {
  if (s.data == nullptr) return 1.0;
  return value_scale(s.second, s.second_value,
                     decode_scale(s.dtype, load_scale(s.dtype, s.data, scale_index(s, r, c))));
}

PARAMDELTA_HOST_DEVICE inline int zero_point_at(const Scales& s, std::size_t r, std::size_t c) {
  if (s.zero_points == nullptr) return 8;
  const std::size_t row = r + s.zero_phase, col = s.cols == 0 ? 0 : (c + s.col_phase) / s.cols;
  const std::ptrdiff_t word = static_cast<std::ptrdiff_t>(row / 8) * s.zero_pitch + static_cast<std::ptrdiff_t>(col);
  return static_cast<int>(load_scale(DType::f32, s.zero_points, word) >> (row % 8 * 4) & 15u);
}

// The number that a code stands for, before its scale.
PARAMDELTA_HOST_DEVICE inline double code_value(Codec codec, std::uint64_t code, int zero) {
  switch (codec) {
    case Codec::bf16: return decode<DType::bf16>(static_cast<std::uint16_t>(code));
    case Codec::f16: return decode<DType::f16>(static_cast<std::uint16_t>(code));
    case Codec::f32: return decode<DType::f32>(static_cast<std::uint32_t>(code));
    case Codec::f64: return decode<DType::f64>(code);
    case Codec::i4: return static_cast<double>(static_cast<int>(code) - zero);
    default: return decode_code(codec, static_cast<std::uint32_t>(code));
  }
}

PARAMDELTA_HOST_DEVICE inline Value value_at(const Matrix& matrix, std::size_t r, std::size_t c) {
  Value v;
  if (matrix.data == nullptr) return v;
  v.code = code_at(matrix, r, c);
  const Scales& s = matrix.scales;
  if (s.data != nullptr) v.scale = load_scale(s.dtype, s.data, scale_index(s, r, c));
  if (matrix.codec == Codec::i4) v.zero = zero_point_at(matrix.scales, r, c);
  const double code = code_value(matrix.codec, v.code, v.zero);
  v.value = s.data == nullptr ? code : code * value_scale(s.second, s.second_value, decode_scale(s.dtype, v.scale));
  return v;
}

PARAMDELTA_HOST_DEVICE inline bool same_second(const Scales& a, const Scales& b) {
  return a.second == b.second &&
         (a.second == Second::none || bits_as<std::uint32_t>(a.second_value) == bits_as<std::uint32_t>(b.second_value));
}

// Equal by their stored bits, so that NaN equals the same NaN and Inf − Inf is no difference. Scales whose quotients
// by the second level are the same Inf are not the same bits.
PARAMDELTA_HOST_DEVICE inline bool same_bits(const Matrix& a, const Matrix& b, const Value& va, const Value& vb) {
  if (a.data == nullptr && b.data == nullptr) return true;
  if (a.data == nullptr || b.data == nullptr || a.codec != b.codec) return false;
  if (va.code != vb.code || va.zero != vb.zero) return false;
  if (a.scales.data == nullptr || b.scales.data == nullptr) return a.scales.data == b.scales.data;
  return a.scales.dtype == b.scales.dtype && va.scale == vb.scale && same_second(a.scales, b.scales);
}

// acc of element (r, c). No term has alpha == 0. The terms are those of `job`, wherever they lie.
PARAMDELTA_HOST_DEVICE inline Sum sum_at(const ScaledMerge& job, const MatrixTerm* terms, std::size_t r,
                                         std::size_t c) {
  Sum sum{value_at(job.new_base, r, c).value, false};
  for (std::size_t t = 0; t < job.n_terms; ++t) {
    const MatrixTerm& term = terms[t];
    const Value post = value_at(term.post, r, c), base = value_at(term.base, r, c);
    if (same_bits(term.post, term.base, post, base)) continue;
    sum.add(term.alpha, post.value, base.value);
  }
  return sum;
}

// Whether new_base has scales that may be kept.
PARAMDELTA_HOST_DEVICE inline bool keeps(const ScaledMerge& job) {
  return job.keep == Keep::units && !job.given && job.new_base.data != nullptr &&
         job.new_base.codec == job.recipe.codec && job.new_base.scales.data != nullptr &&
         job.new_base.scales.dtype == job.recipe.scale_dtype && job.new_base.scales.zero_points == nullptr;
}

// Whether plain output takes over the bits of what no delta touches.
PARAMDELTA_HOST_DEVICE inline bool keeps_bits(const ScaledMerge& job) {
  return job.new_base.data != nullptr && job.new_base.scales.data == nullptr &&
         static_cast<int>(job.new_base.codec) == static_cast<int>(job.out_dtype);
}

// Whether round(x / scale) is a code of i4: −8.5 rounds to −8, the even one, and 7.5 to 8.
PARAMDELTA_HOST_DEVICE inline bool fits_i4(float x, float scale) {
  const float steps = x / scale;
  return steps >= -8.5f && steps < 7.5f;
}

// Decides for one unit. `kept` is its scale in new_base, null where none may be kept. `fits`: every round(x / scale
// kept) is a code; asked of i4 only.
PARAMDELTA_HOST_DEVICE inline UnitChoice choose(const ScaledMerge& job, const std::uint32_t* kept, bool touched,
                                                float amax, bool fits) {
  const Recipe& recipe = job.recipe;
  if (job.given)
    return {unit_of_stored(recipe, job.second_value, DType::f32, bits_as<std::uint32_t>(job.given_scale)), false};
  if (kept != nullptr) {
    bool holds = !touched;
    const float scale = decode_scale(recipe.scale_dtype, *kept);
    if (touched && scale > 0.0f && scale < __builtin_inff()) {
      const double largest = recipe.codec == Codec::f4 ? 6.0 : 448.0;
      if (recipe.codec == Codec::i4)
        holds = fits;
      else if (recipe.scale_dtype == DType::f8_e8m0 || (recipe.rule == ScaleRule::ceil2 && is_power_of_two(scale)))
        holds = static_cast<double>(amax) <= largest * static_cast<double>(scale);
    }
    if (holds) return {unit_of_stored(recipe, job.second_value, recipe.scale_dtype, *kept), !touched};
  }
  return {unit_of_amax(recipe, job.second_value, amax), false};
}

// acc rounded as the recipe says.
PARAMDELTA_HOST_DEVICE inline float rounded_value(const Recipe& recipe, double acc) {
  if (recipe.values_bf16) return bits_as<float>(static_cast<std::uint32_t>(encode<DType::bf16>(acc).code) << 16);
  return bits_as<float>(encode<DType::f32>(acc).code);
}

PARAMDELTA_HOST_DEVICE inline bool is_inf(float x) { return (bits_as<std::uint32_t>(x) & 0x7FFFFFFFu) == 0x7F800000u; }

// The code of x against the scale of its unit.
PARAMDELTA_HOST_DEVICE inline std::uint32_t code_of(const Recipe& recipe, const UnitScale& unit, float x) {
  if (is_inf(x)) return encode_code(recipe.codec, x);
  return encode_code(recipe.codec, multiplies(recipe) ? x * unit.factor : x / unit.factor);
}

// What an element counts as: by acc where that is not finite, else as overflow where rounding made it infinite.
PARAMDELTA_HOST_DEVICE inline void count_value(Counts& counts, double acc, float x) {
  if (is_nan(acc))
    ++counts.nan;
  else if (is_inf(acc))
    ++counts.inf;
  else if (is_inf(x))
    ++counts.overflow;
}

}  // namespace paramdelta

// The literal merge of scaled_exact.hpp.
#include "cpu/scaled_exact.hpp"

#include <cmath>

namespace paramdelta::cpu {
namespace {

const unsigned char* row_of(const Matrix& matrix, std::size_t r) {
  return static_cast<const unsigned char*>(matrix.data) + static_cast<std::ptrdiff_t>(r) * matrix.pitch;
}

std::uint64_t code_at(const Matrix& matrix, std::size_t r, std::size_t c) {
  const unsigned char* row = row_of(matrix, r);
  const int bits = bits_of(matrix.codec);
  if (bits == 4) return (row[c / 2] >> (c % 2 * 4)) & 15u;
  std::uint64_t code = 0;
  const std::size_t size = static_cast<std::size_t>(bits) / 8;
  std::memcpy(&code, row + c * size, size);
  return code;
}

struct Value {
  std::uint64_t code = 0;
  std::uint32_t scale = 0;  // as stored
  int zero = 8;
  double value = 0.0;
};

Value value_at(const Matrix& matrix, std::size_t r, std::size_t c) {
  Value v;
  if (matrix.data == nullptr) return v;
  v.code = code_at(matrix, r, c);
  const Scales& s = matrix.scales;
  if (s.data != nullptr) v.scale = load_scale(s.dtype, s.data, scale_index(s, r, c));
  if (matrix.codec == Codec::i4 && s.zero_points != nullptr) {
    const std::size_t row = r + s.zero_phase, col = s.cols == 0 ? 0 : (c + s.col_phase) / s.cols;
    const std::ptrdiff_t word = static_cast<std::ptrdiff_t>(row / 8) * s.zero_pitch + static_cast<std::ptrdiff_t>(col);
    v.zero = static_cast<int>(load_scale(DType::f32, s.zero_points, word) >> (row % 8 * 4) & 15u);
  }
  double code = 0.0;
  switch (matrix.codec) {
    case Codec::bf16: code = decode<DType::bf16>(static_cast<std::uint16_t>(v.code)); break;
    case Codec::f16: code = decode<DType::f16>(static_cast<std::uint16_t>(v.code)); break;
    case Codec::f32: code = decode<DType::f32>(static_cast<std::uint32_t>(v.code)); break;
    case Codec::f64: code = decode<DType::f64>(v.code); break;
    case Codec::i4: code = static_cast<double>(static_cast<int>(v.code) - v.zero); break;
    default: code = decode_code(matrix.codec, static_cast<std::uint32_t>(v.code));
  }
  v.value = s.data == nullptr ? code : code * value_scale(s.second, s.second_value, decode_scale(s.dtype, v.scale));
  return v;
}

bool same_second(const Scales& a, const Scales& b) {
  return a.second == b.second &&
         (a.second == Second::none || bits_as<std::uint32_t>(a.second_value) == bits_as<std::uint32_t>(b.second_value));
}

// Equal by their stored bits, so that NaN equals the same NaN and Inf − Inf is no difference. Scales whose quotients
// by the second level are the same Inf are not the same bits.
bool same_bits(const Matrix& a, const Matrix& b, const Value& va, const Value& vb) {
  if (a.data == nullptr && b.data == nullptr) return true;
  if (a.data == nullptr || b.data == nullptr || a.codec != b.codec) return false;
  if (va.code != vb.code || va.zero != vb.zero) return false;
  if (a.scales.data == nullptr || b.scales.data == nullptr) return a.scales.data == b.scales.data;
  return a.scales.dtype == b.scales.dtype && va.scale == vb.scale && same_second(a.scales, b.scales);
}

struct Sum {
  double acc;
  bool touched;
};

Sum sum_at(const ScaledMerge& job, std::size_t r, std::size_t c) {
  Sum sum{value_at(job.new_base, r, c).value, false};
  for (std::size_t t = 0; t < job.n_terms; ++t) {
    const MatrixTerm& term = job.terms[t];
    const Value post = value_at(term.post, r, c), base = value_at(term.base, r, c);
    if (same_bits(term.post, term.base, post, base)) continue;
    const double delta = post.value - base.value;
    if (delta == 0.0) continue;
    const double product = term.alpha * delta;
    sum.acc = sum.acc + product;
    sum.touched = true;
  }
  return sum;
}

float rounded(const ScaledMerge& job, double acc) {
  if (job.recipe.values_bf16) return bits_as<float>(static_cast<std::uint32_t>(encode<DType::bf16>(acc).code) << 16);
  return bits_as<float>(encode<DType::f32>(acc).code);
}

void put_code(const ScaledMerge& job, std::size_t r, std::size_t c, std::uint32_t code) {
  unsigned char* row = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch;
  if (bits_of(job.recipe.codec) == 8)
    row[c] = static_cast<unsigned char>(code);
  else if (c % 2 == 0)
    row[c / 2] = static_cast<unsigned char>((c + 1 < job.cols ? row[c / 2] & 0xF0u : 0u) | code);
  else
    row[c / 2] = static_cast<unsigned char>((row[c / 2] & 0x0Fu) | code << 4);
}

template <DType D>
bool encode_at(double x, unsigned char* out) {
  const Encoded<D> encoded = encode<D>(x);
  std::memcpy(out, &encoded.code, sizeof(encoded.code));
  return encoded.overflow;
}

bool store_at(DType dtype, double x, unsigned char* out) {
  switch (dtype) {
    case DType::bf16: return encode_at<DType::bf16>(x, out);
    case DType::f16: return encode_at<DType::f16>(x, out);
    case DType::f32: return encode_at<DType::f32>(x, out);
    case DType::f64: return encode_at<DType::f64>(x, out);
    case DType::f8_e4m3: return encode_at<DType::f8_e4m3>(x, out);
    default: return encode_at<DType::f8_e5m2>(x, out);
  }
}

float divided(float x, const ScaledMerge& job, const UnitScale& unit) {
  return multiplies(job.recipe) ? x * unit.factor : x / unit.factor;
}

}  // namespace

std::ptrdiff_t scale_index(const Scales& s, std::size_t r, std::size_t c) {
  const std::size_t row = s.rows == 0 ? 0 : (r + s.row_phase) / s.rows;
  const std::size_t col = s.cols == 0 ? 0 : (c + s.col_phase) / s.cols;
  return static_cast<std::ptrdiff_t>(row) * s.pitch + static_cast<std::ptrdiff_t>(col);
}

bool keeps(const ScaledMerge& job) {
  return job.keep == Keep::units && !job.given && job.new_base.data != nullptr &&
         job.new_base.codec == job.recipe.codec && job.new_base.scales.data != nullptr &&
         job.new_base.scales.dtype == job.recipe.scale_dtype && job.new_base.scales.zero_points == nullptr;
}

std::ptrdiff_t unit_index(const ScaledMerge& job, std::size_t row, std::size_t col) {
  const std::size_t r = job.grid_rows == 0 ? 0 : row / job.grid_rows;
  const std::size_t c = job.grid_cols == 0 ? 0 : col / job.grid_cols;
  return static_cast<std::ptrdiff_t>(r) * job.out_scale_pitch + static_cast<std::ptrdiff_t>(c);
}

void copy_codes(const ScaledMerge& job, const Region& unit) {
  const bool whole_bytes =
      bits_of(job.recipe.codec) == 8 || (unit.col % 2 == 0 && (unit.cols % 2 == 0 || unit.col + unit.cols == job.cols));
  for (std::size_t r = unit.row; r < unit.row + unit.rows; ++r) {
    if (whole_bytes) {
      const std::size_t at = bytes_of(job.recipe.codec, unit.col);
      unsigned char* to = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch + at;
      std::memmove(to, row_of(job.new_base, r) + at, bytes_of(job.recipe.codec, unit.cols));
    } else {
      for (std::size_t c = unit.col; c < unit.col + unit.cols; ++c)
        put_code(job, r, c, static_cast<std::uint32_t>(code_at(job.new_base, r, c)));
    }
  }
}

void unit_exact(const ScaledMerge& job, const Region& unit, Effect effect, ScaledResult& result) {
  bool touched = false, fits = true;
  float amax = 0.0f, kept = 0.0f;
  const Scales& from = job.new_base.scales;
  const bool keeping = keeps(job), integers = keeping && job.recipe.codec == Codec::i4;
  const std::uint32_t stored = keeping ? load_scale(from.dtype, from.data, scale_index(from, unit.row, unit.col)) : 0;
  if (integers) kept = decode_scale(from.dtype, stored);
  for (std::size_t r = unit.row; r < unit.row + unit.rows; ++r) {
    for (std::size_t c = unit.col; c < unit.col + unit.cols; ++c) {
      const Sum sum = sum_at(job, r, c);
      const float x = rounded(job, sum.acc);
      touched = touched || sum.touched;
      if (std::isnan(sum.acc)) {
        ++result.counts.nan;
      } else if (std::isinf(sum.acc)) {
        ++result.counts.inf;
      } else if (std::isinf(x)) {
        ++result.counts.overflow;
      } else {
        if (std::fabs(x) > amax) amax = std::fabs(x);
        if (integers) {
          const float steps = x / kept;
          fits = fits && steps >= -8.5f && steps < 7.5f;  // −8.5 rounds to −8, the even one, and 7.5 to 8
        }
      }
    }
  }
  result.touched = result.touched || touched;
  if (amax > result.amax) result.amax = amax;
  if (effect == Effect::measure) return;

  const UnitChoice choice = choose(job, keeping ? &stored : nullptr, touched, amax, fits);
  for (std::size_t r = unit.row; r < unit.row + unit.rows; ++r) {
    for (std::size_t c = unit.col; c < unit.col + unit.cols; ++c) {
      const double acc = sum_at(job, r, c).acc;
      const float x = rounded(job, acc);
      std::uint32_t code;
      if (choice.copied)
        code = static_cast<std::uint32_t>(code_at(job.new_base, r, c));
      else
        code = encode_code(job.recipe.codec, std::isinf(x) ? x : divided(x, job, choice.scale));
      if (std::isfinite(x)) {
        const double error = decode_code(job.recipe.codec, code) * static_cast<double>(choice.scale.scale) - acc;
        if (!choice.copied) result.error_squared += error * error;
        result.value_squared += acc * acc;
      }
      put_code(job, r, c, code);
    }
  }
  if (!job.given)
    store_scale(job.recipe.scale_dtype, job.out_scales, unit_index(job, unit.row, unit.col), choice.scale.stored);
}

void plain_exact(const ScaledMerge& job, const Region& region, Effect effect, ScaledResult& result) {
  const std::size_t size = size_of(job.out_dtype);
  const Matrix& new_base = job.new_base;
  const bool keeps_bits = new_base.data != nullptr && new_base.scales.data == nullptr &&
                          static_cast<int>(new_base.codec) == static_cast<int>(job.out_dtype);
  for (std::size_t r = region.row; r < region.row + region.rows; ++r) {
    for (std::size_t c = region.col; c < region.col + region.cols; ++c) {
      const Sum sum = sum_at(job, r, c);
      unsigned char bytes[sizeof(double)];
      const bool overflow = store_at(job.out_dtype, sum.acc, bytes);
      if (!sum.touched && keeps_bits) std::memcpy(bytes, row_of(new_base, r) + c * size, size);
      result.touched = result.touched || sum.touched;
      if (std::isnan(sum.acc))
        ++result.counts.nan;
      else if (overflow)
        ++result.counts.overflow;
      else if (std::isinf(sum.acc))
        ++result.counts.inf;
      if (effect == Effect::write)
        std::memcpy(static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch + c * size,
                    bytes, size);
    }
  }
}

}  // namespace paramdelta::cpu

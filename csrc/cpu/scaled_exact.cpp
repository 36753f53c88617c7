// The literal merge of scaled_exact.hpp.
#include "cpu/scaled_exact.hpp"

#include <cmath>

namespace paramdelta::cpu {
namespace {

void put_code(const ScaledMerge& job, std::size_t r, std::size_t c, std::uint32_t code) {
  unsigned char* row = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch;
  if (bits_of(job.recipe.codec) == 8)
    row[c] = static_cast<unsigned char>(code);
  else if (c % 2 == 0)
    row[c / 2] = static_cast<unsigned char>((c + 1 < job.cols ? row[c / 2] & 0xF0u : 0u) | code);
  else
    row[c / 2] = static_cast<unsigned char>((row[c / 2] & 0x0Fu) | code << 4);
}

}  // namespace

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
      const Sum sum = sum_at(job, job.terms, r, c);
      const float x = rounded_value(job.recipe, sum.acc);
      touched = touched || sum.touched;
      count_value(result.counts, sum.acc, x);
      if (!std::isfinite(x)) continue;
      if (std::fabs(x) > amax) amax = std::fabs(x);
      if (integers) fits = fits && fits_i4(x, kept);
    }
  }
  result.touched = result.touched || touched;
  if (amax > result.amax) result.amax = amax;
  if (effect == Effect::measure) return;

  const UnitChoice choice = choose(job, keeping ? &stored : nullptr, touched, amax, fits);
  for (std::size_t r = unit.row; r < unit.row + unit.rows; ++r) {
    for (std::size_t c = unit.col; c < unit.col + unit.cols; ++c) {
      const double acc = sum_at(job, job.terms, r, c).acc;
      const float x = rounded_value(job.recipe, acc);
      const std::uint32_t code = choice.copied ? static_cast<std::uint32_t>(code_at(job.new_base, r, c))
                                               : code_of(job.recipe, choice.scale, x);
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
  const bool takes_bits = keeps_bits(job);
  for (std::size_t r = region.row; r < region.row + region.rows; ++r) {
    for (std::size_t c = region.col; c < region.col + region.cols; ++c) {
      const Sum sum = sum_at(job, job.terms, r, c);
      unsigned char bytes[sizeof(double)];
      const bool overflow = store_at(job.out_dtype, sum.acc, bytes);
      if (!sum.touched && takes_bits) std::memcpy(bytes, row_of(job.new_base, r) + c * size, size);
      result.touched = result.touched || sum.touched;
      count(result.counts, sum.acc, overflow);
      if (effect == Effect::write)
        std::memcpy(static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(r) * job.out_pitch + c * size,
                    bytes, size);
    }
  }
}

}  // namespace paramdelta::cpu

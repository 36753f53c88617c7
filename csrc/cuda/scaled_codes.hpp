// From merged values to codes of a group of columns: rounding, what a unit gathers, its choice of scale, codes, and
// what quantising lost.
#pragma once

#include "cuda/operations.hpp"
#include "cuda/scaled_values.hpp"

namespace paramdelta::cuda {

// rounded_value() of core/scaled_literal.hpp.
PARAMDELTA_DEVICE float round_value(const Recipe& recipe, double acc) {
  if (!recipe.values_bf16) return static_cast<float>(acc);
  if (!is_ordinary<DType::bf16>(acc)) {  // NaN, or Inf after overflow too
    const float single = static_cast<float>(acc);
    return single != single ? single : single * bits_as<float>(0x7F800000u);
  }
  return bits_as<float>(static_cast<std::uint32_t>(narrow<DType::bf16>(acc)) << 16);
}

// encode_code() of core/quantise.hpp.
PARAMDELTA_DEVICE_CALL std::uint32_t odd_code(Codec codec, float y) { return encode_code(codec, y); }

PARAMDELTA_DEVICE std::uint32_t quick_code(Codec codec, float y) {
  if (codec != Codec::f8_e4m3) return odd_code(codec, y);
  const std::uint32_t bits = bits_as<std::uint32_t>(y);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7F;
  const std::uint32_t held = magnitude < 0x43E00000u ? magnitude : 0x43E00000u;  // 448
  return narrow_float<DType::f8_e4m3>(bits_as<float>((bits & 0x80000000u) | held));
}

PARAMDELTA_DEVICE_CALL std::uint32_t copied_code(const ScaledMerge& job, std::uint32_t row, std::uint32_t col) {
  return static_cast<std::uint32_t>(code_at(job.new_base, row, col));
}

PARAMDELTA_DEVICE_CALL void tell_unit(Unit& unit, std::uint32_t largest, std::uint32_t touched) {
  if (largest > seen(&unit.largest)) atomic_max(&unit.largest, largest);
  if (touched != 0 && seen(&unit.touched) == 0) atomic_or(&unit.touched, 1u);
}

// What a thread has gathered of one unit before it tells the others.
struct Gathered {
  std::uint32_t unit = kNoUnit, largest = 0, touched = 0;

  PARAMDELTA_DEVICE void tell(Unit* units) const {
    if (unit != kNoUnit) tell_unit(units[unit], largest, touched);
  }
  PARAMDELTA_DEVICE void add(Unit* units, std::uint32_t to, std::uint32_t magnitude, std::uint32_t touch) {
    if (to != unit) {
      tell(units);
      *this = Gathered{to, 0, 0};
    }
    if (magnitude < 0x7F800000u && magnitude > largest) largest = magnitude;
    touched |= touch;
  }
};

PARAMDELTA_DEVICE_CALL void add_totals(const Counts& counts, const Gathered& all, ScaledTotals* totals) {
  if (counts.nan != 0) atomic_add(&totals->nan, counts.nan);
  if (counts.inf != 0) atomic_add(&totals->inf, counts.inf);
  if (counts.overflow != 0) atomic_add(&totals->overflow, counts.overflow);
  if (all.largest > seen(&totals->amax)) atomic_max(&totals->amax, all.largest);
  if (all.touched != 0 && seen(&totals->touched) == 0) atomic_or(&totals->touched, 1u);
}

// One sum for each warp, all of whose threads are here: the sums of a merge have one address, and a device adds to one
// address about once in a clock.
PARAMDELTA_DEVICE void add_lost(int thread, double error, double value, ScaledTotals* totals) {
  warp_add(thread, &totals->error_squared, error);
  warp_add(thread, &totals->value_squared, value);
}

// What a code of the output stands for in units of its scale.
PARAMDELTA_DEVICE float near_value(Codec codec, std::uint32_t code) {
  if (codec == Codec::f8_e4m3) return widen_float<DType::f8_e4m3>(static_cast<std::uint8_t>(code));
  if (codec == Codec::f4) return widen_f4(code);
  return static_cast<float>(static_cast<int>(code) - 8);
}

// For the report: no bit of the output depends on these sums. Squares are added up in units of the scale in binary32,
// over what a thread sees of one unit.
struct Lost {
  const Unit* unit = nullptr;
  float error_here = 0.0f, value_here = 0.0f;
  double error = 0.0, value = 0.0;

  PARAMDELTA_DEVICE void settle() {
    if (unit == nullptr) return;
    const double squared = static_cast<double>(unit->scale.scale) * static_cast<double>(unit->scale.scale);
    error += static_cast<double>(error_here) * squared;
    value += static_cast<double>(value_here) * squared;
  }
  // y: x in units of the scale.
  PARAMDELTA_DEVICE void add(const Unit* of, float near, float y) {
    if (of != unit) {
      settle();
      unit = of;
      error_here = value_here = 0.0f;
    }
    if (!(y > -1e9f && y < 1e9f)) {
      if (!is_finite(y)) return;
      const double scale = static_cast<double>(of->scale.scale), e = static_cast<double>(near - y) * scale;
      error += of->copied != 0 ? 0.0 : e * e;
      value += static_cast<double>(y) * scale * static_cast<double>(y) * scale;
      return;
    }
    const float e = of->copied != 0 ? 0.0f : near - y;
    error_here += e * e;
    value_here += y * y;
  }
};

// Writes the codes of a group. Nibbles: the group starts at an even column, and an odd end is that of the row.
PARAMDELTA_DEVICE void store_group(const ScaledMerge& job, const Group& group, const std::uint32_t* codes) {
  unsigned char* row = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(group.row) * job.out_pitch;
  if (bits_of(job.recipe.codec) == 4) {
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); k += 2)
      if (k < group.n)
        row[group.col / 2 + static_cast<std::uint32_t>(k) / 2] =
            static_cast<unsigned char>(codes[k] | (k + 1 < group.n ? codes[k + 1] << 4 : 0u));
  } else {
    std::uint8_t bytes[kGroup];
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k) bytes[k] = static_cast<std::uint8_t>(codes[k]);
    if (group.n == static_cast<int>(kGroup)) return store_codes<static_cast<int>(kGroup)>(bytes, row + group.col);
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k)
      if (k < group.n) row[group.col + static_cast<std::uint32_t>(k)] = bytes[k];
  }
}

PARAMDELTA_DEVICE void encode_group(const ScaledParams& params, const Group& group, const float* x,
                                    const Unit* const* units, Lost& lost) {
  const ScaledMerge& job = params.job;
  const Recipe& recipe = job.recipe;
  const bool multiply = multiplies(recipe);
  std::uint32_t codes[kGroup];
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    codes[k] = 0;
    if (k >= group.n) continue;
    const Unit& unit = *units[k];
    const float y = multiply ? x[k] * unit.scale.factor : x[k] / unit.scale.factor;
    if (unit.copied != 0)
      codes[k] = copied_code(job, group.row, group.col + static_cast<std::uint32_t>(k));
    else
      codes[k] = quick_code(recipe.codec, is_inf(x[k]) ? x[k] : y);
    lost.add(&unit, near_value(recipe.codec, codes[k]), y);
  }
  store_group(job, group, codes);
}

PARAMDELTA_DEVICE_CALL void choose_unit(const ScaledParams& params, std::uint32_t row, std::uint32_t col, Unit& unit) {
  const ScaledMerge& job = params.job;
  const Scales& from = job.new_base.scales;
  const bool keeping = keeps(job);
  const std::uint32_t stored = keeping ? load_scale(from.dtype, from.data, scale_index(from, row, col)) : 0;
  const UnitChoice choice =
      choose(job, keeping ? &stored : nullptr, unit.touched != 0, bits_as<float>(unit.largest), unit.misfit == 0);
  unit.scale = choice.scale;
  unit.copied = choice.copied ? 1 : 0;
  if (!job.given) store_scale(job.recipe.scale_dtype, job.out_scales, unit_index(job, row, col), choice.scale.stored);
}

PARAMDELTA_DEVICE bool asks_fit(const ScaledMerge& job) { return keeps(job) && job.recipe.codec == Codec::i4; }

// Notes where the code of x would not fit the scale kept.
PARAMDELTA_DEVICE_CALL void check_fit(const ScaledMerge& job, std::uint32_t row, std::uint32_t col, float x,
                                      Unit& unit) {
  if (!is_finite(x) || seen(&unit.misfit) != 0) return;
  const Scales& from = job.new_base.scales;
  const float scale = decode_scale(from.dtype, load_scale(from.dtype, from.data, scale_index(from, row, col)));
  if (!fits_i4(x, scale)) atomic_or(&unit.misfit, 1u);
}

}  // namespace paramdelta::cuda

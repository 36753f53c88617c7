// Kernels for quantised matrices. A block works on a tile of the output, its threads on groups of kGroup columns.
//
// Where units are small, a tile holds whole units (UnitsKernel): values are found once and kept in shared memory, each
// unit's scale is chosen, codes are made. Larger units, plain output and given scales are cut as suits (TilesKernel):
// a pass gathers each unit's largest |x| in device memory, ChooseKernel chooses, a second pass makes the codes.
// What is not finite is merged literally by the thread that meets it.
#pragma once

#include "core/scaled_literal.hpp"
#include "cuda/launch.hpp"
#include "cuda/rounding.hpp"
#include "cuda/scaled.hpp"

namespace paramdelta::cuda {

inline constexpr int kScaledThreads = 256;
inline constexpr std::size_t kMostScaledTerms = 16;
inline constexpr std::uint32_t kGroup = 8;
inline constexpr std::uint32_t kKeptValues = 16384;  // of a tile in shared memory, as binary32
inline constexpr std::uint32_t kMostUnits = 512;     // of a tile
inline constexpr std::uint32_t kNoUnit = 0xFFFFFFFFu;

// What is known of a unit: bits of the largest finite |x|, whether it is touched, whether a code of i4 would not fit
// the scale kept; and then what it becomes.
struct Unit {
  std::uint32_t largest, touched, misfit, copied;
  UnitScale scale;
};

// An operand over a tile: its scale where that is one number, else looked up per group.
struct TilePlane {
  double scale;
  std::uint32_t one_scale;
  std::uint32_t group_scale;  // the columns of a group have one
};

enum class Stage : std::uint8_t { measure, fit, encode, plain };

struct ScaledParams {
  ScaledMerge job;  // its terms are these
  MatrixTerm terms[kMostScaledTerms];
  ScaledTotals* totals = nullptr;
  Unit* units = nullptr;  // of the whole output, row by row; null where none are needed
  Stage stage = Stage::plain;
  bool counts = true;     // whether this pass adds to the totals
  bool all_e4m3 = false;  // every operand has codes of f8_e4m3 and whole tiles of one scale, mostly
  std::uint32_t tile_rows = 0, tile_cols = 0;
  std::uint32_t tiles_across = 0;
  std::uint32_t unit_rows = 0, unit_cols = 0;  // of the output, clamped to the region
  std::uint32_t units_across = 0;              // in the whole output, or in a tile of UnitsKernel
};

struct Tile {
  std::uint32_t row, col, rows, cols;
};

PARAMDELTA_DEVICE std::uint32_t least(std::uint32_t a, std::uint32_t b) { return a < b ? a : b; }

PARAMDELTA_DEVICE Tile tile_of(const ScaledParams& params, std::uint32_t block) {
  const std::uint32_t across = block % params.tiles_across, down = block / params.tiles_across;
  Tile tile;
  tile.row = down * params.tile_rows;
  tile.col = across * params.tile_cols;
  tile.rows = least(params.tile_rows, static_cast<std::uint32_t>(params.job.rows) - tile.row);
  tile.cols = least(params.tile_cols, static_cast<std::uint32_t>(params.job.cols) - tile.col);
  return tile;
}

// The place of a row or column in a grid.
PARAMDELTA_DEVICE std::uint32_t grid_place(std::uint32_t at, std::uint32_t phase, std::uint32_t unit) {
  return unit == 0 ? 0 : (at + phase) / unit;
}

// What differs from element to element only in odd grids, or is rare, is a call: compiled once, not for each element.
PARAMDELTA_DEVICE_CALL double scale_of(const Matrix& matrix, std::uint32_t row, std::uint32_t col) {
  return scale_at(matrix.scales, row, col);
}

PARAMDELTA_DEVICE_CALL void prepare_plane(const Matrix& matrix, const Tile& tile, TilePlane& plane) {
  const Scales& s = matrix.scales;
  const bool rows =
      grid_place(tile.row, s.row_phase, s.rows) == grid_place(tile.row + tile.rows - 1, s.row_phase, s.rows);
  const bool cols =
      grid_place(tile.col, s.col_phase, s.cols) == grid_place(tile.col + tile.cols - 1, s.col_phase, s.cols);
  plane.one_scale = s.data == nullptr || (rows && cols);
  plane.group_scale = s.cols == 0 || (s.cols % kGroup == 0 && (s.col_phase + tile.col) % kGroup == 0);
  plane.scale = plane.one_scale ? scale_of(matrix, tile.row, tile.col) : 0.0;
}

// A group: kGroup columns of a row, of which `n` exist.
struct Group {
  std::uint32_t row, col;
  int n;
};

template <DType D>
PARAMDELTA_DEVICE void read_codes_as(const unsigned char* from, int n, double* values) {
  using Code = typename Format<D>::Code;
  alignas(16) Code codes[kGroup];
  if (n == static_cast<int>(kGroup)) {
    load_codes<static_cast<int>(kGroup)>(from, codes);
  } else {
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k)
      codes[k] = k < n ? code_at<D>(from, static_cast<std::size_t>(k)) : 0;
  }
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) values[k] = widen<D>(codes[k]);
}

// Codes of four bits, or of a type that only old hardware has, before their scales.
PARAMDELTA_DEVICE_CALL void read_odd_codes(const Matrix& matrix, const Group& group, double* values) {
  PARAMDELTA_ROLLED
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    values[k] = 0.0;
    if (k >= group.n) continue;
    const std::size_t col = group.col + static_cast<std::uint32_t>(k);
    const int zero = matrix.codec == Codec::i4 ? zero_point_at(matrix.scales, group.row, col) : 8;
    values[k] = code_value(matrix.codec, code_at(matrix, group.row, col), zero);
  }
}

// E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 are a binary32 with one bit of mantissa, up to a power of two.
PARAMDELTA_DEVICE float widen_f4(std::uint32_t code) {
  const float power = bits_as<float>((127u + 126u) << 23);
  return bits_as<float>((code & 8u) << 28 | (code & 7u) << 22) * power;
}

PARAMDELTA_DEVICE void read_nibbles(const unsigned char* from, Codec codec, double* values) {
  std::uint32_t word = 0;
  PARAMDELTA_UNROLL
  for (int k = 0; k < 4; ++k) word |= static_cast<std::uint32_t>(from[k]) << (8 * k);
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    const std::uint32_t code = word >> (4 * k) & 15u;
    values[k] =
        codec == Codec::f4 ? static_cast<double>(widen_f4(code)) : static_cast<double>(static_cast<int>(code) - 8);
  }
}

template <bool kE4m3>
PARAMDELTA_DEVICE void read_codes(const Matrix& matrix, const Group& group, double* values) {
  const unsigned char* row = row_of(matrix, group.row);
  if constexpr (kE4m3) {
    read_codes_as<DType::f8_e4m3>(row + group.col, group.n, values);
  } else {
    const std::size_t col = group.col;
    switch (matrix.codec) {
      case Codec::bf16: return read_codes_as<DType::bf16>(row + 2 * col, group.n, values);
      case Codec::f16: return read_codes_as<DType::f16>(row + 2 * col, group.n, values);
      case Codec::f32: return read_codes_as<DType::f32>(row + 4 * col, group.n, values);
      case Codec::f64: return read_codes_as<DType::f64>(row + 8 * col, group.n, values);
      case Codec::f8_e4m3: return read_codes_as<DType::f8_e4m3>(row + col, group.n, values);
      case Codec::f8_e5m2: return read_codes_as<DType::f8_e5m2>(row + col, group.n, values);
      case Codec::f4:
      case Codec::i4:
        if (group.n == static_cast<int>(kGroup) && col % 2 == 0 && matrix.scales.zero_points == nullptr)
          return read_nibbles(row + col / 2, matrix.codec, values);
        return read_odd_codes(matrix, group, values);
      default: return read_odd_codes(matrix, group, values);
    }
  }
}

// code · scale of a group: each product is exact.
template <bool kE4m3>
PARAMDELTA_DEVICE void read_group(const Matrix& matrix, const TilePlane& plane, const Group& group, double* values) {
  if (matrix.data == nullptr) {
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k) values[k] = 0.0;
    return;
  }
  read_codes<kE4m3>(matrix, group, values);
  if (matrix.scales.data == nullptr) return;
  if (plane.one_scale || plane.group_scale) {
    const double scale = plane.one_scale ? plane.scale : scale_of(matrix, group.row, group.col);
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k) values[k] = values[k] * scale;
  } else {
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k)
      if (k < group.n) values[k] = values[k] * scale_of(matrix, group.row, group.col + static_cast<std::uint32_t>(k));
  }
}

PARAMDELTA_DEVICE bool is_finite(double x) {
  const double magnitude = x < 0.0 ? -x : x;
  return magnitude <= 0x1.FFFFFFFFFFFFFp1023;
}

PARAMDELTA_DEVICE bool is_finite(float x) { return (bits_as<std::uint32_t>(x) & 0x7FFFFFFFu) < 0x7F800000u; }

PARAMDELTA_DEVICE_CALL Sum sum_literally(const ScaledParams& params, std::uint32_t row, std::uint32_t col) {
  return sum_at(params.job, params.terms, row, col);
}

// acc of a group; the bit of each touched element in `touched`. planes[0] is new_base's, then post and base in turn.
template <bool kE4m3>
PARAMDELTA_DEVICE void merge_group(const ScaledParams& params, const TilePlane* planes, const Group& group, double* acc,
                                   std::uint32_t& touched) {
  touched = 0;
  read_group<kE4m3>(params.job.new_base, planes[0], group, acc);
  PARAMDELTA_ROLLED
  for (std::size_t t = 0; t < params.job.n_terms; ++t) {
    const MatrixTerm& term = params.terms[t];
    double post[kGroup], base[kGroup];
    if constexpr (kE4m3) {
      read_group<true>(term.post, planes[1 + 2 * t], group, post);
      read_group<true>(term.base, planes[2 + 2 * t], group, base);
    } else {
      PARAMDELTA_ROLLED
      for (int side = 0; side < 2; ++side) {  // rolled, so that the reads of every codec are there once
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) post[k] = side == 0 ? 0.0 : base[k];
        read_group<false>(side == 0 ? term.post : term.base, planes[1 + 2 * t + static_cast<std::size_t>(side)], group,
                          base);
      }
    }
    PARAMDELTA_UNROLL
    for (int k = 0; k < static_cast<int>(kGroup); ++k) {
      const double delta = post[k] - base[k];
      const double product = term.alpha * delta;
      const double sum = acc[k] + product;
      const bool adds = delta != 0.0;
      acc[k] = adds ? sum : acc[k];
      touched |= adds ? 1u << k : 0u;
    }
  }
  // A delta of NaN or Inf never yields a finite acc; of equal bits it is none, and this puts it right.
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    if (k >= group.n) {
      acc[k] = 0.0;
      touched &= ~(1u << k);
    } else if (!is_finite(acc[k])) {
      const Sum sum = sum_literally(params, group.row, group.col + static_cast<std::uint32_t>(k));
      acc[k] = sum.acc;
      touched = (touched & ~(1u << k)) | (sum.touched ? 1u << k : 0u);
    }
  }
}

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

PARAMDELTA_DEVICE_CALL void add_totals(const Counts& counts, const Gathered& all, double error, double value,
                                       ScaledTotals* totals) {
  if (counts.nan != 0) atomic_add(&totals->nan, counts.nan);
  if (counts.inf != 0) atomic_add(&totals->inf, counts.inf);
  if (counts.overflow != 0) atomic_add(&totals->overflow, counts.overflow);
  if (all.largest > seen(&totals->amax)) atomic_max(&totals->amax, all.largest);
  if (all.touched != 0 && seen(&totals->touched) == 0) atomic_or(&totals->touched, 1u);
  if (error != 0.0) atomic_add(&totals->error_squared, error);
  if (value != 0.0) atomic_add(&totals->value_squared, value);
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

struct SharedLayout {
  Unit* units;
  TilePlane* planes;
  float* values;

  PARAMDELTA_DEVICE static SharedLayout of(unsigned char* shared, std::uint32_t units, std::uint32_t planes) {
    SharedLayout layout;
    layout.planes = reinterpret_cast<TilePlane*>(shared);
    layout.units = reinterpret_cast<Unit*>(layout.planes + planes);
    // To a multiple of 16 bytes.
    const std::size_t before = (planes * sizeof(TilePlane) + units * sizeof(Unit) + 15) / 16 * 16;
    layout.values = reinterpret_cast<float*>(shared + before);
    return layout;
  }
  static std::size_t bytes(std::size_t units, std::size_t planes, std::size_t values) {
    return (planes * sizeof(TilePlane) + units * sizeof(Unit) + 15) / 16 * 16 + values * sizeof(float);
  }
};

// f(index, group) for the groups of a tile that a thread works on.
template <class F>
PARAMDELTA_DEVICE void each_group(const Tile& tile, int thread, F f) {
  const std::uint32_t across = (tile.cols + kGroup - 1) / kGroup;
  PARAMDELTA_ROLLED
  for (std::uint32_t i = static_cast<std::uint32_t>(thread); i < tile.rows * across; i += kScaledThreads) {
    const std::uint32_t row = i / across, col = (i - row * across) * kGroup;
    const std::uint32_t rest = tile.cols - col;
    f(row * across * kGroup + col,
      Group{tile.row + row, tile.col + col, rest < kGroup ? static_cast<int>(rest) : static_cast<int>(kGroup)});
  }
}

PARAMDELTA_DEVICE void prepare_planes(const ScaledParams& params, const Tile& tile, int thread, TilePlane* planes) {
  for (std::uint32_t i = static_cast<std::uint32_t>(thread); i < 1 + 2 * params.job.n_terms; i += kScaledThreads) {
    const MatrixTerm& term = params.terms[i == 0 ? 0 : (i - 1) / 2];
    prepare_plane(i == 0 ? params.job.new_base : i % 2 == 1 ? term.post : term.base, tile, planes[i]);
  }
}

// A tile of whole units, side by side.
template <bool kE4m3>
struct UnitsKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    const ScaledMerge& job = params.job;
    const Tile tile = tile_of(params, block.index);
    const SharedLayout shared =
        SharedLayout::of(block.shared, params.units_across, static_cast<std::uint32_t>(1 + 2 * job.n_terms));
    const std::uint32_t n_units = (tile.cols + params.unit_cols - 1) / params.unit_cols;
    const bool whole_groups = params.unit_cols % kGroup == 0;
    const auto unit_of = [&](const Group& group, int k) {
      return (group.col - tile.col + static_cast<std::uint32_t>(k)) / params.unit_cols;
    };

    block.each([&](int thread) {
      prepare_planes(params, tile, thread, shared.planes);
      for (std::uint32_t u = static_cast<std::uint32_t>(thread); u < n_units; u += kScaledThreads)
        shared.units[u] = Unit{};
    });
    block.each([&](int thread) {
      Counts counts;
      Gathered gathered;
      each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
        double acc[kGroup];
        std::uint32_t touched;
        merge_group<kE4m3>(params, shared.planes, group, acc, touched);
        std::uint32_t unit = unit_of(group, 0);
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          const float x = round_value(job.recipe, acc[k]);
          shared.values[index + static_cast<std::uint32_t>(k)] = x;
          if (!is_finite(x)) count_value(counts, acc[k], x);
          if (!whole_groups && k < group.n) unit = unit_of(group, k);
          if (k < group.n) gathered.add(shared.units, unit, bits_as<std::uint32_t>(x) & 0x7FFFFFFFu, touched >> k & 1u);
        }
      });
      gathered.tell(shared.units);
      add_totals(counts, Gathered{}, 0.0, 0.0, params.totals);
    });
    if (asks_fit(job)) {
      block.each([&](int thread) {
        each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
          for (int k = 0; k < group.n; ++k) {
            check_fit(job, group.row, group.col + static_cast<std::uint32_t>(k),
                      shared.values[index + static_cast<std::uint32_t>(k)], shared.units[unit_of(group, k)]);
          }
        });
      });
    }
    block.each([&](int thread) {
      Gathered all;
      for (std::uint32_t u = static_cast<std::uint32_t>(thread); u < n_units; u += kScaledThreads) {
        Unit& unit = shared.units[u];
        all.largest = unit.largest > all.largest ? unit.largest : all.largest;
        all.touched |= unit.touched;
        choose_unit(params, tile.row, tile.col + u * params.unit_cols, unit);
      }
      add_totals(Counts{}, all, 0.0, 0.0, params.totals);
    });
    block.each([&](int thread) {
      Lost lost;
      each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
        float x[kGroup];
        const Unit* units[kGroup];
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          x[k] = shared.values[index + static_cast<std::uint32_t>(k)];
          units[k] = shared.units + (k == 0 || (!whole_groups && k < group.n) ? unit_of(group, k) : unit_of(group, 0));
        }
        encode_group(params, group, x, units, lost);
      });
      lost.settle();
      add_totals(Counts{}, Gathered{}, lost.error, lost.value, params.totals);
    });
  }
};

// Plain output of one element that is NaN, infinite or overflows.
PARAMDELTA_DEVICE_CALL void store_odd(const ScaledParams& params, std::uint32_t row, std::uint32_t col, Sum sum,
                                      unsigned char* to, Counts& counts) {
  const ScaledMerge& job = params.job;
  std::uint64_t code = 0;
  const bool overflow = store_at(job.out_dtype, sum.acc, &code);
  count(counts, sum.acc, overflow);
  if (!sum.touched && keeps_bits(job)) code = code_at(job.new_base, row, col);
  if (params.stage == Stage::plain)
    for (std::size_t i = 0; i < size_of(job.out_dtype); ++i) to[i] = static_cast<unsigned char>(code >> (8 * i));
}

// Plain output: acc of a group rounded once.
template <DType D>
PARAMDELTA_DEVICE void store_plain_as(const ScaledParams& params, const Group& group, const double* acc,
                                      std::uint32_t touched, Counts& counts) {
  using Code = typename Format<D>::Code;
  const ScaledMerge& job = params.job;
  alignas(16) Code codes[kGroup];
  bool ordinary = group.n == static_cast<int>(kGroup);
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    codes[k] = narrow<D>(acc[k]);
    ordinary = ordinary && is_ordinary<D>(acc[k]);
  }
  unsigned char* to = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(group.row) * job.out_pitch +
                      group.col * sizeof(Code);
  if (ordinary) {
    if (params.stage == Stage::plain) store_codes<static_cast<int>(kGroup)>(codes, to);
    return;
  }
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    if (k >= group.n) continue;
    unsigned char* at = to + static_cast<std::size_t>(k) * sizeof(Code);
    if (!is_ordinary<D>(acc[k]))
      store_odd(params, group.row, group.col + static_cast<std::uint32_t>(k), Sum{acc[k], (touched >> k & 1u) != 0}, at,
                counts);
    else if (params.stage == Stage::plain)
      std::memcpy(at, codes + k, sizeof(Code));
  }
}

PARAMDELTA_DEVICE void store_plain(const ScaledParams& params, const Group& group, const double* acc,
                                   std::uint32_t touched, Counts& counts) {
  switch (params.job.out_dtype) {
    case DType::bf16: return store_plain_as<DType::bf16>(params, group, acc, touched, counts);
    case DType::f16: return store_plain_as<DType::f16>(params, group, acc, touched, counts);
    case DType::f32: return store_plain_as<DType::f32>(params, group, acc, touched, counts);
    case DType::f64: return store_plain_as<DType::f64>(params, group, acc, touched, counts);
    case DType::f8_e4m3: return store_plain_as<DType::f8_e4m3>(params, group, acc, touched, counts);
    default: return store_plain_as<DType::f8_e5m2>(params, group, acc, touched, counts);
  }
}

// Any tile, one stage of the work. Where params.units is null, all is one unit that nobody asks about, and codes are
// made against the given scale.
template <bool kE4m3>
struct TilesKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    const ScaledMerge& job = params.job;
    const Tile tile = tile_of(params, block.index);
    const SharedLayout shared = SharedLayout::of(block.shared, 1, static_cast<std::uint32_t>(1 + 2 * job.n_terms));
    const auto unit_of = [&](const Group& group, int k) {
      return group.row / params.unit_rows * params.units_across +
             (group.col + static_cast<std::uint32_t>(k)) / params.unit_cols;
    };
    block.each([&](int thread) {
      prepare_planes(params, tile, thread, shared.planes);
      if (thread != 0) return;
      shared.units[0] = Unit{};
      if (job.given) shared.units[0].scale = choose(job, nullptr, true, 0.0f, true).scale;
    });
    block.each([&](int thread) {
      Counts counts;
      Gathered all, gathered;
      Lost lost;
      each_group(tile, thread, [&](std::uint32_t, const Group& group) {
        double acc[kGroup];
        std::uint32_t touched;
        merge_group<kE4m3>(params, shared.planes, group, acc, touched);
        all.touched |= touched;
        if (!job.quantised) return store_plain(params, group, acc, touched, counts);
        float x[kGroup];
        const Unit* units[kGroup];
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          x[k] = round_value(job.recipe, acc[k]);
          const std::uint32_t magnitude = bits_as<std::uint32_t>(x[k]) & 0x7FFFFFFFu;
          if (!is_finite(x[k])) count_value(counts, acc[k], x[k]);
          if (magnitude < 0x7F800000u && magnitude > all.largest) all.largest = magnitude;
          if (k >= group.n || params.units == nullptr) {
            units[k] = shared.units;
            continue;
          }
          const std::uint32_t unit = unit_of(group, k);
          units[k] = params.units + unit;
          if (params.stage == Stage::measure) gathered.add(params.units, unit, magnitude, touched >> k & 1u);
          if (params.stage == Stage::fit)
            check_fit(job, group.row, group.col + static_cast<std::uint32_t>(k), x[k], params.units[unit]);
        }
        if (params.stage == Stage::encode) encode_group(params, group, x, units, lost);
      });
      gathered.tell(params.units);
      lost.settle();
      if (!params.counts) {
        counts = Counts{};
        all = Gathered{};
      }
      if (!job.quantised) all.largest = 0;
      add_totals(counts, all, lost.error, lost.value, params.totals);
    });
  }
};

// One thread for each unit of the output: `measure` clears it, `encode` chooses its scale.
struct ChooseKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    block.each([&](int thread) {
      const std::uint64_t u = std::uint64_t{block.index} * kThreads + static_cast<std::uint64_t>(thread);
      const std::uint64_t down = (params.job.rows + params.unit_rows - 1) / params.unit_rows;
      if (u >= down * params.units_across) return;
      const std::uint32_t row = static_cast<std::uint32_t>(u / params.units_across) * params.unit_rows;
      const std::uint32_t col = static_cast<std::uint32_t>(u % params.units_across) * params.unit_cols;
      if (params.stage == Stage::measure)
        params.units[u] = Unit{};
      else
        choose_unit(params, row, col, params.units[u]);
    });
  }
};

}  // namespace paramdelta::cuda

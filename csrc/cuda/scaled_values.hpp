// Merged values of a group of columns of quantised matrices: what a kernel is told, where scales come from, decode,
// scale, add up. Used by scaled_codes.hpp and scaled_kernel.hpp.
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

}  // namespace paramdelta::cuda

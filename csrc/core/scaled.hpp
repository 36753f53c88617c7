// What a merge of quantised matrices is, for every backend: planes of codes, grids of scales, and the recipe by which
// merged values become codes and scales again. The words are those of paramdelta/formats.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtypes.hpp"
#include "core/expression.hpp"

namespace paramdelta {

// Numbered as CODECS in paramdelta/formats.py. Nibbles (f4, i4) lie two to a byte, the even column in the low half.
enum class Codec : std::uint8_t { bf16, f16, f32, f64, f8_e4m3, f8_e5m2, f8_e4m3fnuz, f8_e5m2fnuz, f4, i4 };
inline constexpr std::size_t kCodecCount = 10;

PARAMDELTA_HOST_DEVICE constexpr int bits_of(Codec codec) {
  switch (codec) {
    case Codec::bf16:
    case Codec::f16: return 16;
    case Codec::f32: return 32;
    case Codec::f64: return 64;
    case Codec::f4:
    case Codec::i4: return 4;
    default: return 8;
  }
}

// Bytes of `count` elements, of which an even number where they are nibbles, except at the end of a row.
PARAMDELTA_HOST_DEVICE constexpr std::size_t bytes_of(Codec codec, std::size_t count) {
  return (count * static_cast<std::size_t>(bits_of(codec)) + 7) / 8;
}

// How the scale of a whole tensor (NVFP4's second level) takes part in a value: code · (scale · second), exactly, or
// code · binary32(scale / second).
enum class Second : std::uint8_t { none, multiply, divide };

// Element (r, c) of a matrix uses the scale in row (r + row_phase) / rows and column (c + col_phase) / cols of the
// grid, where rows or cols of 0 stand for the whole extent. `pitch`: elements from one row of the grid to the next.
struct Scales {
  const void* data = nullptr;  // null: every scale is 1
  DType dtype = DType::f32;    // f32, bf16, f16, f8_e8m0 or f8_e4m3
  std::ptrdiff_t pitch = 0;
  std::uint32_t rows = 0, cols = 0;
  std::uint32_t row_phase = 0, col_phase = 0;
  Second second = Second::none;
  float second_value = 1.0f;
  // Zero points of i4, null: 8 for all. Nibble (r + zero_phase) % 8 of the 32-bit word in row (r + zero_phase) / 8, and
  // in the column of the element's scale; `zero_pitch` in words.
  const void* zero_points = nullptr;
  std::ptrdiff_t zero_pitch = 0;
  std::uint32_t zero_phase = 0;
};

// rows × cols elements; `pitch`: bytes from one row to the next. No alignment is required.
struct Matrix {
  const void* data = nullptr;  // null: zeros
  Codec codec = Codec::f32;
  std::ptrdiff_t pitch = 0;
  Scales scales;
};

struct MatrixTerm {
  Matrix post;
  Matrix base;
  double alpha = 1.0;
};

// Numbered as RULES in paramdelta/formats.py, which says what each computes.
enum class ScaleRule : std::uint8_t { ratio, ceil2, near2, inverse, nv_multiply, nv_divide };

struct Recipe {
  Codec codec = Codec::f8_e4m3;    // f8_e4m3, f4 or i4
  DType scale_dtype = DType::f32;  // as Scales::dtype
  ScaleRule rule = ScaleRule::ratio;
  bool reciprocal = false;   // codes are of x · (1 / scale), else of x / scale
  bool values_bf16 = false;  // acc is rounded to bf16 first, else to binary32
  float largest = 448.0f;
  float floor = 0.0f;
  float zero = 1.0f;
};

// What may be taken over from new_base, whose codec, grid and scale type are then those of the output: nothing; or the
// codes and scales of a unit that no delta touches, and power-of-two scales and those of i4 in any unit that has not
// outgrown them.
enum class Keep : std::uint8_t { nothing, units };

struct ScaledMerge {
  Matrix new_base;
  const MatrixTerm* terms = nullptr;
  std::size_t n_terms = 0;
  std::size_t rows = 0, cols = 0;
  void* out = nullptr;
  std::ptrdiff_t out_pitch = 0;  // bytes
  // Plain output (bf16 … f8_e5m2 without scales) where `quantised` is false: acc rounded once to out_dtype.
  bool quantised = false;
  DType out_dtype = DType::f32;
  // Quantised output: units are grid_rows × grid_cols elements from the first one on, 0 for the whole extent; the last
  // ones may be smaller.
  Recipe recipe;
  std::uint32_t grid_rows = 0, grid_cols = 0;
  void* out_scales = nullptr;
  std::ptrdiff_t out_scale_pitch = 0;  // elements
  float second_value = 1.0f;           // of the output, for the rules nv_*
  bool given = false;                  // the scale is `given_scale` for every unit, and out_scales is not written
  float given_scale = 1.0f;
  Keep keep = Keep::nothing;
};

// `touched`: some delta is not zero. `amax`: the largest finite |x|, x being acc rounded as the recipe says. The sums
// are over finite elements, of (code · scale − acc)² and acc²: what quantising lost. They are for a report, and the
// only results whose last bits may depend on the instruction set.
struct ScaledResult {
  Counts counts;
  bool touched = false;
  float amax = 0.0f;
  double error_squared = 0.0;
  double value_squared = 0.0;
};

}  // namespace paramdelta

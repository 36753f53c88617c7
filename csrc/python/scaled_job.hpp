// Matrices, recipes and jobs as they cross from Python, for the modules that merge quantised matrices. Planes cross as
// (address, codec number, pitch, scales or None).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/scaled.hpp"

namespace paramdelta {

using Address = std::uintptr_t;
// address, dtype, pitch, rows, cols, row phase, column phase, second, its value, zero points, their pitch
using ScalesTuple = std::tuple<Address, int, std::ptrdiff_t, std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t,
                               int, float, Address, std::ptrdiff_t>;
using MatrixTuple = std::tuple<Address, int, std::ptrdiff_t, std::optional<ScalesTuple>>;
using TermTuple = std::tuple<MatrixTuple, MatrixTuple, double>;
// codec, dtype of the scales, rule, reciprocal, values in bf16, largest, floor, zero
using RecipeTuple = std::tuple<int, int, int, bool, bool, float, float, float>;

// In the order of CODECS and RULES in paramdelta/formats.py.
inline constexpr const char* kCodecNames[kCodecCount] = {"bf16",    "f16",         "f32",         "f64", "f8_e4m3",
                                                         "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz", "f4",  "i4"};
inline constexpr const char* kRuleNames[] = {"ratio", "ceil2", "near2", "inverse", "nv_multiply", "nv_divide"};
inline constexpr int kRuleCount = sizeof(kRuleNames) / sizeof(kRuleNames[0]);

template <class Number>
inline Number numbered(int number, int count, const char* what) {
  if (number < 0 || number >= count) throw std::invalid_argument(what + (" has no number " + std::to_string(number)));
  return static_cast<Number>(number);
}

inline DType scale_dtype_of(int number) {
  const DType dtype = numbered<DType>(number, static_cast<int>(kDTypeCount), "dtype");
  switch (dtype) {
    case DType::f32:
    case DType::bf16:
    case DType::f16:
    case DType::f8_e8m0:
    case DType::f8_e4m3: return dtype;
    default: throw std::invalid_argument(std::string("no scale is of dtype ") + info(dtype).name);
  }
}

inline Scales scales_of(const ScalesTuple& from) {
  const auto& [address, dtype, pitch, rows, cols, row_phase, col_phase, second, value, zeros, zero_pitch] = from;
  Scales scales;
  scales.data = reinterpret_cast<const void*>(address);
  scales.dtype = scale_dtype_of(dtype);
  scales.pitch = pitch;
  scales.rows = rows;
  scales.cols = cols;
  scales.row_phase = row_phase;
  scales.col_phase = col_phase;
  scales.second = numbered<Second>(second, 3, "second");
  scales.second_value = value;
  scales.zero_points = reinterpret_cast<const void*>(zeros);
  scales.zero_pitch = zero_pitch;
  scales.zero_phase = row_phase;
  return scales;
}

inline Matrix matrix_of(const MatrixTuple& from) {
  const auto& [address, codec, pitch, scales] = from;
  Matrix matrix;
  matrix.data = reinterpret_cast<const void*>(address);
  matrix.codec = numbered<Codec>(codec, static_cast<int>(kCodecCount), "codec");
  matrix.pitch = pitch;
  if (scales) matrix.scales = scales_of(*scales);
  return matrix;
}

inline Recipe recipe_of(const RecipeTuple& from) {
  const auto& [codec, scale_dtype, rule, reciprocal, values_bf16, largest, floor, zero] = from;
  Recipe recipe;
  recipe.codec = numbered<Codec>(codec, static_cast<int>(kCodecCount), "codec");
  if (recipe.codec != Codec::f8_e4m3 && recipe.codec != Codec::f4 && recipe.codec != Codec::i4)
    throw std::invalid_argument(std::string("nothing is quantised to ") + kCodecNames[codec]);
  recipe.scale_dtype = scale_dtype_of(scale_dtype);
  recipe.rule = numbered<ScaleRule>(rule, kRuleCount, "rule");
  if (recipe.scale_dtype == DType::f8_e8m0 && recipe.rule != ScaleRule::ceil2 && recipe.rule != ScaleRule::near2)
    throw std::invalid_argument("f8_e8m0 holds powers of two only: its rules are ceil2 and near2");
  recipe.reciprocal = reciprocal;
  recipe.values_bf16 = values_bf16;
  recipe.largest = largest;
  recipe.floor = floor;
  recipe.zero = zero;
  return recipe;
}

inline ScaledMerge job_of(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows,
                          std::size_t cols, const std::optional<int>& out_dtype,
                          const std::optional<RecipeTuple>& recipe, std::pair<std::uint32_t, std::uint32_t> grid,
                          float second, std::optional<float> given, std::vector<MatrixTerm>& list) {
  for (const auto& [post, base, alpha] : terms) list.push_back({matrix_of(post), matrix_of(base), alpha});
  ScaledMerge job;
  job.new_base = matrix_of(new_base);
  job.terms = list.data();
  job.n_terms = list.size();
  job.rows = rows;
  job.cols = cols;
  if (recipe.has_value() == out_dtype.has_value())
    throw std::invalid_argument("expected either out_dtype (plain output) or a recipe (quantised output)");
  if (recipe) {
    job.quantised = true;
    job.recipe = recipe_of(*recipe);
  } else {
    job.out_dtype = numbered<DType>(*out_dtype, static_cast<int>(kMergeDTypeCount), "dtype with arithmetic");
  }
  job.grid_rows = grid.first;
  job.grid_cols = grid.second;
  job.second_value = second;
  job.given = given.has_value();
  job.given_scale = given.value_or(1.0f);
  return job;
}

}  // namespace paramdelta

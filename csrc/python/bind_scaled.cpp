// Binds the kernels for quantised matrices. Planes cross as (address, codec number, pitch, scales or None); the caller
// owns the memory, has checked its extent, and keeps it alive until the call returns. Nothing is kept here. The GIL is
// released while the kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/scaled.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

using Address = std::uintptr_t;
// address, dtype, pitch, rows, cols, row phase, column phase, second, its value, zero points, their pitch
using ScalesTuple = std::tuple<Address, int, std::ptrdiff_t, std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t,
                               int, float, Address, std::ptrdiff_t>;
using MatrixTuple = std::tuple<Address, int, std::ptrdiff_t, std::optional<ScalesTuple>>;
using TermTuple = std::tuple<MatrixTuple, MatrixTuple, double>;
// codec, dtype of the scales, rule, reciprocal, values in bf16, largest, floor, zero
using RecipeTuple = std::tuple<int, int, int, bool, bool, float, float, float>;
using Result = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, bool, float, double, double>;

// In the order of CODECS and RULES in paramdelta/formats.py.
constexpr const char* kCodecNames[kCodecCount] = {"bf16",    "f16",         "f32",         "f64", "f8_e4m3",
                                                  "f8_e5m2", "f8_e4m3fnuz", "f8_e5m2fnuz", "f4",  "i4"};
constexpr const char* kRuleNames[] = {"ratio", "ceil2", "near2", "inverse", "nv_multiply", "nv_divide"};
constexpr int kRuleCount = sizeof(kRuleNames) / sizeof(kRuleNames[0]);

template <class Number>
Number numbered(int number, int count, const char* what) {
  if (number < 0 || number >= count) throw std::invalid_argument(what + (" has no number " + std::to_string(number)));
  return static_cast<Number>(number);
}

DType scale_dtype_of(int number) {
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

Scales scales_of(const ScalesTuple& from) {
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

Matrix matrix_of(const MatrixTuple& from) {
  const auto& [address, codec, pitch, scales] = from;
  Matrix matrix;
  matrix.data = reinterpret_cast<const void*>(address);
  matrix.codec = numbered<Codec>(codec, static_cast<int>(kCodecCount), "codec");
  matrix.pitch = pitch;
  if (scales) matrix.scales = scales_of(*scales);
  return matrix;
}

Recipe recipe_of(const RecipeTuple& from) {
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

ScaledMerge job_of(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows, std::size_t cols,
                   const std::optional<int>& out_dtype, const std::optional<RecipeTuple>& recipe,
                   std::pair<std::uint32_t, std::uint32_t> grid, float second, std::optional<float> given,
                   std::vector<MatrixTerm>& list) {
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

Result result_of(const ScaledResult& r) {
  return {r.counts.nan, r.counts.inf, r.counts.overflow, r.touched, r.amax, r.error_squared, r.value_squared};
}

Result merge_scaled(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows,
                    std::size_t cols, std::pair<Address, std::ptrdiff_t> out, std::optional<int> out_dtype,
                    const std::optional<RecipeTuple>& recipe, std::pair<std::uint32_t, std::uint32_t> grid,
                    std::pair<Address, std::ptrdiff_t> out_scales, float second, std::optional<float> given, bool keep,
                    const std::optional<std::string>& isa, int threads) {
  std::vector<MatrixTerm> list;
  ScaledMerge job = job_of(new_base, terms, rows, cols, out_dtype, recipe, grid, second, given, list);
  job.out = reinterpret_cast<void*>(out.first);
  job.out_pitch = out.second;
  job.out_scales = reinterpret_cast<void*>(out_scales.first);
  job.out_scale_pitch = out_scales.second;
  job.keep = keep ? Keep::units : Keep::nothing;
  if (rows != 0 && cols != 0) {
    if (job.out == nullptr) throw std::invalid_argument("out has no memory");
    if (job.quantised && !job.given && job.out_scales == nullptr)
      throw std::invalid_argument("out_scales has no memory");
  }
  const cpu::Isa chosen = isa_of(isa);
  const py::gil_scoped_release unlocked;
  return result_of(cpu::merge_scaled_parallel(chosen, job, threads));
}

Result measure_scaled(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows,
                      std::size_t cols, std::optional<int> out_dtype, const std::optional<RecipeTuple>& recipe,
                      const std::optional<std::string>& isa, int threads) {
  std::vector<MatrixTerm> list;
  const ScaledMerge job = job_of(new_base, terms, rows, cols, out_dtype, recipe, {0, 0}, 1.0f, std::nullopt, list);
  const cpu::Isa chosen = isa_of(isa);
  const py::gil_scoped_release unlocked;
  return result_of(cpu::measure_scaled_parallel(chosen, job, threads));
}

}  // namespace

void bind_scaled(py::module_& module) {
  module.def(
      "codecs",
      [] {
        std::vector<std::tuple<std::string, int>> list;
        for (std::size_t i = 0; i < kCodecCount; ++i) list.emplace_back(kCodecNames[i], bits_of(static_cast<Codec>(i)));
        return list;
      },
      "Return (name, bits) of every codec, by number.");
  module.def(
      "scale_rules", [] { return std::vector<std::string>(kRuleNames, kRuleNames + kRuleCount); },
      "Return the rules by which scales follow from values, by number.");
  module.def("merge_scaled", &merge_scaled, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("rows"),
             py::arg("cols"), py::arg("out"), py::arg("out_dtype") = py::none(), py::arg("recipe") = py::none(),
             py::arg("grid") = std::pair<std::uint32_t, std::uint32_t>(0, 0),
             py::arg("out_scales") = std::pair<Address, std::ptrdiff_t>(0, 0), py::arg("second") = 1.0f,
             py::arg("given") = py::none(), py::arg("keep") = false, py::arg("isa") = py::none(),
             py::arg("threads") = 1,
             "Merge matrices of codes and scales; return (nan, inf, overflow, touched, amax, error², value²).");
  module.def("measure_scaled", &measure_scaled, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("rows"),
             py::arg("cols"), py::arg("out_dtype") = py::none(), py::arg("recipe") = py::none(),
             py::arg("isa") = py::none(), py::arg("threads") = 1,
             "Return what merge_scaled would, of which the sums are of no account, and write nothing.");
}

}  // namespace paramdelta

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
#include "python/scaled_job.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

using Result = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t, bool, float, double, double>;

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

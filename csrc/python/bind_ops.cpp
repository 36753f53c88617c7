// Binds the CPU kernels. Operands cross as (address, dtype number): the caller in paramdelta.backends.cpu owns the
// memory, has checked its extent, and keeps it alive until the call returns. Nothing is kept here. The GIL is released
// while the kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/dtypes.hpp"
#include "cpu/merge.hpp"
#include "cpu/norms.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

using Address = std::uintptr_t;
using OperandTuple = std::tuple<Address, int>;
using TermTuple = std::tuple<Address, int, Address, int, double>;

DType dtype_of(int code) {
  if (code < 0 || static_cast<std::size_t>(code) >= kMergeDTypeCount)
    throw std::invalid_argument("dtype number " + std::to_string(code) + " has no arithmetic");
  return static_cast<DType>(code);
}

std::tuple<std::uint64_t, std::uint64_t, std::uint64_t> merge(OperandTuple new_base,
                                                              const std::vector<TermTuple>& terms, OperandTuple out,
                                                              std::size_t count, bool streamed, int threads,
                                                              const std::optional<std::string>& isa) {
  std::vector<Term> list;
  for (const auto& [post, post_code, base, base_code, alpha] : terms)
    list.push_back({operand_of(post, post_code), operand_of(base, base_code), alpha});
  Merge job;
  job.new_base = operand_of(std::get<0>(new_base), std::get<1>(new_base));
  job.terms = list.data();
  job.n_terms = list.size();
  job.out = reinterpret_cast<void*>(std::get<0>(out));
  job.out_dtype = dtype_of(std::get<1>(out));
  job.count = count;
  if (count != 0 && job.out == nullptr) throw std::invalid_argument("out has no memory");
  const cpu::Isa chosen = isa_of(isa);
  Counts counts;
  {
    const py::gil_scoped_release unlocked;
    counts = cpu::merge_parallel(chosen, job, streamed ? cpu::Store::streamed : cpu::Store::cached, threads);
  }
  return {counts.nan, counts.inf, counts.overflow};
}

std::tuple<double, double, double, double> norms(OperandTuple post, OperandTuple base, OperandTuple new_base,
                                                 std::size_t count, int threads,
                                                 const std::optional<std::string>& isa) {
  const auto read = [](const OperandTuple& operand) { return operand_of(std::get<0>(operand), std::get<1>(operand)); };
  const Operand p = read(post), b = read(base), n = read(new_base);
  const cpu::Isa chosen = isa_of(isa);
  const py::gil_scoped_release unlocked;
  const NormSums sums = cpu::norms_parallel(chosen, p, b, n, count, threads);
  return {sums.delta_squared.rounded(), sums.drift_squared.rounded(), sums.inner.rounded(), sums.largest()};
}

}  // namespace

Operand operand_of(std::uintptr_t address, int code) {
  return {reinterpret_cast<const void*>(address), dtype_of(code)};
}

cpu::Isa isa_of(const std::optional<std::string>& name) {
  if (!name) return cpu::best_isa();
  for (cpu::Isa isa : cpu::available_isas())
    if (*name == cpu::name_of(isa)) return isa;
  throw cpu::UnavailableIsa("instruction set '" + *name + "' is not one that this machine runs");
}

void bind_ops(py::module_& module) {
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const cpu::UnavailableIsa& unavailable) {
      py::set_error(py::module_::import("paramdelta.errors").attr("BackendError"), unavailable.what());
    }
  });
  module.def(
      "dtypes",
      [] {
        std::vector<std::tuple<std::string, int, bool>> list;
        for (const DTypeInfo& dtype : kDTypes) list.emplace_back(dtype.name, dtype.bits, dtype.merges);
        return list;
      },
      "Return (name, bits, merges) of every dtype, by number.");
  module.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (cpu::Isa isa : cpu::available_isas()) names.emplace_back(cpu::name_of(isa));
        return names;
      },
      "Return the instruction sets that this machine runs, slowest first.");
  module.def(
      "best_isa", [] { return std::string(cpu::name_of(cpu::best_isa())); },
      "Return the instruction set in use: the last available one, or what PARAMDELTA_ISA names.");
  module.def("merge", &merge, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("out"), py::arg("count"),
             py::arg("streamed"), py::arg("threads"), py::arg("isa"),
             "Merge contiguous memory; return the counts (nan, inf, overflow). Address 0 stands for zeros.");
  module.def("norms", &norms, py::kw_only(), py::arg("post"), py::arg("base"), py::arg("new_base"), py::arg("count"),
             py::arg("threads"), py::arg("isa"),
             "Return |post - base|^2, |new_base - base|^2, their inner product and max |post - base|.");
}

}  // namespace paramdelta

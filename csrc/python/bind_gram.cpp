// Binds GramSums. Operands cross as (address, dtype number); the caller keeps their memory until the call returns. The
// GIL is released while the loops run; a GramSums belongs to one thread at a time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/codec.hpp"
#include "cpu/gram.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

using Facts = std::tuple<double, std::optional<std::uint64_t>, std::uint64_t, std::uint64_t>;

cpu::GramSums make(std::size_t operands, const std::vector<std::tuple<std::int32_t, std::int32_t>>& differences,
                   std::vector<cpu::Product> products) {
  std::vector<cpu::Difference> list;
  for (const auto& [minuend, subtrahend] : differences) list.push_back({minuend, subtrahend});
  return cpu::GramSums(operands, std::move(list), std::move(products));
}

void add(cpu::GramSums& sums, const std::vector<std::tuple<std::uintptr_t, int>>& operands, std::size_t count,
         std::uint64_t first, const std::optional<std::string>& isa) {
  std::vector<Operand> list;
  for (const auto& [address, code] : operands) list.push_back(operand_of(address, code));
  const cpu::Isa chosen = isa_of(isa);
  const py::gil_scoped_release unlocked;
  sums.add(chosen, list, count, first);
}

std::vector<Facts> facts(const cpu::GramSums& sums) {
  std::vector<Facts> found;
  for (const cpu::DifferenceFacts& f : sums.facts()) {
    const bool somewhere = f.at != cpu::DifferenceFacts::kNowhere;
    found.emplace_back(static_cast<double>(bits_as<float>(f.largest)),
                       somewhere ? std::optional<std::uint64_t>(f.at) : std::nullopt, f.nonfinite, f.unchanged);
  }
  return found;
}

}  // namespace

void bind_gram(py::module_& module) {
  py::class_<cpu::GramSums>(module, "GramSums", "Inner products of differences of operands, summed without rounding.")
      .def(py::init(&make), py::kw_only(), py::arg("operands"), py::arg("differences"), py::arg("products"))
      .def("add", &add, py::arg("operands"), py::kw_only(), py::arg("count"), py::arg("first"), py::arg("isa"),
           "Add elements first ... first + count - 1 of a run; first is a multiple of 4096.")
      .def("merge", &cpu::GramSums::merge, py::arg("other"), "Add the products of another run.")
      .def("products", &cpu::GramSums::products, "Return the inner products, each rounded once.")
      .def("facts", &facts, "Return (largest, where or None, not finite, unchanged) of each difference.");
}

}  // namespace paramdelta

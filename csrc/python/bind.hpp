// The parts of the extension module. The files in this folder are the only ones that see pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <string>

#include "cpu/merge.hpp"
#include "io/stage.hpp"

namespace paramdelta {

// The instruction set of that name, or the best one; throws cpu::UnavailableIsa.
cpu::Isa isa_of(const std::optional<std::string>& name);

// An operand as it crosses: (address, dtype number); throws std::invalid_argument for a number without arithmetic.
Operand operand_of(std::uintptr_t address, int code);
// None: none. A capsule of a StageTable, or an object with merge(worker, jobs); throws py::type_error.
std::shared_ptr<io::Stage> stage_of(const pybind11::object& object, cpu::Isa isa);

void bind_ops(pybind11::module_& module);
void bind_checksums(pybind11::module_& module);
void bind_gram(pybind11::module_& module);
void bind_lists(pybind11::module_& module);
void bind_scaled(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace paramdelta

// The parts of the extension module. The files in this folder are the only ones that see pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "cpu/merge.hpp"

namespace paramdelta {

// The instruction set of that name, or the best one; throws cpu::UnavailableIsa.
cpu::Isa isa_of(const std::optional<std::string>& name);

void bind_ops(pybind11::module_& module);
void bind_checksums(pybind11::module_& module);
void bind_scaled(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace paramdelta

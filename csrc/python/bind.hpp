// The parts of the extension module. The files in this folder are the only ones that see pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace paramdelta {

void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace paramdelta

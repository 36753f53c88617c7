// The module paramdelta._cpu: only its parts are listed here, each bound in a file of its own.
#include <pybind11/pybind11.h>

#include "python/bind.hpp"

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The C++ side of paramdelta. Private: use paramdelta.ops, or paramdelta.backends.cpu.";
  paramdelta::bind_ops(module);
  paramdelta::bind_checksums(module);
  paramdelta::bind_gram(module);
  paramdelta::bind_lists(module);
  paramdelta::bind_scaled(module);
  paramdelta::bind_engine(module);
}

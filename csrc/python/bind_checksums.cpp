// Binds the CRC-32 of bytes in memory, and what makes one of contributions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/crc32.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

std::uint32_t raw_of(const py::buffer& data, const std::optional<std::string>& isa) {
  const py::buffer_info info = data.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
    throw std::invalid_argument("expected contiguous bytes");
  const cpu::Crc32& crc = cpu::crc32_for(isa_of(isa));
  const py::gil_scoped_release release;
  return crc.raw(static_cast<const std::byte*>(info.ptr), static_cast<std::size_t>(info.shape[0]));
}

}  // namespace

void bind_checksums(py::module_& module) {
  module.def("crc32_raw", &raw_of, py::arg("data"), py::kw_only(), py::arg("isa") = py::none());
  module.def("crc32_shifted", &cpu::shifted, py::arg("raw"), py::arg("bytes_behind"));
  module.def(
      "crc32_multiplied",
      [](std::uint32_t a, std::uint32_t b, const std::optional<std::string>& isa) {
        return cpu::crc32_for(isa_of(isa)).multiply(a, b);
      },
      py::arg("a"), py::arg("b"), py::kw_only(), py::arg("isa") = py::none());
  module.def("crc32_of_raw", &cpu::crc32_of_raw, py::arg("raw"), py::arg("message_bytes"));
}

}  // namespace paramdelta

// The module paramdelta._cuda. Memory crosses as device addresses, streams as numbers: the caller owns the memory, has
// checked its extent, and keeps it alive until the stream has passed the call. Importing the module touches no driver.
// The same file, compiled with the kernels for the host, makes the module that tests use (PARAMDELTA_CUDA_MODULE).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/merge.hpp"

#if !defined(PARAMDELTA_CUDA_MODULE)
#define PARAMDELTA_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace paramdelta {
namespace {

DType dtype_of(int code) {
  if (code < 0 || static_cast<std::size_t>(code) >= kMergeDTypeCount)
    throw std::invalid_argument("dtype number " + std::to_string(code) + " has no arithmetic");
  return static_cast<DType>(code);
}

// new_base, [post, base, …], out, count, counts
using TensorTuple = std::tuple<std::uintptr_t, std::vector<std::uintptr_t>, std::uintptr_t, std::uint64_t, std::uintptr_t>;

void merge(int new_base, const std::vector<std::tuple<int, int, double>>& terms, int out,
           const std::vector<TensorTuple>& tensors, int device, std::uintptr_t stream) {
  cuda::Signature signature{dtype_of(new_base), dtype_of(out), {}};
  for (const auto& [post, base, alpha] : terms) signature.terms.push_back({dtype_of(post), dtype_of(base), alpha});
  std::vector<cuda::TensorAddresses> list;
  list.reserve(tensors.size());
  for (const auto& [first, pairs, to, count, counts] : tensors) list.push_back({first, pairs, to, count, counts});
  const py::gil_scoped_release unlocked;
  cuda::merge(signature, list, device, stream);
}

py::list devices() {
  py::list found;
  for (const cuda::Device& device : cuda::devices()) {
    py::dict each;
    each["name"] = device.name;
    each["capability"] = py::make_tuple(device.major, device.minor);
    each["processors"] = device.processors;
    each["memory"] = device.memory;
    each["single_to_double"] = device.single_to_double;
    each["shared_bytes"] = device.shared_bytes;
    found.append(each);
  }
  return found;
}

}  // namespace
}  // namespace paramdelta

PYBIND11_MODULE(PARAMDELTA_CUDA_MODULE, module) {
  using namespace paramdelta;
  module.doc() = "The CUDA kernels of paramdelta. Private: use paramdelta.ops, or paramdelta.backends.cuda.";
  py::register_exception<cuda::DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  module.def("why_not", &cuda::why_not, "Return '' where a device can be used, else why not, in CUDA's words.");
  module.def("devices", &devices, "Return what the devices are.");
  module.def("targets", &cuda::targets, "Return the architectures there is machine code for; negative: PTX.");
  module.def("on_host", &cuda::on_host, "Return whether this build runs the bodies of kernels on the host.");
  module.def("most_terms", &cuda::most_terms, "Return how many terms a merge can have.");
  module.def("merge", &merge, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("out"), py::arg("tensors"),
             py::arg("device"), py::arg("stream"),
             "Enqueue merges of (new_base, [post, base, ...], out, count, counts); address 0 stands for zeros.");
}

// Binds merges of lists of CPU tensors, which tensor_lists.hpp reads. The memory is the tensors', which the caller
// holds; the GIL is released while the kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/merge.hpp"
#include "python/bind.hpp"
#include "python/tensor_lists.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

// The counts of each merge, three 64-bit integers, one after the other; None where an output is out of the ordinary.
py::object merge(TensorMerges& tensors, const py::object& outs, int dtype, std::size_t streamed_from, int threads,
                 const std::optional<std::string>& isa) {
  const cpu::Isa chosen = isa_of(isa);
  if (!tensors.read_outs(outs, dtype)) return py::none();
  std::vector<Counts> counts;
  {
    const py::gil_scoped_release unlocked;
    const std::vector<ListedMerge>& listed = tensors.merges();
    const auto operand = [](const ListedTensor& tensor) {
      return Operand{reinterpret_cast<const void*>(tensor.address), tensor.dtype};
    };
    std::vector<Term> terms(listed.size());
    std::vector<Merge> jobs(listed.size());
    for (std::size_t k = 0; k < listed.size(); ++k) {
      terms[k] = {operand(listed[k].post), operand(listed[k].base), listed[k].alpha};
      jobs[k].new_base = operand(listed[k].new_base);
      jobs[k].terms = &terms[k];
      jobs[k].n_terms = 1;
      jobs[k].out = reinterpret_cast<void*>(listed[k].out.address);
      jobs[k].out_dtype = listed[k].out.dtype;
      jobs[k].count = listed[k].count;
    }
    counts = cpu::merge_many(chosen, jobs, streamed_from, threads);
  }
  static_assert(sizeof(Counts) == 24, "three 64-bit integers");
  return py::bytes(reinterpret_cast<const char*>(counts.data()), counts.size() * sizeof(Counts));
}

}  // namespace

void bind_lists(py::module_& module) {
  bind_tensor_merges(module, dlpack::kCpu)
      .def(
          "merge", &merge, py::arg("outs"), py::kw_only(), py::arg("dtype"), py::arg("streamed_from"),
          py::arg("threads"), py::arg("isa") = py::none(),
          "Merge into as many tensors, of dtype number `dtype` or, where that is -1, of any; return the counts of each "
          "(three u64), or None, nothing being written, where an output is not ordinary or overlaps other memory.");
}

}  // namespace paramdelta

// The module paramdelta._cuda. Memory crosses as device addresses, streams as numbers: the caller owns the memory, has
// checked its extent, and keeps it alive until the stream has passed the call. Importing the module touches no driver.
// The same file, compiled with the kernels for the host, makes the module that tests use (PARAMDELTA_CUDA_MODULE).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "cuda/device.hpp"
#include "cuda/merge.hpp"
#include "cuda/norms.hpp"
#include "cuda/rates.hpp"
#include "cuda/scaled.hpp"
#include "cuda/stage.hpp"
#include "python/scaled_job.hpp"
#include "python/tensor_lists.hpp"

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
using TensorTuple =
    std::tuple<std::uintptr_t, std::vector<std::uintptr_t>, std::uintptr_t, std::uint64_t, std::uintptr_t>;

void merge(int new_base, const std::vector<std::tuple<int, int, double>>& terms, int out,
           const std::vector<TensorTuple>& tensors, int device, std::uintptr_t stream) {
  cuda::Signature signature{dtype_of(new_base), dtype_of(out), {}};
  for (const auto& [post, base, alpha] : terms) signature.terms.push_back({dtype_of(post), dtype_of(base), alpha});
  std::vector<cuda::TensorAddresses> list;
  list.reserve(tensors.size());
  for (const auto& [first, pairs, to, count, counts] : tensors)
    list.push_back({first, cuda::PairAddresses(pairs), to, count, counts});
  const py::gil_scoped_release unlocked;
  cuda::merge(signature, list, device, stream);
}

// Address and dtype number of an operand.
using OperandTuple = std::pair<std::uintptr_t, int>;

void norms(OperandTuple post, OperandTuple base, OperandTuple new_base, std::uint64_t count, std::uintptr_t totals,
           int device, std::uintptr_t stream) {
  const auto read = [](const OperandTuple& operand) {
    return Operand{reinterpret_cast<const void*>(operand.first), dtype_of(operand.second)};
  };
  cuda::add_norms(read(post), read(base), read(new_base), count, reinterpret_cast<cuda::NormTotals*>(totals), device,
                  stream);
}

std::tuple<double, double, double, double> read_norms(const py::bytes& totals) {
  const std::string_view bytes = totals;
  if (bytes.size() != sizeof(cuda::NormTotals)) throw std::invalid_argument("totals of norms have another size");
  cuda::NormTotals copy;
  std::memcpy(&copy, bytes.data(), sizeof(copy));
  const NormSums sums = cuda::sums_of(copy);
  return {sums.delta_squared.rounded(), sums.drift_squared.rounded(), sums.inner.rounded(), sums.largest()};
}

// Enqueues merges of listed tensors on PyTorch's current stream, those of one signature together. False, where nothing
// is enqueued: an output is out of the ordinary. `counts` is a tensor of int64 [n, 3] beside them.
bool merge_tensors(TensorMerges& tensors, const py::object& outs, const py::object& counts, int dtype) {
  if (!tensors.read_outs(outs, dtype)) return false;
  const std::uintptr_t to = tensors.address_of_counts(counts);
  if (to == 0) return false;
  const int device = tensors.reader().device().index;
  const std::uintptr_t stream = tensors.reader().stream();
  const py::gil_scoped_release unlocked;
  using Types = std::tuple<DType, DType, DType, DType, double>;
  std::map<Types, std::vector<cuda::TensorAddresses>> groups;
  std::vector<cuda::TensorAddresses>* group = nullptr;
  Types last{};
  const std::vector<ListedMerge>& merges = tensors.merges();
  for (std::size_t k = 0; k < merges.size(); ++k) {
    const ListedMerge& merge = merges[k];
    const Types types(merge.new_base.dtype, merge.out.dtype, merge.post.dtype, merge.base.dtype, merge.alpha);
    if (group == nullptr || types != last) {
      group = &groups[types], last = types;
      if (k == 0) group->reserve(merges.size());  // lists are mostly of one signature
    }
    if (merge.count != 0)
      group->push_back({merge.new_base.address,
                        {merge.post.address, merge.base.address},
                        merge.out.address,
                        merge.count,
                        to + 24 * k});
  }
  for (const auto& [types, list] : groups) {
    const auto& [new_base, out, post, base, alpha] = types;
    cuda::merge({new_base, out, {{post, base, alpha}}}, list, device, stream);
  }
  return true;
}

// A job on device memory, and the terms it points to.
struct ScaledCall {
  std::vector<MatrixTerm> terms;
  ScaledMerge job;
  cuda::ScaledEffect effect;
};

ScaledCall scaled_call(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows,
                       std::size_t cols, const std::optional<int>& out_dtype, const std::optional<RecipeTuple>& recipe,
                       std::pair<std::uint32_t, std::uint32_t> grid, float second, std::optional<float> given,
                       bool keep, bool measure) {
  ScaledCall call;
  call.job = job_of(new_base, terms, rows, cols, out_dtype, recipe, grid, second, given, call.terms);
  call.job.keep = keep ? Keep::units : Keep::nothing;
  call.effect = measure ? cuda::ScaledEffect::measure : cuda::ScaledEffect::write;
  return call;
}

std::size_t workspace_bytes(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows,
                            std::size_t cols, const std::optional<int>& out_dtype,
                            const std::optional<RecipeTuple>& recipe, std::pair<std::uint32_t, std::uint32_t> grid,
                            float second, std::optional<float> given, bool keep, bool measure) {
  const ScaledCall call =
      scaled_call(new_base, terms, rows, cols, out_dtype, recipe, grid, second, given, keep, measure);
  return cuda::workspace_bytes(call.job, call.effect);
}

void merge_scaled(const MatrixTuple& new_base, const std::vector<TermTuple>& terms, std::size_t rows, std::size_t cols,
                  const std::optional<int>& out_dtype, const std::optional<RecipeTuple>& recipe,
                  std::pair<std::uint32_t, std::uint32_t> grid, float second, std::optional<float> given, bool keep,
                  bool measure, std::pair<Address, std::ptrdiff_t> out, std::pair<Address, std::ptrdiff_t> out_scales,
                  Address totals, Address workspace, int device, Address stream) {
  ScaledCall call = scaled_call(new_base, terms, rows, cols, out_dtype, recipe, grid, second, given, keep, measure);
  ScaledMerge& job = call.job;
  job.out = reinterpret_cast<void*>(out.first);
  job.out_pitch = out.second;
  job.out_scales = reinterpret_cast<void*>(out_scales.first);
  job.out_scale_pitch = out_scales.second;
  if (rows != 0 && cols != 0 && !measure) {
    if (job.out == nullptr) throw std::invalid_argument("out has no memory");
    if (job.quantised && !job.given && job.out_scales == nullptr)
      throw std::invalid_argument("out_scales has no memory");
  }
  const py::gil_scoped_release unlocked;
  job.terms = call.terms.data();
  cuda::merge_scaled(job, call.effect, reinterpret_cast<cuda::ScaledTotals*>(totals),
                     reinterpret_cast<void*>(workspace), device, stream);
}

// A stage and its table, which the capsule owns.
struct OwnedStage {
  cuda::PinnedStage stage;
  StageTable table;
  explicit OwnedStage(int device) : stage(device), table(stage.table()) {}
};

py::capsule stage(int device) {
  auto owned = std::make_unique<OwnedStage>(device);
  const py::capsule capsule(&owned->table, StageTable::kCapsule,
                            [](PyObject* object) { delete static_cast<OwnedStage*>(PyCapsule_GetContext(object)); });
  if (PyCapsule_SetContext(capsule.ptr(), owned.get()) != 0) throw py::error_already_set();
  owned.release();
  return capsule;
}

py::tuple rates(int device) {
  cuda::Rates found;
  {
    const py::gil_scoped_release unlocked;
    found = cuda::measure(device);
  }
  return py::make_tuple(found.up, found.down, found.merge);
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
  module.def("targets", &cuda::targets, "Return the architectures there is machine code for; of the last, PTX too.");
  module.def("on_host", &cuda::on_host, "Return whether this build runs the bodies of kernels on the host.");
  module.def(
      "stage", &stage, py::arg("device"),
      "Return the stage of a device for paramdelta._cpu.Engine. It keeps page-locked and device memory between runs.");
  module.def("rates", &rates, py::arg("device"),
             "Measure and return bytes per second: to the device and back, both at once; of operands merged there.");
  module.def("most_terms", &cuda::most_terms, "Return how many terms a merge can have.");
  module.def("merge", &merge, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("out"), py::arg("tensors"),
             py::arg("device"), py::arg("stream"),
             "Enqueue merges of (new_base, [post, base, ...], out, count, counts); address 0 stands for zeros.");
  module.attr("NORM_TOTALS_BYTES") = sizeof(cuda::NormTotals);
  module.def("norms", &norms, py::kw_only(), py::arg("post"), py::arg("base"), py::arg("new_base"), py::arg("count"),
             py::arg("totals"), py::arg("device"), py::arg("stream"),
             "Enqueue the norms of operands (address, dtype), added to totals; address 0 stands for zeros.");
  module.def("read_norms", &read_norms, py::arg("totals"),
             "Return |post - base|^2, |new_base - base|^2, their inner product and max |post - base|, of the bytes of "
             "totals.");
  bind_tensor_merges(module, cuda::on_host() ? dlpack::kCpu : dlpack::kCuda)
      .def(
          "merge", &merge_tensors, py::arg("outs"), py::arg("counts"), py::kw_only(), py::arg("dtype"),
          "Enqueue merges into as many tensors, of dtype number `dtype` or, where that is -1, of any, and their counts "
          "(int64 [n, 3], zeros before); False, nothing being enqueued, where an output is not ordinary or overlaps "
          "other memory.");
  const auto none = py::none();
  const std::pair<std::uint32_t, std::uint32_t> whole(0, 0);
  module.attr("TOTALS_BYTES") = sizeof(cuda::ScaledTotals);
  module.def("most_scaled_terms", &cuda::most_scaled_terms, "Return how many terms merge_scaled can have.");
  module.def("workspace_bytes", &workspace_bytes, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("rows"),
             py::arg("cols"), py::arg("out_dtype") = none, py::arg("recipe") = none, py::arg("grid") = whole,
             py::arg("second") = 1.0f, py::arg("given") = none, py::arg("keep") = false, py::arg("measure") = false,
             "Return the device memory that merge_scaled needs beside its operands.");
  module.def(
      "merge_scaled", &merge_scaled, py::kw_only(), py::arg("new_base"), py::arg("terms"), py::arg("rows"),
      py::arg("cols"), py::arg("out_dtype") = none, py::arg("recipe") = none, py::arg("grid") = whole,
      py::arg("second") = 1.0f, py::arg("given") = none, py::arg("keep") = false, py::arg("measure") = false,
      py::arg("out") = std::pair<Address, std::ptrdiff_t>(0, 0),
      py::arg("out_scales") = std::pair<Address, std::ptrdiff_t>(0, 0), py::arg("totals"), py::arg("workspace") = 0,
      py::arg("device"), py::arg("stream"),
      "Enqueue a merge of matrices of codes and scales; totals are (nan, inf, overflow: u64; touched, amax: u32; "
      "error², value²: f64), and added to.");
}

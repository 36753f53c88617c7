// Lists of PyTorch tensors, read where they are: addresses, dtypes and sizes of all that is merged in one call, checked
// without a Python frame for each. What is out of the ordinary (strides, another type, gradients, shapes that differ,
// memory that overlaps) is not judged here: reading says no, and the caller goes the general way, which has the errors.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/dtypes.hpp"
#include "python/dlpack_exchange.hpp"

namespace paramdelta {

// Consecutive elements of one dtype.
struct ListedTensor {
  std::uintptr_t address = 0;
  DType dtype = DType::f32;
};

// out = new_base + alpha · (post − base) over `count` elements.
struct ListedMerge {
  ListedTensor post, base, new_base, out;
  double alpha = 1.0;
  std::uint64_t count = 0;
};

// Views of tensors whose bits are their values, and whose elements follow each other in row-major order.
class TensorReader {
 public:
  // `types`: torch.Tensor and those beside it that are nothing but tensors. A subclass may mean anything by its memory.
  TensorReader(pybind11::tuple types, std::int32_t device_type) : types_(std::move(types)), device_type_(device_type) {
    if (types_.size() == 0) return;
    exchange_ = dlpack::exchange_of(PyTuple_GET_ITEM(types_.ptr(), 0));
    requires_grad_ = attribute("requires_grad");
    is_neg_ = attribute("is_neg");
    if (!requires_grad_ || !is_neg_) exchange_ = nullptr;
  }

  bool usable() const { return exchange_ != nullptr; }
  dlpack::Device device() const { return device_; }

  // Whether `x` is such a tensor, on the device of those before it. No Python error is left.
  bool read(PyObject* x, dlpack::View& view, std::uint64_t& count) {
    if (is_plain(x) && exchange_->view(x, &view) == 0 && fits(view, count)) return true;
    PyErr_Clear();
    return false;
  }

  // PyTorch's current stream there, or 0 on the CPU.
  std::uintptr_t stream() const {
    void* found = nullptr;
    if (device_.type != dlpack::kCpu && exchange_->stream(device_.type, device_.index, &found) != 0)
      throw pybind11::error_already_set();
    return reinterpret_cast<std::uintptr_t>(found);
  }

 private:
  bool is_plain(PyObject* x) const {
    bool known = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(types_.ptr()); ++i)
      known = known || reinterpret_cast<PyObject*>(Py_TYPE(x)) == PyTuple_GET_ITEM(types_.ptr(), i);
    if (!known) return false;
    return !says_yes(requires_grad_, x) && !says_yes(is_neg_, x);
  }

  // An attribute of the first type, by which it is read of objects of all of them: null where one has its own.
  pybind11::object attribute(const char* name) const {
    PyObject* found = nullptr;
    for (const pybind11::handle type : types_) {
      PyObject* const own = PyObject_GetAttrString(type.ptr(), name);
      const bool same = own != nullptr && (found == nullptr || own == found);
      Py_XDECREF(own);  // the type keeps it
      if (!same) return PyErr_Clear(), pybind11::object();
      found = own;
    }
    const bool readable = Py_TYPE(found) == &PyGetSetDescr_Type || Py_TYPE(found) == &PyMethodDescr_Type;
    return readable ? pybind11::reinterpret_borrow<pybind11::object>(found) : pybind11::object();
  }

  // Whether a property, or a method without arguments, is anything but false.
  static bool says_yes(const pybind11::object& descriptor, PyObject* x) {
    PyObject* said;
    if (Py_TYPE(descriptor.ptr()) == &PyGetSetDescr_Type)
      said = Py_TYPE(descriptor.ptr())->tp_descr_get(descriptor.ptr(), x, reinterpret_cast<PyObject*>(Py_TYPE(x)));
    else
      said = PyObject_Vectorcall(descriptor.ptr(), &x, 1, nullptr);
    Py_XDECREF(said);
    return said != Py_False;
  }

  bool fits(const dlpack::View& view, std::uint64_t& count) {
    if (device_.type == 0) device_ = view.device;
    if (!(view.device == device_) || view.device.type != device_type_) return false;
    // From the last axis on, as long as there is more than one element, each stride is what lies below.
    std::uint64_t all = 1;
    bool row_major = true;
    for (std::int32_t axis = view.rank; axis-- > 0;) {
      const auto size = static_cast<std::uint64_t>(view.shape[axis]);
      row_major = row_major && (size == 1 || static_cast<std::uint64_t>(view.strides[axis]) == all);
      all *= size;
    }
    count = all;
    return all == 0 || (row_major && view.data != nullptr);
  }

  pybind11::tuple types_;
  std::int32_t device_type_;
  dlpack::Device device_{0, 0};
  const dlpack::Exchange* exchange_ = nullptr;
  pybind11::object requires_grad_, is_neg_;
};

// The dtype with arithmetic that an element type is, or false.
inline bool dtype_of_element(const dlpack::ElementType& type, DType& dtype) {
  struct Row {
    std::uint8_t code, bits;
    DType dtype;
  };
  static constexpr Row kRows[] = {
      {dlpack::kBfloat, 16, DType::bf16},         {dlpack::kFloat, 16, DType::f16},
      {dlpack::kFloat, 32, DType::f32},           {dlpack::kFloat, 64, DType::f64},
      {dlpack::kFloat8E4m3fn, 8, DType::f8_e4m3}, {dlpack::kFloat8E5m2, 8, DType::f8_e5m2},
  };
  for (const Row& row : kRows) {
    if (type.code == row.code && type.bits == row.bits && type.lanes == 1) {
      dtype = row.dtype;
      return true;
    }
  }
  return false;
}

// Merges of tensors. SAFETY: the tensors, operands and outputs, are kept alive as long as this is; their addresses are
// those of the time when they were read.
class TensorMerges {
 public:
  TensorMerges(pybind11::tuple types, std::int32_t device_type) : reader_(std::move(types), device_type) {}

  const std::vector<ListedMerge>& merges() const { return merges_; }
  const TensorReader& reader() const { return reader_; }
  std::uint64_t elements() const {
    std::uint64_t all = 0;
    for (const ListedMerge& merge : merges_) all += merge.count;
    return all;
  }

  // Takes a list or tuple of (post, base, new_base) or (post, base, new_base, alpha); false: not all are ordinary.
  bool read(const pybind11::object& listed) {
    if (!reader_.usable() || !(PyList_Check(listed.ptr()) || PyTuple_Check(listed.ptr()))) return false;
    const pybind11::tuple rows(listed);  // other threads may change a list while PyTorch lets them run
    const auto n = static_cast<std::size_t>(PyTuple_GET_SIZE(rows.ptr()));
    merges_.resize(n);
    shapes_.reserve(3 * n);
    alive_.reserve(4 * n);
    for (std::size_t k = 0; k < n; ++k)
      if (!read_row(PyTuple_GET_ITEM(rows.ptr(), static_cast<Py_ssize_t>(k)), merges_[k])) return false;
    return true;
  }

  // Takes as many outputs, of any dtype or, where `dtype` is not negative, of that; false as above.
  bool read_outs(const pybind11::object& listed, int dtype) {
    if (!(PyList_Check(listed.ptr()) || PyTuple_Check(listed.ptr()))) return false;
    const pybind11::tuple outs(listed);
    if (static_cast<std::size_t>(PyTuple_GET_SIZE(outs.ptr())) != merges_.size()) return false;
    const std::int64_t* shape = shapes_.data();
    for (std::size_t k = 0; k < merges_.size(); ++k) {
      ListedMerge& merge = merges_[k];
      dlpack::View view;
      std::uint64_t count;
      if (!read_one(PyTuple_GET_ITEM(outs.ptr(), static_cast<Py_ssize_t>(k)), view, count, merge.out)) return false;
      if (view.rank != shape[0] || !same_sizes(view, shape + 1)) return false;
      if (dtype >= 0 && static_cast<int>(merge.out.dtype) != dtype) return false;
      shape += 1 + view.rank;
    }
    return are_apart();
  }

  // The address of a tensor of int64 that has three for each merge, or 0.
  std::uintptr_t address_of_counts(const pybind11::object& counts) {
    alive_.push_back(counts);
    dlpack::View view;
    std::uint64_t count;
    if (!reader_.read(counts.ptr(), view, count) || count != 3 * merges_.size()) return 0;
    if (view.dtype.code != dlpack::kInt || view.dtype.bits != 64 || view.dtype.lanes != 1) return 0;
    return reinterpret_cast<std::uintptr_t>(view.data) + view.byte_offset;
  }

 private:
  static bool same_sizes(const dlpack::View& view, const std::int64_t* shape) {
    return std::equal(view.shape, view.shape + view.rank, shape);
  }

  bool read_one(PyObject* x, dlpack::View& view, std::uint64_t& count, ListedTensor& to) {
    alive_.push_back(pybind11::reinterpret_borrow<pybind11::object>(x));
    if (!reader_.read(x, view, count) || !dtype_of_element(view.dtype, to.dtype)) return false;
    to.address = reinterpret_cast<std::uintptr_t>(view.data) + view.byte_offset;
    return true;
  }

  bool read_row(PyObject* row, ListedMerge& merge) {
    // Held before anything runs that may change the row.
    pybind11::object held[4];
    const bool listed = PyList_Check(row);
    if (!listed && !PyTuple_Check(row)) return false;
    const Py_ssize_t size = listed ? PyList_GET_SIZE(row) : PyTuple_GET_SIZE(row);
    if (size != 3 && size != 4) return false;
    for (Py_ssize_t i = 0; i < size; ++i)
      held[i] =
          pybind11::reinterpret_borrow<pybind11::object>(listed ? PyList_GET_ITEM(row, i) : PyTuple_GET_ITEM(row, i));
    if (size == 4) {
      // A bool is an int, and float() takes either.
      if (!PyFloat_Check(held[3].ptr()) && !PyLong_Check(held[3].ptr())) return false;
      merge.alpha = PyFloat_AsDouble(held[3].ptr());
      if (PyErr_Occurred() || !std::isfinite(merge.alpha)) return PyErr_Clear(), false;
    }
    ListedTensor* const to[] = {&merge.post, &merge.base, &merge.new_base};
    const std::size_t at = shapes_.size();
    for (int i = 0; i < 3; ++i) {
      dlpack::View view;
      if (!read_one(held[i].ptr(), view, merge.count, *to[i])) return false;
      if (i == 0) {
        shapes_.push_back(view.rank);
        shapes_.insert(shapes_.end(), view.shape, view.shape + view.rank);
      } else if (view.rank != shapes_[at] || !same_sizes(view, shapes_.data() + at + 1)) {
        return false;
      }
    }
    return true;
  }

  // Whether each output is apart from all other memory, or exactly one of its own operands.
  bool are_apart() const {
    struct Range {
      std::uintptr_t first, end;
      std::size_t merge;
    };
    std::vector<Range> outs;
    outs.reserve(merges_.size());
    for (std::size_t k = 0; k < merges_.size(); ++k) {
      const ListedMerge& merge = merges_[k];
      if (merge.count != 0)
        outs.push_back({merge.out.address, merge.out.address + merge.count * size_of(merge.out.dtype), k});
    }
    const auto before = [](const Range& a, const Range& b) { return a.first < b.first; };
    if (!std::is_sorted(outs.begin(), outs.end(), before)) std::sort(outs.begin(), outs.end(), before);
    for (std::size_t i = 1; i < outs.size(); ++i)
      if (outs[i].first < outs[i - 1].end) return false;
    std::size_t near = 0;  // lists are often in the order of their memory
    for (std::size_t k = 0; k < merges_.size(); ++k) {
      const ListedMerge& merge = merges_[k];
      if (merge.count == 0) continue;
      for (const ListedTensor* operand : {&merge.post, &merge.base, &merge.new_base}) {
        const std::uintptr_t first = operand->address, end = first + merge.count * size_of(operand->dtype);
        // The first output that ends beyond where the operand begins.
        const auto follows = [&](std::size_t i) {
          return (i == outs.size() || outs[i].end > first) && (i == 0 || outs[i - 1].end <= first);
        };
        if (!follows(near)) {
          if (near < outs.size() && follows(near + 1))
            ++near;
          else
            near = static_cast<std::size_t>(
                std::partition_point(outs.begin(), outs.end(), [&](const Range& r) { return r.end <= first; }) -
                outs.begin());
        }
        if (near == outs.size() || outs[near].first >= end) continue;
        const bool same = outs[near].merge == k && outs[near].first == first && outs[near].end == end;
        if (!same) return false;
      }
    }
    return true;
  }

  TensorReader reader_;
  std::vector<ListedMerge> merges_;
  std::vector<std::int64_t> shapes_;  // of each merge: the rank, and so many sizes
  std::vector<pybind11::object> alive_;
};

// Binds the class, and a function that reads merges on a device type into one, or returns None. The class is local to
// the module: each of the two has its own.
inline pybind11::class_<TensorMerges> bind_tensor_merges(pybind11::module_& module, std::int32_t device_type) {
  namespace py = pybind11;
  py::class_<TensorMerges> bound(module, "TensorMerges", py::module_local());
  bound.def_property_readonly("elements", &TensorMerges::elements, "How many elements all outputs have together.");
  module.def(
      "read_tensor_merges",
      [device_type](const py::object& merges, py::tuple types) -> py::object {
        auto read = std::make_unique<TensorMerges>(std::move(types), device_type);
        if (!read->read(merges)) return py::none();
        return py::cast(std::move(read));
      },
      py::arg("merges"), py::arg("types"),
      "Return a list of (post, base, new_base[, alpha]) as TensorMerges, or None where not all of it is ordinary: "
      "tensors of exactly these types on one device, dense in row-major order, without gradients.");
  return bound;
}

}  // namespace paramdelta

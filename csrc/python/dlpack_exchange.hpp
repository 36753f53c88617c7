// What DLPack's C exchange gives of a tensor: the table of functions behind a type's `__dlpack_c_exchange_api__`, and
// the record that one of them fills. Layouts are those of DLPack 1, whose major version is checked where the table is
// found (https://dmlc.github.io/dlpack/latest/c_api.html); no header of a framework is needed, nor its library at link.
#pragma once

#include <Python.h>

#include <cstdint>

namespace paramdelta::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kFloat8E4m3fn = 10, kFloat8E5m2 = 12 };

struct Device {
  std::int32_t type;
  std::int32_t index;
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

struct ElementType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

// Strides count elements. `shape` and `strides` belong to the tensor, and are null where the rank is 0.
struct View {
  void* data;
  Device device;
  std::int32_t rank;
  ElementType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct Exchange {
  struct Header {
    std::uint32_t major, minor;
    const Header* previous;
  } header;
  void (*allocate)();  // this and the next two have other signatures, and are not called here
  void (*export_to)();
  void (*import_from)();
  // Fills a view of an object of exactly the type that has the table: 0, or -1 with a Python error. Owns nothing.
  int (*view)(void* object, View* to);
  // The stream on which the framework enqueues its work on a device at the moment, likewise.
  int (*stream)(std::int32_t device_type, std::int32_t index, void** to);
};

// The table of a type, or null where it has none of version 1; no Python error is left.
inline const Exchange* exchange_of(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  const void* found = capsule != nullptr ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);  // what it points to lives as long as the process
  PyErr_Clear();
  const auto* header = static_cast<const Exchange::Header*>(found);
  while (header != nullptr && header->major != 1) header = header->previous;
  const auto* exchange = reinterpret_cast<const Exchange*>(header);
  return exchange != nullptr && exchange->view != nullptr && exchange->stream != nullptr ? exchange : nullptr;
}

}  // namespace paramdelta::dlpack

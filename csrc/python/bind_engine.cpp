// Binds the streaming engine. Columns arrive as buffers and are copied once; output memory stays the caller's and is
// kept alive by the engine object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "core/error.hpp"
#include "io/engine.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

template <class Row>
std::vector<Row> rows_of(const py::buffer& buffer, const char* what) {
  const py::buffer_info info = buffer.request();
  if (info.ndim != 1 || info.itemsize != static_cast<py::ssize_t>(sizeof(Row)) || info.strides[0] != info.itemsize)
    throw std::invalid_argument(std::string(what) + ": expected a contiguous column of " + std::to_string(sizeof(Row)) +
                                "-byte rows");
  std::vector<Row> rows(static_cast<std::size_t>(info.shape[0]));
  if (!rows.empty()) std::memcpy(rows.data(), info.ptr, rows.size() * sizeof(Row));
  return rows;
}

// The engine and the Python objects whose memory it writes to.
struct BoundEngine {
  std::vector<py::buffer_info> memory;
  std::unique_ptr<io::Engine> engine;
};

std::unique_ptr<BoundEngine> make_engine(const py::buffer& spans, const py::buffer& terms, std::size_t tensors,
                                         const std::vector<py::bytes>& inputs, const py::list& outputs, int threads,
                                         std::size_t slot_bytes, const std::optional<std::string>& isa) {
  auto bound = std::make_unique<BoundEngine>();
  std::vector<io::Target> targets;
  std::vector<std::int64_t> sizes;
  for (const py::handle output : outputs) {
    io::Target target;
    if (py::isinstance<py::bytes>(output)) {  // a path, as os.fsencode gives it
      target.file = io::File::open_for_writing(std::string(py::reinterpret_borrow<py::bytes>(output)));
      sizes.push_back(target.file.size());
    } else {
      bound->memory.push_back(py::cast<py::buffer>(output).request(/*writable=*/true));
      const py::buffer_info& info = bound->memory.back();
      if (info.ndim != 1 || info.itemsize != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
        throw std::invalid_argument("output memory must be contiguous bytes");
      target.memory = static_cast<std::byte*>(info.ptr);
      sizes.push_back(info.shape[0]);
    }
    targets.push_back(std::move(target));
  }
  io::Options options;
  options.threads = threads;
  options.slot_bytes = slot_bytes;
  options.isa = isa_of(isa);
  bound->engine = std::make_unique<io::Engine>(
      io::Work{rows_of<io::Span>(spans, "spans"), rows_of<io::TermRef>(terms, "terms"), tensors},
      std::vector<std::string>(inputs.begin(), inputs.end()), std::move(targets), sizes, options);
  return bound;
}

py::list counts_of(const std::vector<Counts>& counts) {
  py::list rows;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const Counts& c = counts[i];
    if (c.nan + c.inf + c.overflow) rows.append(py::make_tuple(i, c.nan, c.inf, c.overflow));
  }
  return rows;
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const StorageError& e) {
    const py::object type = py::module_::import("paramdelta.errors").attr("StorageError");
    py::object value = type(e.what());
    value.attr("errno") = e.code() ? py::object(py::int_(e.code())) : py::object(py::none());
    PyErr_SetObject(type.ptr(), value.ptr());
  }
}

}  // namespace

void bind_engine(py::module_& module) {
  py::register_local_exception_translator(&translate);
  module.attr("SPAN_BYTES") = sizeof(io::Span);
  module.attr("TERM_BYTES") = sizeof(io::TermRef);
  py::class_<BoundEngine>(module, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("spans"), py::arg("terms"), py::arg("tensors"),
           py::arg("inputs"), py::arg("outputs"), py::arg("threads"), py::arg("slot_bytes"), py::arg("isa"))
      .def("start", [](BoundEngine& self) { self.engine->start(); })
      .def("stop", [](BoundEngine& self) { self.engine->stop(); })
      .def(
          "wait_for", [](BoundEngine& self, double seconds) { return self.engine->wait_for(seconds); },
          py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("progress",
           [](const BoundEngine& self) {
             const io::Progress progress = self.engine->progress();
             return py::make_tuple(progress.bytes_read, progress.bytes_written);
           })
      .def("finish", [](BoundEngine& self) {
        const std::vector<Counts>* counts = nullptr;
        {
          py::gil_scoped_release release;
          counts = &self.engine->finish();
        }
        return counts_of(*counts);
      });
}

}  // namespace paramdelta

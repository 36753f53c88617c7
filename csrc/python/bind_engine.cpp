// Binds the streaming engine. Columns arrive as buffers and are copied once; output memory stays the caller's and is
// kept alive by the engine object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <tuple>

#include "core/error.hpp"
#include "io/engine.hpp"
#include "io/storage.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

// Rows that are followed by `more` numbers each, which go to `numbers`.
template <class Row>
std::vector<Row> rows_of(const py::buffer& buffer, const char* what, std::size_t more, std::vector<double>& numbers) {
  const py::buffer_info info = buffer.request();
  const std::size_t pitch = sizeof(Row) + more * sizeof(double);
  if (info.ndim != 1 || info.itemsize != static_cast<py::ssize_t>(pitch) || info.strides[0] != info.itemsize)
    throw std::invalid_argument(std::string(what) + ": expected a contiguous column of " + std::to_string(pitch) +
                                "-byte rows");
  std::vector<Row> rows(static_cast<std::size_t>(info.shape[0]));
  numbers.resize(rows.size() * more);
  const auto* from = static_cast<const std::byte*>(info.ptr);
  if (more == 0 && !rows.empty()) std::memcpy(rows.data(), from, rows.size() * sizeof(Row));
  for (std::size_t i = 0; more != 0 && i < rows.size(); ++i) {
    std::memcpy(&rows[i], from + i * pitch, sizeof(Row));
    std::memcpy(&numbers[i * more], from + i * pitch + sizeof(Row), more * sizeof(double));
  }
  return rows;
}

template <class Row>
std::vector<Row> rows_of(const py::buffer& buffer, const char* what) {
  std::vector<double> none;
  return rows_of<Row>(buffer, what, 0, none);
}

// The engine and the Python objects whose memory it reads from or writes to.
struct BoundEngine {
  std::vector<py::buffer_info> memory;
  std::unique_ptr<io::Engine> engine;

  BoundEngine() = default;
  // Workers may be waiting for the interpreter, in a stage that is written in Python.
  ~BoundEngine() {
    const py::gil_scoped_release unlocked;
    engine.reset();
  }
  BoundEngine(const BoundEngine&) = delete;
  BoundEngine& operator=(const BoundEngine&) = delete;

  const py::buffer_info& bytes_of(const py::handle object, bool writable) {
    memory.push_back(py::cast<py::buffer>(object).request(writable));
    const py::buffer_info& info = memory.back();
    if (info.ndim != 1 || info.itemsize != 1 || (info.shape[0] > 1 && info.strides[0] != 1))
      throw std::invalid_argument("memory of inputs and outputs must be contiguous bytes");
    return info;
  }
};

// (path as os.fsencode gives it, how to reach it: "cached", "passing" or "direct")
std::pair<std::string, io::Access> file_of(const py::handle object) {
  const auto [path, access] = py::cast<std::pair<py::bytes, std::string>>(object);
  if (access != "cached" && access != "passing" && access != "direct")
    throw std::invalid_argument("access: expected cached, passing or direct, got " + access);
  return {std::string(path), access == "cached"    ? io::Access::cached
                             : access == "passing" ? io::Access::passing
                                                   : io::Access::direct};
}

// Memory of a device: [address, bytes].
std::pair<std::byte*, std::int64_t> device_memory_of(const py::handle object) {
  const auto at = py::cast<std::vector<std::int64_t>>(object);
  if (at.size() != 2) throw std::invalid_argument("memory of a device: expected its address and its bytes");
  return {reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(at[0])), at[1]};
}

std::vector<io::Input> inputs_of(const py::list& list, BoundEngine& bound) {
  std::vector<io::Input> inputs;
  for (const py::handle object : list) {
    io::Input input;
    if (py::isinstance<py::tuple>(object)) {
      const auto [path, access] = file_of(object);
      input.file = io::File::open_for_reading(path, access);
    } else if (py::isinstance<py::list>(object)) {
      std::tie(input.memory, input.bytes) = device_memory_of(object);
      input.on_device = true;
    } else {
      const py::buffer_info& info = bound.bytes_of(object, false);
      input.memory = static_cast<const std::byte*>(info.ptr);
      input.bytes = info.shape[0];
    }
    inputs.push_back(std::move(input));
  }
  return inputs;
}

std::vector<io::Target> targets_of(const py::list& list, BoundEngine& bound, std::vector<std::int64_t>& sizes) {
  std::vector<io::Target> targets;
  for (const py::handle object : list) {
    io::Target target;
    if (py::isinstance<py::tuple>(object)) {
      const auto [path, access] = file_of(object);
      target.file = io::File::open_for_writing(path, access);
      sizes.push_back(target.file.size());
    } else if (py::isinstance<py::list>(object)) {
      const auto [memory, bytes] = device_memory_of(object);
      target.memory = memory;
      target.on_device = true;
      sizes.push_back(bytes);
    } else if (py::isinstance<py::int_>(object)) {  // nowhere, a file of this size
      target.nowhere = true;
      sizes.push_back(py::cast<std::int64_t>(object));
    } else {
      const py::buffer_info& info = bound.bytes_of(object, true);
      target.memory = static_cast<std::byte*>(info.ptr);
      sizes.push_back(info.shape[0]);
    }
    targets.push_back(std::move(target));
  }
  return targets;
}

std::unique_ptr<BoundEngine> make_engine(const py::dict& columns, std::size_t tensors, std::size_t units,
                                         std::size_t variants, std::int32_t own_input, const py::list& inputs,
                                         const py::list& outputs, int threads, std::size_t slot_bytes,
                                         const std::optional<std::string>& isa, const py::object& stage) {
  auto bound = std::make_unique<BoundEngine>();
  std::vector<std::int64_t> sizes;
  std::vector<io::Input> sources = inputs_of(inputs, *bound);
  std::vector<io::Target> targets = targets_of(outputs, *bound, sizes);
  const auto column = [&](const char* name) { return py::cast<py::buffer>(columns[name]); };
  if (variants < 1 || variants > 1u << 16) throw std::invalid_argument("variants: expected at least one");
  const std::size_t more = variants - 1;  // alphas behind the first of each term
  io::Work work;
  work.variants = variants;
  work.own_input = own_input;
  work.spans = rows_of<io::Span>(column("spans"), "spans");
  work.terms = rows_of<io::TermRef>(column("terms"), "terms", more, work.term_alphas);
  work.tensors = tensors;
  work.regions = rows_of<io::Region>(column("regions"), "regions");
  work.region_terms = rows_of<io::RegionTerm>(column("region_terms"), "region_terms", more, work.region_alphas);
  work.views = rows_of<io::View>(column("views"), "views");
  work.recipes = rows_of<io::RecipeRow>(column("recipes"), "recipes");
  work.extents = rows_of<io::Extent>(column("extents"), "extents");
  work.units = units;
  io::Options options;
  options.threads = threads;
  options.slot_bytes = slot_bytes;
  options.isa = isa_of(isa);
  options.stage = stage_of(stage, options.isa);
  bound->engine = std::make_unique<io::Engine>(std::move(work), std::move(sources), std::move(targets), sizes, options);
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

py::list losses_of(const std::vector<io::Loss>& losses) {
  py::list rows;
  for (std::size_t i = 0; i < losses.size(); ++i)
    if (losses[i].value_squared > 0.0 || losses[i].error_squared > 0.0)
      rows.append(py::make_tuple(i, losses[i].error_squared, losses[i].value_squared));
  return rows;
}

py::list measured_of(const std::vector<io::Measured>& measured) {
  py::list rows;
  for (const io::Measured& unit : measured) rows.append(py::make_tuple(unit.amax, unit.touched));
  return rows;
}

// Contributions to the checksums of tensors that are not 0, which contributes nothing.
py::list checksums_of(const std::vector<std::pair<std::int32_t, std::uint32_t>>& checksums) {
  py::list rows;
  for (const auto& [tensor, sum] : checksums)
    if (sum) rows.append(py::make_tuple(tensor, sum));
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
  } catch (const StageError& e) {
    PyErr_SetString(py::module_::import("paramdelta.errors").attr("DeviceError").ptr(), e.what());
  }
}

}  // namespace

void bind_engine(py::module_& module) {
  py::register_local_exception_translator(&translate);
  py::dict row_bytes;
  row_bytes["spans"] = sizeof(io::Span);
  row_bytes["terms"] = sizeof(io::TermRef);
  row_bytes["regions"] = sizeof(io::Region);
  row_bytes["region_terms"] = sizeof(io::RegionTerm);
  row_bytes["views"] = sizeof(io::View);
  row_bytes["recipes"] = sizeof(io::RecipeRow);
  row_bytes["extents"] = sizeof(io::Extent);
  module.attr("ROW_BYTES") = row_bytes;
  module.def("direct_alignment", [](const py::bytes& path) { return io::direct_alignment(path); }, py::arg("path"));
  module.def("in_memory", [](const py::bytes& path) { return io::in_memory(path); }, py::arg("path"));
  module.def(
      "reserve", [](const py::bytes& path, std::int64_t bytes) { return io::reserve(path, bytes); }, py::arg("path"),
      py::arg("bytes"));
  module.def(
      "cached_bytes",
      [](const py::bytes& path, const std::string& how) {
        if (how == "cachestat") return io::cached_bytes_by_cachestat(path);
        return how == "mincore" ? io::cached_bytes_by_mincore(path) : io::cached_bytes(path);
      },
      py::arg("path"), py::arg("how") = "");
  py::class_<BoundEngine>(module, "Engine")
      .def(py::init(&make_engine), py::kw_only(), py::arg("columns"), py::arg("tensors"), py::arg("units"),
           py::arg("variants") = 1, py::arg("own_input") = -1, py::arg("inputs"), py::arg("outputs"),
           py::arg("threads"), py::arg("slot_bytes"), py::arg("isa"), py::arg("stage") = py::none())
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
        const io::Results* results = nullptr;
        {
          py::gil_scoped_release release;
          results = &self.engine->finish();
        }
        return py::make_tuple(counts_of(results->counts), losses_of(results->losses), measured_of(results->measured),
                              checksums_of(results->checksums));
      });
}

}  // namespace paramdelta

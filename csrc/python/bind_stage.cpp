// Stages of the engine from Python: the table of another extension module, in a capsule; or an object whose merge() is
// called for every load, with views of the slot's memory.
#include <pybind11/pybind11.h>

#include <memory>

#include "io/stage.hpp"
#include "python/bind.hpp"

namespace py = pybind11;

namespace paramdelta {
namespace {

py::object bytes_at(const void* data, std::size_t bytes) {
  if (data == nullptr) return py::none();
  return py::memoryview::from_memory(data, static_cast<py::ssize_t>(bytes));
}

py::tuple operand_of(const Operand& operand, std::size_t count) {
  return py::make_tuple(static_cast<int>(operand.dtype), bytes_at(operand.data, count * size_of(operand.dtype)));
}

// (output tensor, elements, (dtype, out), (dtype, new_base), [((dtype, post), (dtype, base), alpha), …])
py::tuple job_of(const Merge& job, std::int32_t tensor) {
  py::list terms;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    terms.append(py::make_tuple(operand_of(job.terms[t].post, job.count), operand_of(job.terms[t].base, job.count),
                                job.terms[t].alpha));
  const py::object out =
      py::memoryview::from_memory(job.out, static_cast<py::ssize_t>(job.count * size_of(job.out_dtype)));
  return py::make_tuple(tensor, job.count, py::make_tuple(static_cast<int>(job.out_dtype), out),
                        operand_of(job.new_base, job.count), terms);
}

// Quantised matrices are left to the processor.
class PythonStage : public io::Stage {
 public:
  PythonStage(py::object object, cpu::Isa isa) : object_(std::move(object)), processor_(isa) {}
  ~PythonStage() override {
    const py::gil_scoped_acquire locked;
    object_ = py::object();
  }
  PythonStage(const PythonStage&) = delete;
  PythonStage& operator=(const PythonStage&) = delete;

  void attach(std::byte* slab, int workers, std::size_t slot_bytes) override {
    const py::gil_scoped_acquire locked;
    const auto bytes = static_cast<py::ssize_t>(slot_bytes * static_cast<std::size_t>(workers));
    if (py::hasattr(object_, "attach"))
      object_.attr("attach")(py::memoryview::from_memory(static_cast<void*>(slab), bytes), workers);
  }

  void detach() noexcept override {
    const py::gil_scoped_acquire locked;
    try {
      if (py::hasattr(object_, "detach")) object_.attr("detach")();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("paramdelta: detach() of a stage");
    }
  }

  void merge(int worker, const StageBatch& batch, Counts* counts) override {
    const py::gil_scoped_acquire locked;
    py::list jobs;
    for (std::size_t i = 0; i < batch.n_jobs; ++i) jobs.append(job_of(batch.jobs[i], batch.tensors[i]));
    const py::object result = object_.attr("merge")(worker, jobs);
    if (result.is_none()) return;
    std::size_t i = 0;
    for (const py::handle row : result) {
      if (i == batch.n_jobs) throw py::value_error("a stage returned more counts than there were jobs");
      const auto [nan, inf, overflow] = py::cast<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>>(row);
      counts[i++] = {nan, inf, overflow};
    }
    if (i != batch.n_jobs) throw py::value_error("a stage returned fewer counts than there were jobs");
  }

  ScaledResult merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) override {
    return processor_.merge_scaled(worker, frame, job, measure);
  }

 private:
  py::object object_;
  io::Processor processor_;
};

// A table, and the capsule that keeps what is behind it alive.
class CapsuleStage : public io::Device {
 public:
  CapsuleStage(const py::capsule& capsule, cpu::Isa isa)
      : io::Device(*capsule.get_pointer<StageTable>(), isa), capsule_(capsule) {}
  ~CapsuleStage() override {
    const py::gil_scoped_acquire locked;
    capsule_ = py::object();
  }
  CapsuleStage(const CapsuleStage&) = delete;
  CapsuleStage& operator=(const CapsuleStage&) = delete;

 private:
  py::object capsule_;
};

}  // namespace

std::shared_ptr<io::Stage> stage_of(const py::object& object, cpu::Isa isa) {
  if (object.is_none()) return nullptr;
  if (PyCapsule_IsValid(object.ptr(), StageTable::kCapsule))
    return std::make_shared<CapsuleStage>(py::reinterpret_borrow<py::capsule>(object), isa);
  if (!py::hasattr(object, "merge")) throw py::type_error("a stage is a capsule, or an object with merge()");
  return std::make_shared<PythonStage>(object, isa);
}

}  // namespace paramdelta

// A worker never hands its slot over: in a prototype, pools joined by queues took 0.82 s where such workers took 0.50
// s. Depth comes from more workers.
#include "io/engine.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <new>
#include <stdexcept>

#include "io/guard.hpp"

namespace paramdelta::io {
namespace {

// With these, no sum or product of sizes within a slot can overflow.
constexpr int kMostThreads = 1 << 16;
constexpr std::size_t kLargestSlot = std::size_t{1} << 40;

// Where the tensors of all variants lie.
std::vector<Extent> of_variants(const Work& work, std::size_t outputs) {
  std::vector<Extent> extents;
  extents.reserve(work.extents.size() * work.variants);
  for (std::size_t v = 0; v < work.variants; ++v)
    for (Extent extent : work.extents) {
      extent.file = work.output_for(extent.file, v, outputs);
      extent.tensor += static_cast<std::int32_t>(v * work.tensors);
      extents.push_back(extent);
    }
  return extents;
}

std::byte* map_slab(std::size_t bytes) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(memory);
}

}  // namespace

void Engine::Unmapper::operator()(std::byte* memory) const {
  allow(memory, bytes);
  ::munmap(memory, bytes);
}

Engine::Engine(Work work, std::vector<Input> inputs, std::vector<Target> outputs,
               const std::vector<std::int64_t>& output_sizes, Options options)
    : work_(std::move(work)),
      inputs_(std::move(inputs)),
      outputs_(std::move(outputs)),
      options_(options),
      stage_(options.stage ? options.stage : std::make_shared<Processor>(options.isa)),
      own_slab_(nullptr, Unmapper{options.slot_bytes * static_cast<std::size_t>(options.threads)}) {
  if (options_.threads < 1) throw std::invalid_argument("at least one thread is needed");
  if (options_.threads > kMostThreads || options_.slot_bytes > kLargestSlot)
    throw std::invalid_argument("more threads, or larger slots, than any machine has");
  std::vector<std::int64_t> input_sizes;
  for (const Input& input : inputs_) {
    input_sizes.push_back(input.size());
    work_.alignment = std::max(work_.alignment, input.alignment());
  }
  for (const Target& output : outputs_) work_.alignment = std::max(work_.alignment, output.alignment());
  work_.validate(input_sizes, output_sizes);
  for (const Target& output : outputs_)
    if (output.memory && work_.variants > 1) throw std::invalid_argument("variants write to files only");
  const auto on_device = [](const auto& place) { return place.on_device; };
  if (!stage_->has_memory() && (std::any_of(inputs_.begin(), inputs_.end(), on_device) ||
                                std::any_of(outputs_.begin(), outputs_.end(), on_device)))
    throw std::invalid_argument("inputs and outputs in the memory of a device need a stage that computes there");
  for (const Target& output : outputs_)
    if (output.on_device && !work_.extents.empty())
      throw std::invalid_argument("what is written to the memory of a device cannot be summed");
  const std::size_t tensors = work_.tensors * work_.variants;
  checksums_.emplace(of_variants(work_, outputs_.size()), tensors, output_sizes, options_.isa);
  results_.counts.resize(tensors);
  results_.losses.resize(work_.regions.empty() ? 0 : tensors);
  results_.measured.resize(work_.units * work_.variants);
  const std::size_t capacity = Slot::capacity(work_, options_.slot_bytes);
  if (capacity < 4096 * static_cast<std::size_t>(work_.max_operands()))
    throw std::invalid_argument("slots of " + std::to_string(options_.slot_bytes) + " bytes are too small");
  cursor_.emplace(work_, capacity, options_.slot_bytes);
  slab_ = stage_->memory(options_.threads, options_.slot_bytes);
  if (slab_ == nullptr) own_slab_.reset(slab_ = map_slab(own_slab_.get_deleter().bytes));
  stage_->attach(slab_, options_.threads, options_.slot_bytes);
  attached_ = true;
}

Engine::~Engine() {
  stop();
  join();
}

void Engine::join() noexcept {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  if (attached_) stage_->detach();
  attached_ = false;
}

void Engine::start() {
  if (!threads_.empty()) throw std::invalid_argument("an engine runs once");
  const std::lock_guard<std::mutex> lock(mutex_);
  for (int i = 0; i < options_.threads; ++i) {
    threads_.emplace_back(&Engine::run, this, i);
    ++running_;
  }
}

void Engine::run(int worker) {
  try {
    std::byte* memory = slab_ + static_cast<std::size_t>(worker) * options_.slot_bytes;
    Slot slot(work_, memory, options_.slot_bytes, stage_->reaches_memory());
    Rectangle rectangle(work_, memory, options_.slot_bytes);
    work_through(worker, slot, rectangle);
  } catch (...) {
    stopping_ = true;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  --running_;
  done_.notify_all();
}

void Engine::work_through(int worker, Slot& slot, Rectangle& rectangle) {
  Load load;
  while (!stopping_.load(std::memory_order_relaxed) && cursor_->next(load)) {
    if (load.parts.empty()) {
      carry(worker, rectangle, load.piece);
    } else {
      slot.parts().swap(load.parts);
      carry(worker, slot);
    }
  }
}

void Engine::carry(int worker, Slot& slot) {
  bytes_read_ += static_cast<std::int64_t>(slot.fill(inputs_, outputs_));
  const auto write = [&](std::byte* to, const std::byte* from, std::size_t bytes) {
    stage_->write(worker, to, from, bytes);
  };
  for (std::size_t v = 0; v < work_.variants; ++v) {
    const StageBatch batch = slot.batch(v);
    if (batch.n_jobs > 0) {
      std::vector<Counts> counts(batch.n_jobs);
      stage_->merge(worker, batch, counts.data());
      note(batch, v, counts);
    }
    slot.copy(inputs_, v, write);
    bytes_written_ += static_cast<std::int64_t>(slot.drain(outputs_, *checksums_, v));
  }
}

void Engine::carry(int worker, Rectangle& rectangle, const Piece& piece) {
  bytes_read_ += static_cast<std::int64_t>(rectangle.fill(piece, inputs_, outputs_, *stage_));
  const Region& region = rectangle.region();
  for (std::size_t v = 0; v < work_.variants; ++v) {
    bytes_read_ += static_cast<std::int64_t>(rectangle.turn_to(v, inputs_));
    const ScaledResult result = stage_->merge_scaled(worker, rectangle.frame(v), rectangle.job(), region.measure != 0);
    const auto write = [&](std::byte* to, const std::byte* from, std::size_t bytes) {
      stage_->write(worker, to, from, bytes);
    };
    bytes_written_ += static_cast<std::int64_t>(rectangle.drain(outputs_, *checksums_, write));
    note(region, v, result);
  }
}

void Engine::note(const StageBatch& batch, std::size_t variant, const std::vector<Counts>& counts) {
  for (std::size_t i = 0; i < batch.n_jobs; ++i) {
    if (counts[i].nan + counts[i].inf + counts[i].overflow == 0) continue;
    const std::lock_guard<std::mutex> lock(mutex_);
    results_.counts[variant * work_.tensors + static_cast<std::size_t>(batch.tensors[i])] += counts[i];
  }
}

void Engine::note(const Region& region, std::size_t variant, const ScaledResult& result) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (region.measure) {
    Measured& unit = results_.measured[variant * work_.units + static_cast<std::size_t>(region.unit)];
    unit.amax = std::max(unit.amax, result.amax);
    unit.touched = unit.touched || result.touched;
    return;
  }
  const std::size_t tensor = variant * work_.tensors + static_cast<std::size_t>(region.tensor);
  results_.counts[tensor] += result.counts;
  results_.losses[tensor].error_squared += result.error_squared;
  results_.losses[tensor].value_squared += result.value_squared;
}

bool Engine::wait_for(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  return done_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return running_ == 0; });
}

void Engine::stop() { stopping_ = true; }

Progress Engine::progress() const { return {bytes_read_.load(), bytes_written_.load()}; }

const Results& Engine::finish() {
  join();
  if (error_) std::rethrow_exception(error_);
  for (Target& output : outputs_) output.file.close();
  results_.checksums.clear();
  for (std::size_t i = 0; i < checksums_->extents().size(); ++i)
    results_.checksums.emplace_back(checksums_->extents()[i].tensor, checksums_->sum(i));
  return results_;
}

}  // namespace paramdelta::io

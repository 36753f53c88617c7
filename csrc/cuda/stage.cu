#include <sys/mman.h>

#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <stdexcept>
#include <tuple>

#include "core/codec.hpp"
#include "cuda/stage.hpp"

namespace paramdelta::cuda {
namespace {

// Jobs of one signature can be merged by one launch.
using Key = std::tuple<int, int, std::vector<std::tuple<int, int, double>>>;

Key key_of(const Merge& job) {
  std::vector<std::tuple<int, int, double>> terms;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    terms.emplace_back(static_cast<int>(job.terms[t].post.dtype), static_cast<int>(job.terms[t].base.dtype),
                       job.terms[t].alpha);
  return {static_cast<int>(job.new_base.dtype), static_cast<int>(job.out_dtype), std::move(terms)};
}

Signature signature_of(const Merge& job) {
  Signature signature{job.new_base.dtype, job.out_dtype, {}};
  for (std::size_t t = 0; t < job.n_terms; ++t)
    signature.terms.push_back({job.terms[t].post.dtype, job.terms[t].base.dtype, job.terms[t].alpha});
  return signature;
}

std::size_t out_bytes(const Merge& job) { return job.count * size_of(job.out_dtype); }

// Of the scales of a job's output, as they lie behind each other.
std::size_t scale_bytes(const ScaledMerge& job) {
  const std::size_t rows = job.grid_rows == 0 ? 1 : (job.rows + job.grid_rows - 1) / job.grid_rows;
  return rows * static_cast<std::size_t>(job.out_scale_pitch) * size_of(job.recipe.scale_dtype);
}

constexpr std::size_t kLine = 256;

// Runs a member of the stage; what it throws becomes the worker's error.
template <class Function>
int guarded(void* self, int worker, Function&& function) {
  auto& stage = *static_cast<PinnedStage*>(self);
  try {
    function(stage);
    return 0;
  } catch (const std::exception& error) {
    stage.set_error(worker, error.what());
    return 1;
  }
}

}  // namespace

// Operands lie in the lane as they lie in the slot. Outputs of a slot do so too; those in memory of the caller's are
// made behind the operands, where the slot has room that it does not need for them. What lies elsewhere is memory of
// the device, and is where it is wanted.
struct PinnedStage::Mapping {
  const std::byte* slot;
  std::byte* lane;
  std::size_t slot_bytes;
  const std::byte* out;
  std::size_t out_bytes;
  std::byte* out_in_lane;

  Mapping(const Lane& of, std::size_t bytes, const StageBatch& batch)
      : slot(of.slot),
        lane(of.memory.data()),
        slot_bytes(bytes),
        out(static_cast<const std::byte*>(batch.out)),
        out_bytes(batch.out_bytes) {
    if (batch.out_on_device) {
      out_in_lane = static_cast<std::byte*>(batch.out);
      return;
    }
    if (in_slot(out)) {
      out_in_lane = lane + (out - slot);
      return;
    }
    const auto* begin = static_cast<const std::byte*>(batch.frame.operands);
    const std::size_t end = static_cast<std::size_t>(begin - slot) + batch.frame.operand_bytes;
    const std::size_t at = (end + kLine - 1) / kLine * kLine;
    if (at + batch.out_bytes > of.memory.bytes())
      throw std::logic_error("a load outgrew the device memory of its slot");
    out_in_lane = lane + at;
  }

  bool in_slot(const void* host) const {
    const auto* at = static_cast<const std::byte*>(host);
    return at >= slot && at < slot + slot_bytes;
  }

  std::uintptr_t address(const void* host) const {
    const auto* at = static_cast<const std::byte*>(host);
    if (in_slot(at))
      at = lane + (at - slot);
    else if (at >= out && at < out + out_bytes)
      at = out_in_lane + (at - out);
    return reinterpret_cast<std::uintptr_t>(at);
  }
};

void PinnedStage::Lane::make_room(int device, std::size_t jobs) {
  if (jobs <= counted.size()) return;
  counted_pinned = PinnedMemory();
  counted.assign(2 * jobs, Counts{});
  counted_pinned = PinnedMemory(device, counted.data(), counted.size() * sizeof(Counts));
  counts = DeviceMemory(device, counted.size() * sizeof(Counts));
}

void PinnedStage::Unmapper::operator()(std::byte* memory) const { ::munmap(memory, bytes); }

PinnedStage::PinnedStage(int device) : device_(device), slab_(nullptr, Unmapper{0}) {}

std::byte* PinnedStage::memory(int workers, std::size_t slot_bytes) {
  if (in_use_) throw std::logic_error("this stage serves another engine");
  if (slab_ && workers_ == workers && slot_bytes_ == slot_bytes) return slab_.get();
  lanes_.clear();
  pinned_ = PinnedMemory();
  const std::size_t bytes = slot_bytes * static_cast<std::size_t>(workers);
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  slab_.reset();
  std::unique_ptr<std::byte, Unmapper> slab(static_cast<std::byte*>(memory), Unmapper{bytes});
  pinned_ = PinnedMemory(device_, memory, bytes);
  slab_ = std::move(slab);
  workers_ = workers;
  slot_bytes_ = slot_bytes;
  return slab_.get();
}

void PinnedStage::attach(std::byte* slab, int workers, std::size_t slot_bytes) {
  std::vector<Lane> lanes;
  for (int i = 0; lanes_.empty() && i < workers; ++i) {
    Lane lane;
    lane.slot = slab + static_cast<std::size_t>(i) * slot_bytes;
    lane.memory = DeviceMemory(device_, slot_bytes + 2 * kLine);
    lane.queue = Queue(device_);
    lanes.push_back(std::move(lane));
  }
  if (lanes_.empty()) lanes_ = std::move(lanes);
  in_use_ = true;
}

void PinnedStage::detach() noexcept {
  if (failed_) lanes_.clear();  // copies may be under way still, into slots that the next run will fill
  failed_ = false;
  in_use_ = false;
}

void PinnedStage::merge(int worker, const StageBatch& batch, Counts* counts) {
  Lane& lane = lanes_.at(static_cast<std::size_t>(worker));
  const Mapping map(lane, slot_bytes_, batch);
  const std::size_t counts_bytes = batch.n_jobs * sizeof(Counts);
  lane.make_room(device_, batch.n_jobs);
  if (batch.frame.operand_bytes > 0 && !batch.frame.unchanged)
    lane.queue.copy(reinterpret_cast<void*>(map.address(batch.frame.operands)), batch.frame.operands,
                    batch.frame.operand_bytes);
  lane.queue.clear(lane.counts.data(), counts_bytes);

  std::map<Key, std::pair<Signature, std::vector<TensorAddresses>>> groups;
  for (std::size_t i = 0; i < batch.n_jobs; ++i) {
    const Merge& job = batch.jobs[i];
    auto& group = groups.try_emplace(key_of(job), signature_of(job), std::vector<TensorAddresses>{}).first->second;
    TensorAddresses tensor{map.address(job.new_base.data),
                           {},
                           map.address(job.out),
                           job.count,
                           reinterpret_cast<std::uintptr_t>(lane.counts.data() + i * sizeof(Counts))};
    for (std::size_t t = 0; t < job.n_terms; ++t) {
      tensor.pairs.push_back(map.address(job.terms[t].post.data));
      tensor.pairs.push_back(map.address(job.terms[t].base.data));
    }
    group.second.push_back(std::move(tensor));
  }
  for (const auto& [key, group] : groups) cuda::merge(group.first, group.second, device_, lane.queue.stream());

  // Outputs that follow each other come back in one copy; what lies between others is not theirs.
  for (std::size_t i = batch.out_on_device ? batch.n_jobs : 0; i < batch.n_jobs;) {
    auto* const begin = static_cast<std::byte*>(batch.jobs[i].out);
    std::byte* end = begin;
    for (; i < batch.n_jobs && batch.jobs[i].out == end; ++i) end += out_bytes(batch.jobs[i]);
    if (end != begin)
      lane.queue.copy(begin, reinterpret_cast<const void*>(map.address(begin)), static_cast<std::size_t>(end - begin));
  }
  lane.queue.copy(lane.counted.data(), lane.counts.data(), counts_bytes);
  lane.queue.finish();
  for (std::size_t i = 0; i < batch.n_jobs; ++i) counts[i] = lane.counted[i];
}

ScaledResult PinnedStage::merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) {
  Lane& lane = lanes_.at(static_cast<std::size_t>(worker));
  StageBatch all;
  all.frame = frame;
  all.out = job.out;
  const Mapping map(lane, slot_bytes_, all);
  const auto on_device = [&](const void* host) { return reinterpret_cast<void*>(map.address(host)); };
  const auto move = [&](Matrix& matrix) {
    matrix.data = on_device(matrix.data);
    matrix.scales.data = on_device(matrix.scales.data);
    matrix.scales.zero_points = on_device(matrix.scales.zero_points);
  };
  ScaledMerge moved = job;
  std::vector<MatrixTerm> terms(job.terms, job.terms + job.n_terms);
  move(moved.new_base);
  for (MatrixTerm& term : terms) {
    move(term.post);
    move(term.base);
  }
  moved.terms = terms.data();
  moved.out = on_device(job.out);
  moved.out_scales = on_device(job.out_scales);
  const ScaledEffect effect = measure ? ScaledEffect::measure : ScaledEffect::write;

  static_assert(sizeof(ScaledTotals) % sizeof(Counts) == 0, "totals lie where counts lie else");
  lane.make_room(device_, sizeof(ScaledTotals) / sizeof(Counts));
  const std::size_t workspace = workspace_bytes(moved, effect);
  if (lane.workspace.bytes() < workspace) lane.workspace = DeviceMemory(device_, workspace);
  if (frame.operand_bytes > 0 && !frame.unchanged)
    lane.queue.copy(on_device(frame.operands), frame.operands, frame.operand_bytes);
  auto* const totals = reinterpret_cast<ScaledTotals*>(lane.counts.data());
  lane.queue.clear(totals, sizeof(ScaledTotals));
  cuda::merge_scaled(moved, effect, totals, lane.workspace.data(), device_, lane.queue.stream());
  if (!measure) {
    if (map.in_slot(job.out)) lane.queue.copy(job.out, moved.out, job.rows * static_cast<std::size_t>(job.out_pitch));
    if (job.quantised && !job.given && map.in_slot(job.out_scales))
      lane.queue.copy(job.out_scales, moved.out_scales, scale_bytes(job));
  }
  lane.queue.copy(lane.counted.data(), totals, sizeof(ScaledTotals));
  lane.queue.finish();

  ScaledTotals found;
  std::memcpy(&found, lane.counted.data(), sizeof(found));
  ScaledResult result;
  result.counts = {found.nan, found.inf, found.overflow};
  result.touched = found.touched != 0;
  result.amax = bits_as<float>(found.amax);
  result.error_squared = found.error_squared;
  result.value_squared = found.value_squared;
  return result;
}

void PinnedStage::write(int worker, void* to, const void* from, std::size_t bytes) {
  const Queue& queue = lanes_.at(static_cast<std::size_t>(worker)).queue;
  queue.copy(to, from, bytes);
  queue.finish();
}

const std::string& PinnedStage::error_of(int worker) const {
  return worker < 0 ? error_ : lanes_.at(static_cast<std::size_t>(worker)).error;
}

void PinnedStage::set_error(int worker, std::string text) {
  if (worker >= 0) failed_ = true;
  (worker < 0 ? error_ : lanes_.at(static_cast<std::size_t>(worker)).error) = std::move(text);
}

StageTable PinnedStage::table() {
  StageTable table;
  table.self = this;
  table.memory = [](void* self, int workers, std::size_t slot_bytes, void** slab) {
    return guarded(self, -1, [&](PinnedStage& s) { *slab = s.memory(workers, slot_bytes); });
  };
  table.attach = [](void* self, void* slab, int workers, std::size_t slot_bytes) {
    return guarded(self, -1, [&](PinnedStage& s) { s.attach(static_cast<std::byte*>(slab), workers, slot_bytes); });
  };
  table.detach = [](void* self) { static_cast<PinnedStage*>(self)->detach(); };
  table.merge = [](void* self, int worker, const StageBatch* batch, Counts* counts) {
    return guarded(self, worker, [&](PinnedStage& s) { s.merge(worker, *batch, counts); });
  };
  table.takes = [](void*, const ScaledMerge* job) { return job->n_terms <= most_scaled_terms(); };
  table.merge_scaled = [](void* self, int worker, const StageFrame* frame, const ScaledMerge* job, bool measure,
                          ScaledResult* result) {
    return guarded(self, worker, [&](PinnedStage& s) { *result = s.merge_scaled(worker, *frame, *job, measure); });
  };
  table.write = [](void* self, int worker, void* to, const void* from, std::size_t bytes) {
    return guarded(self, worker, [&](PinnedStage& s) { s.write(worker, to, from, bytes); });
  };
  table.error = [](void* self, int worker) { return static_cast<PinnedStage*>(self)->error_of(worker).c_str(); };
  return table;
}

}  // namespace paramdelta::cuda

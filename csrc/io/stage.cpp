#include "io/stage.hpp"

#include <stdexcept>
#include <string>

#include "core/error.hpp"
#include "cpu/scaled.hpp"

namespace paramdelta::io {

void Stage::write(int /*worker*/, std::byte* /*to*/, const std::byte* /*from*/, std::size_t /*bytes*/) {
  throw std::invalid_argument("outputs in the memory of a device need a stage that computes there");
}

void Processor::merge(int /*worker*/, const StageBatch& batch, Counts* counts) {
  for (std::size_t i = 0; i < batch.n_jobs; ++i) counts[i] = cpu::merge(isa_, batch.jobs[i], cpu::Store::cached);
}

ScaledResult Processor::merge_scaled(int /*worker*/, const StageFrame& /*frame*/, const ScaledMerge& job,
                                     bool measure) {
  return measure ? cpu::measure_scaled(isa_, job) : cpu::merge_scaled(isa_, job);
}

Device::Device(const StageTable& table, cpu::Isa isa) : table_(table), processor_(isa) {
  if (table.version != StageTable::kVersion)
    throw std::invalid_argument("a stage of version " + std::to_string(table.version) + ", expected " +
                                std::to_string(StageTable::kVersion));
  if (table.merge == nullptr || table.error == nullptr)
    throw std::invalid_argument("a stage needs merge() and error()");
}

void Device::check(int code, int worker) const {
  if (code == 0) return;
  const char* text = table_.error(table_.self, worker);
  throw StageError(text ? text : "the device failed with code " + std::to_string(code));
}

std::byte* Device::memory(int workers, std::size_t slot_bytes) {
  void* slab = nullptr;
  if (table_.memory) check(table_.memory(table_.self, workers, slot_bytes, &slab), -1);
  return static_cast<std::byte*>(slab);
}

void Device::attach(std::byte* slab, int workers, std::size_t slot_bytes) {
  if (table_.attach) check(table_.attach(table_.self, slab, workers, slot_bytes), -1);
}

void Device::detach() noexcept {
  if (table_.detach) table_.detach(table_.self);
}

bool Device::takes(const ScaledMerge& job) const {
  return table_.merge_scaled != nullptr && (table_.takes == nullptr || table_.takes(table_.self, &job));
}

void Device::write(int worker, std::byte* to, const std::byte* from, std::size_t bytes) {
  if (table_.write == nullptr) return Stage::write(worker, to, from, bytes);
  check(table_.write(table_.self, worker, to, from, bytes), worker);
}

void Device::merge(int worker, const StageBatch& batch, Counts* counts) {
  check(table_.merge(table_.self, worker, &batch, counts), worker);
}

ScaledResult Device::merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) {
  if (!takes(job)) return processor_.merge_scaled(worker, frame, job, measure);
  ScaledResult result;
  check(table_.merge_scaled(table_.self, worker, &frame, &job, measure, &result), worker);
  return result;
}

}  // namespace paramdelta::io

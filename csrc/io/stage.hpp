// Stages of the engine: the processor, and whatever is behind a table of functions (core/stage.hpp).
#pragma once

#include <cstddef>

#include "core/stage.hpp"
#include "cpu/merge.hpp"

namespace paramdelta::io {

class Stage {
 public:
  virtual ~Stage() = default;
  // Memory for the slots, null: the engine takes its own.
  virtual std::byte* memory(int /*workers*/, std::size_t /*slot_bytes*/) { return nullptr; }
  virtual void attach(std::byte* /*slab*/, int /*workers*/, std::size_t /*slot_bytes*/) {}
  virtual void detach() noexcept {}
  // Whether operands may lie in host memory of the caller's, outside of the slots.
  virtual bool reaches_memory() const { return true; }
  // Whether operands and outputs may lie in memory of the device.
  virtual bool has_memory() const { return false; }
  // Whether a matrix is computed there, by all but its operands and outputs.
  virtual bool takes(const ScaledMerge& /*job*/) const { return false; }
  virtual void write(int worker, std::byte* to, const std::byte* from, std::size_t bytes);
  virtual void merge(int worker, const StageBatch& batch, Counts* counts) = 0;
  virtual ScaledResult merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) = 0;
};

// In the worker's own thread.
class Processor : public Stage {
 public:
  explicit Processor(cpu::Isa isa) : isa_(isa) {}
  void merge(int worker, const StageBatch& batch, Counts* counts) override;
  ScaledResult merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) override;

 private:
  const cpu::Isa isa_;
};

// Throws StageError with the text of the table's error().
class Device : public Stage {
 public:
  Device(const StageTable& table, cpu::Isa isa);
  std::byte* memory(int workers, std::size_t slot_bytes) override;
  void attach(std::byte* slab, int workers, std::size_t slot_bytes) override;
  void detach() noexcept override;
  bool reaches_memory() const override { return false; }
  bool has_memory() const override { return table_.write != nullptr; }
  bool takes(const ScaledMerge& job) const override;
  void write(int worker, std::byte* to, const std::byte* from, std::size_t bytes) override;
  void merge(int worker, const StageBatch& batch, Counts* counts) override;
  ScaledResult merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure) override;

 private:
  void check(int code, int worker) const;

  const StageTable table_;
  Processor processor_;
};

}  // namespace paramdelta::io

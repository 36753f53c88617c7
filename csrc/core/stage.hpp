// What computes the loads of the streaming engine: the boundary between the engine, which reads and writes, and a
// device that slots are sent to and come back from. A table of plain functions, so that modules built apart can meet.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/expression.hpp"
#include "core/scaled.hpp"

namespace paramdelta {

// The part of a slot that a load's operands lie in. Pointers of jobs that point out of the slot are null, lie in the
// extent of the output, or are memory of the device, operands as well as what is made; the latter two only where
// write() is there.
struct StageFrame {
  const void* operands = nullptr;
  std::size_t operand_bytes = 0;
  bool unchanged = false;  // since this worker's last call
};

// A load of spans: jobs whose outputs lie in one extent, in the order of their addresses. Between them may lie bytes of
// tensors that are copied: they are to be left alone.
struct StageBatch {
  StageFrame frame;
  void* out = nullptr;
  std::size_t out_bytes = 0;
  bool out_on_device = false;  // `out` is memory of the device
  const Merge* jobs = nullptr;
  const std::int32_t* tensors = nullptr;  // the output tensor of each job
  std::size_t n_jobs = 0;
};

// Every function is called by the engine's workers, each with its own number, and returns when the result lies where
// the jobs want it: 0, or another number where it failed, and then error() says why. `self` is passed back as it is.
struct StageTable {
  static constexpr std::uint32_t kVersion = 2;
  static constexpr const char* kCapsule = "paramdelta.stage";

  std::uint32_t version = kVersion;
  void* self = nullptr;
  // Before anything else: page-aligned memory for `workers` slots of `slot_bytes`, the stage's own, until detach().
  // Where this is null, or gives null, the engine takes memory of its own.
  int (*memory)(void* self, int workers, std::size_t slot_bytes, void** slab) = nullptr;
  // Before the workers start: all slots are cut from `slab`.
  int (*attach)(void* self, void* slab, int workers, std::size_t slot_bytes) = nullptr;
  // When they have ended; not where one of the above failed, which is to leave nothing behind.
  void (*detach)(void* self) = nullptr;
  // `counts`: one for each job, zeros at first.
  int (*merge)(void* self, int worker, const StageBatch* batch, Counts* counts) = nullptr;
  // Where it is null, or says no to a matrix, the processor computes it. It is asked before operands are read, when all
  // else of the job is known. `measure` asks for the result alone.
  bool (*takes)(void* self, const ScaledMerge* job) = nullptr;
  int (*merge_scaled)(void* self, int worker, const StageFrame* frame, const ScaledMerge* job, bool measure,
                      ScaledResult* result) = nullptr;
  // From a slot into memory of the device; needed only by runs with such outputs.
  int (*write)(void* self, int worker, void* to, const void* from, std::size_t bytes) = nullptr;
  // What failed last in this worker (−1: in memory or attach); valid until the worker's next call.
  const char* (*error)(void* self, int worker) = nullptr;
};

}  // namespace paramdelta

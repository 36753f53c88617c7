// The CUDA device as a stage of the streaming engine: slots are page-locked, each worker has device memory of a slot's
// size and a stream, and carries its load to the device, through the kernels, and back. While one worker waits for its
// stream, others read, write, or have copies under way in either direction: the depth of the pipeline is the number of
// workers, and its memory, on both sides, workers × slot size.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "core/stage.hpp"
#include "cuda/memory.hpp"
#include "cuda/merge.hpp"
#include "cuda/scaled.hpp"

namespace paramdelta::cuda {

class PinnedStage {
 public:
  explicit PinnedStage(int device);

  // The functions of core/stage.hpp on this object, which must outlive every engine that is given it.
  StageTable table();

  std::byte* memory(int workers, std::size_t slot_bytes);
  void attach(std::byte* slab, int workers, std::size_t slot_bytes);
  void detach() noexcept;
  void merge(int worker, const StageBatch& batch, Counts* counts);
  ScaledResult merge_scaled(int worker, const StageFrame& frame, const ScaledMerge& job, bool measure);
  void write(int worker, void* to, const void* from, std::size_t bytes);
  const std::string& error_of(int worker) const;
  void set_error(int worker, std::string text);

 private:
  struct Unmapper {
    std::size_t bytes;
    void operator()(std::byte* memory) const;
  };
  // What one worker has on the device.
  struct Lane {
    void make_room(int device, std::size_t jobs);

    const std::byte* slot = nullptr;
    // Released last: copies to it may still be under way where a load failed, and releasing device memory waits for
    // them.
    std::vector<Counts> counted;
    PinnedMemory counted_pinned;
    DeviceMemory counts;
    DeviceMemory workspace;
    DeviceMemory memory;
    Queue queue;
    std::string error;
  };
  // Where in a lane's memory the byte of its slot lies.
  struct Mapping;

  const int device_;
  bool in_use_ = false;
  std::atomic<bool> failed_{false};
  int workers_ = 0;
  std::size_t slot_bytes_ = 0;
  // Both kept from one run to the next: locking pages takes as long as copying them.
  std::unique_ptr<std::byte, Unmapper> slab_;
  PinnedMemory pinned_;
  std::vector<Lane> lanes_;
  std::string error_;
};

}  // namespace paramdelta::cuda

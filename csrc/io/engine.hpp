// The streaming engine: workers that each carry their slot through read, compute and write until no load is left.
#pragma once

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "io/checksums.hpp"
#include "io/cursor.hpp"
#include "io/rectangle.hpp"
#include "io/slot.hpp"
#include "io/stage.hpp"
#include "io/work.hpp"

namespace paramdelta::io {

struct Options {
  int threads = 1;
  std::size_t slot_bytes = std::size_t{1} << 20;
  cpu::Isa isa = cpu::Isa::scalar;
  std::shared_ptr<Stage> stage;  // none: the processor
};

// What measuring a unit found: the largest |x| of its regions, and whether a delta in one of them is not zero.
struct Measured {
  float amax = 0.0f;
  bool touched = false;
};

// What quantising lost of an output tensor: sums of (code · scale − merged)² and merged².
struct Loss {
  double error_squared = 0.0;
  double value_squared = 0.0;
};

struct Results {
  // Numbers of tensors and units are those of all variants (Work).
  std::vector<Counts> counts;      // one per tensor
  std::vector<Loss> losses;        // one per tensor; empty where the work has no regions
  std::vector<Measured> measured;  // one per unit
  // raw(), as in cpu/crc32.hpp, of what was written of each tensor that the work has an extent for; one per extent.
  std::vector<std::pair<std::int32_t, std::uint32_t>> checksums;
};

struct Progress {
  std::int64_t bytes_read;
  std::int64_t bytes_written;
};

// Memory: threads · slot_bytes, plus the columns of the work, whatever the size of the files. One run per engine.
// start() returns at once; finish() joins the workers. No thread outlives the engine.
class Engine {
 public:
  // Checks the work against the sizes of the files. Throws StorageError or std::invalid_argument. Output
  // files must exist at their full size; memory of a target belongs to the caller and must outlive the run. Variants
  // write to files only.
  Engine(Work work, std::vector<Input> inputs, std::vector<Target> outputs,
         const std::vector<std::int64_t>& output_sizes, Options options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  void start();
  bool wait_for(double seconds);  // true when every worker is done
  void stop();                    // workers end after the load they carry
  Progress progress() const;
  // Joins; throws the first error of a worker.
  const Results& finish();

 private:
  struct Unmapper {
    std::size_t bytes;
    void operator()(std::byte* memory) const;
  };
  void run(int worker);
  void work_through(int worker, Slot& slot, Rectangle& rectangle);
  void carry(int worker, Slot& slot);
  void carry(int worker, Rectangle& rectangle, const Piece& piece);
  void join() noexcept;
  void note(const StageBatch& batch, std::size_t variant, const std::vector<Counts>& counts);
  void note(const Region& region, std::size_t variant, const ScaledResult& result);

  Work work_;
  std::vector<Input> inputs_;
  std::vector<Target> outputs_;
  const Options options_;
  const std::shared_ptr<Stage> stage_;
  bool attached_ = false;
  std::optional<Checksums> checksums_;
  std::optional<Cursor> cursor_;
  std::unique_ptr<std::byte, Unmapper> own_slab_;
  std::byte* slab_ = nullptr;  // own_slab_, or the stage's
  std::vector<std::thread> threads_;
  std::atomic<bool> stopping_{false};
  std::atomic<std::int64_t> bytes_read_{0};
  std::atomic<std::int64_t> bytes_written_{0};
  std::mutex mutex_;  // guards what follows
  std::condition_variable done_;
  int running_ = 0;
  std::exception_ptr error_;
  Results results_;
};

}  // namespace paramdelta::io

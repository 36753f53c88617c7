// Files by descriptor: whole reads and writes at an offset, or an error that names the file, the offset and the cause.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace paramdelta::io {

// How bytes travel between a file and memory.
enum class Access : std::uint8_t {
  cached,   // through the page cache, where they stay
  passing,  // through the page cache, which is left as it was found: RWF_DONTCACHE, or told afterwards to forget
  direct,   // past the page cache: O_DIRECT for what is aligned, `passing` for the rest
};

class File {
 public:
  File() = default;
  // Where a file system has no O_DIRECT, direct becomes passing.
  static File open_for_reading(const std::string& path, Access access);
  static File open_for_writing(const std::string& path, Access access);  // the file must exist
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  // What a network file system could not write may be told only here; throws StorageError.
  void close();

  std::int64_t size() const;
  // What offsets, sizes and addresses of direct transfers must be multiples of; 1 where there are none.
  std::size_t alignment() const { return alignment_; }
  // Reads or writes all of `bytes`, over as many calls as it takes; throws StorageError. Writing goes past the cache
  // for the aligned pages of the range, if `from` lies as far into its page as `offset`.
  void read_at(void* to, std::size_t bytes, std::int64_t offset) const;
  void write_at(const void* from, std::size_t bytes, std::int64_t offset) const;
  // Reads at least the same, and whatever lies around it up to multiples of alignment(). `to` must lie as far into its
  // page as `offset`, and the memory around it must be there.
  void read_around(void* to, std::size_t bytes, std::int64_t offset) const;

 private:
  File(const std::string& path, int flags, Access access);
  void write_through_cache(const char* from, std::size_t bytes, std::int64_t offset) const;
  void forget(std::int64_t offset, std::size_t bytes) const;
  int close_all() noexcept;  // the error, or 0

  int fd_ = -1;
  int direct_ = -1;  // the same file with O_DIRECT
  std::size_t alignment_ = 1;
  bool passing_ = false;
  bool forgets_ = false;                     // the page cache had less than half of it
  mutable std::atomic<bool> flagged_{true};  // until the file system refuses RWF_DONTCACHE
  std::string path_;
};

// Where input comes from: a file, or memory of the caller's (`memory`, `bytes` long) that outlives the run. Memory of a
// device is an operand where it lies, and is not read by anyone but the stage.
struct Input {
  File file;
  const std::byte* memory = nullptr;
  std::int64_t bytes = 0;
  bool on_device = false;

  std::int64_t size() const { return memory ? bytes : file.size(); }
  std::size_t alignment() const { return file.alignment(); }
  void read_at(void* to, std::size_t count, std::int64_t offset) const {
    if (on_device) throw std::invalid_argument("memory of a device is merged where it lies, not copied, nor turned");
    if (memory)
      std::memcpy(to, memory + offset, count);
    else
      file.read_at(to, count, offset);
  }
  void read_around(void* to, std::size_t count, std::int64_t offset) const {
    if (alignment() > 1)
      file.read_around(to, count, offset);
    else
      read_at(to, count, offset);
  }
};

// Where output goes, likewise; or nowhere, where only what comes of it on the way is wanted. Memory of a device is
// written to by the stage.
struct Target {
  File file;
  std::byte* memory = nullptr;
  bool nowhere = false;
  bool on_device = false;

  std::size_t alignment() const { return file.alignment(); }
  void write_at(const void* from, std::size_t count, std::int64_t offset) const {
    if (memory)
      std::memcpy(memory + offset, from, count);
    else if (!nowhere)
      file.write_at(from, count, offset);
  }
};

// `at`, or the next address behind it that is `offset` bytes into its `alignment` (a power of two).
inline std::byte* placed(std::byte* at, std::size_t alignment, std::int64_t offset) {
  const std::size_t want = static_cast<std::size_t>(offset) % alignment;
  return at + (want - reinterpret_cast<std::uintptr_t>(at) % alignment) % alignment;
}

}  // namespace paramdelta::io

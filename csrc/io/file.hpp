// Files by descriptor: whole reads and writes at an offset, or an error that names the file, the offset and the cause.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace paramdelta::io {

class File {
 public:
  File() = default;
  static File open_for_reading(const std::string& path);
  static File open_for_writing(const std::string& path);  // the file must exist
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  std::int64_t size() const;
  // Reads or writes all of `bytes`, over as many calls as it takes; throws StorageError.
  void read_at(void* to, std::size_t bytes, std::int64_t offset) const;
  void write_at(const void* from, std::size_t bytes, std::int64_t offset) const;

 private:
  File(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  int fd_ = -1;
  std::string path_;
};

// Where input comes from: a file, or memory of the caller's (`memory`, `bytes` long) that outlives the run.
struct Input {
  File file;
  const std::byte* memory = nullptr;
  std::int64_t bytes = 0;

  std::int64_t size() const { return memory ? bytes : file.size(); }
  void read_at(void* to, std::size_t count, std::int64_t offset) const {
    if (memory)
      std::memcpy(to, memory + offset, count);
    else
      file.read_at(to, count, offset);
  }
};

// Where output goes, likewise.
struct Target {
  File file;
  std::byte* memory = nullptr;

  void write_at(const void* from, std::size_t count, std::int64_t offset) const {
    if (memory)
      std::memcpy(memory + offset, from, count);
    else
      file.write_at(from, count, offset);
  }
};

}  // namespace paramdelta::io

// pread and pwrite in loops: calls that are interrupted or come back short are continued.
#include "io/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.hpp"

namespace paramdelta::io {
namespace {

[[noreturn]] void fail(const std::string& path, const char* action, std::int64_t offset, int code) {
  std::string text = path + ": " + action;
  if (offset >= 0) text += " at byte " + std::to_string(offset);
  text += code ? std::string(" failed: ") + std::strerror(code)
               : std::string(" met the end of the file: it became shorter while the merge ran");
  throw StorageError(text, code);
}

int open_retrying(const std::string& path, int flags) {
  for (;;) {
    const int fd = ::open(path.c_str(), flags | O_CLOEXEC);
    if (fd >= 0 || errno != EINTR) return fd;
  }
}

}  // namespace

File File::open_for_reading(const std::string& path) {
  const int fd = open_retrying(path, O_RDONLY);
  if (fd < 0) fail(path, "opening", -1, errno);
  // A wider read-ahead window; advice only, so a refusal changes nothing.
  (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
  return File(fd, path);
}

File File::open_for_writing(const std::string& path) {
  const int fd = open_retrying(path, O_WRONLY);
  if (fd < 0) fail(path, "opening", -1, errno);
  return File(fd, path);
}

File::File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(path_, other.path_);
  return *this;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

std::int64_t File::size() const {
  struct stat status{};
  if (::fstat(fd_, &status) != 0) fail(path_, "fstat", -1, errno);
  return static_cast<std::int64_t>(status.st_size);
}

void File::read_at(void* to, std::size_t bytes, std::int64_t offset) const {
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_, at, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail(path_, "reading", offset, errno);
    if (got == 0) fail(path_, "reading", offset, 0);
    at += got;
    offset += got;
    bytes -= static_cast<std::size_t>(got);
  }
}

void File::write_at(const void* from, std::size_t bytes, std::int64_t offset) const {
  const auto* at = static_cast<const char*>(from);
  while (bytes > 0) {
    const ssize_t put = ::pwrite(fd_, at, bytes, offset);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) fail(path_, "writing", offset, put < 0 ? errno : EIO);
    at += put;
    offset += put;
    bytes -= static_cast<std::size_t>(put);
  }
}

}  // namespace paramdelta::io

// pread and pwrite in loops: calls that are interrupted or come back short are continued. What the kernel or the file
// system does not have (O_DIRECT, RWF_DONTCACHE) is replaced by what it does.
#include "io/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.hpp"
#include "io/storage.hpp"

#ifndef RWF_DONTCACHE
#define RWF_DONTCACHE 0x00000080
#endif

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

// Smaller transfers share their pages with others to come, so those are forgotten when the file is closed.
constexpr std::size_t kPassed = std::size_t{512} << 10;

// Kernels before 6.14 and many file systems do not take RWF_DONTCACHE.
bool refuses_flag(int code) { return code == EOPNOTSUPP || code == ENOSYS || code == EINVAL; }

constexpr std::int64_t round_up(std::int64_t value, std::int64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

}  // namespace

File::File(const std::string& path, int flags, Access access) : passing_(access != Access::cached), path_(path) {
  fd_ = open_retrying(path, flags);
  if (fd_ < 0) fail(path, "opening", -1, errno);
  if (access != Access::direct) return;
  const std::size_t alignment = direct_alignment(path);
  if (alignment == 0) return;
  direct_ = open_retrying(path, flags | O_DIRECT);
  if (direct_ >= 0) alignment_ = alignment;
}

File File::open_for_reading(const std::string& path, Access access) {
  File file(path, O_RDONLY | O_NONBLOCK, access);  // a pipe must not wait for its writer
  struct stat status{};
  if (::fstat(file.fd_, &status) != 0) fail(path, "fstat", -1, errno);
  if (!S_ISREG(status.st_mode)) throw StorageError(path + ": is no longer a regular file", EINVAL);
  file.forgets_ = access != Access::cached && 2 * cached_bytes(path) < file.size();
  // A wider read-ahead window, where it is of use; advice only, so a refusal changes nothing.
  if (file.direct_ < 0) (void)::posix_fadvise(file.fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
  return file;
}

File File::open_for_writing(const std::string& path, Access access) {
  File file(path, O_WRONLY, access);
  file.forgets_ = access != Access::cached;
  return file;
}

File::File(File&& other) noexcept { *this = std::move(other); }

File& File::operator=(File&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(direct_, other.direct_);
  std::swap(alignment_, other.alignment_);
  std::swap(passing_, other.passing_);
  std::swap(forgets_, other.forgets_);
  flagged_ = other.flagged_.load();
  std::swap(path_, other.path_);
  return *this;
}

int File::close_all() noexcept {
  if (fd_ >= 0 && forgets_) forget(0, 0);  // all of it
  int code = 0;
  for (int* fd : {&direct_, &fd_})
    if (*fd >= 0 && ::close(std::exchange(*fd, -1)) != 0 && errno != EINTR) code = errno;
  return code;
}

File::~File() { (void)close_all(); }

void File::close() {
  if (const int code = close_all()) fail(path_, "closing", -1, code);
}

std::int64_t File::size() const {
  struct stat status{};
  if (::fstat(fd_, &status) != 0) fail(path_, "fstat", -1, errno);
  return static_cast<std::int64_t>(status.st_size);
}

void File::forget(std::int64_t offset, std::size_t bytes) const {
  (void)::posix_fadvise(fd_, offset, static_cast<off_t>(bytes), POSIX_FADV_DONTNEED);
}

void File::read_at(void* to, std::size_t bytes, std::int64_t offset) const {
  const std::int64_t begin = offset;
  const std::size_t total = bytes;
  bool flagged = passing_ && bytes >= kPassed && flagged_.load(std::memory_order_relaxed);
  auto* at = static_cast<char*>(to);
  while (bytes > 0) {
    const iovec range{at, bytes};
    const ssize_t got = flagged ? ::preadv2(fd_, &range, 1, offset, RWF_DONTCACHE) : ::pread(fd_, at, bytes, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && flagged && refuses_flag(errno)) {
      flagged_ = flagged = false;
      continue;
    }
    if (got < 0) fail(path_, "reading", offset, errno);
    if (got == 0) fail(path_, "reading", offset, 0);
    at += got;
    offset += got;
    bytes -= static_cast<std::size_t>(got);
  }
  if (forgets_ && !flagged && total >= kPassed) forget(begin, total);
}

void File::read_around(void* to, std::size_t bytes, std::int64_t offset) const {
  const auto alignment = static_cast<std::int64_t>(alignment_);
  const std::int64_t begin = offset / alignment * alignment;
  const std::int64_t wanted = offset + static_cast<std::int64_t>(bytes);
  const std::int64_t end = round_up(wanted, alignment);
  auto* const memory = static_cast<char*>(to) - (offset - begin);
  std::int64_t at = begin;
  // A transfer that ends within a page is the last of its file, or not to be continued past the cache.
  while (at < wanted && at % alignment == 0) {
    const ssize_t got = ::pread(direct_, memory + (at - begin), static_cast<std::size_t>(end - at), at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) break;
    if (got < 0) fail(path_, "reading", at, errno);
    if (got == 0) fail(path_, "reading", at, 0);
    at += got;
  }
  at = std::max(at, offset);
  if (at < wanted) read_at(memory + (at - begin), static_cast<std::size_t>(wanted - at), at);
}

void File::write_through_cache(const char* from, std::size_t bytes, std::int64_t offset) const {
  const std::int64_t begin = offset;
  const std::size_t total = bytes;
  bool flagged = passing_ && bytes >= kPassed && flagged_.load(std::memory_order_relaxed);
  while (bytes > 0) {
    const iovec range{const_cast<char*>(from), bytes};
    const ssize_t put =
        flagged ? ::pwritev2(fd_, &range, 1, offset, RWF_DONTCACHE) : ::pwrite(fd_, from, bytes, offset);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && flagged && refuses_flag(errno)) {
      flagged_ = flagged = false;
      continue;
    }
    if (put <= 0) fail(path_, "writing", offset, put < 0 ? errno : EIO);
    from += put;
    offset += put;
    bytes -= static_cast<std::size_t>(put);
  }
  if (!passing_ || flagged || total < kPassed) return;
  // Written back before it is forgotten, so that no more is ever dirty than what workers have in hand. A failure to
  // write back is reported by the sync at the end as well.
  const int all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (::sync_file_range(fd_, begin, static_cast<off_t>(total), all) == 0) forget(begin, total);
}

void File::write_at(const void* from, std::size_t bytes, std::int64_t offset) const {
  const auto* at = static_cast<const char*>(from);
  const auto alignment = static_cast<std::int64_t>(alignment_);
  const std::int64_t end = offset + static_cast<std::int64_t>(bytes);
  const std::int64_t first = round_up(offset, alignment), last = end / alignment * alignment;
  const bool congruent = (reinterpret_cast<std::uintptr_t>(at) - static_cast<std::uintptr_t>(offset)) % alignment_ == 0;
  if (direct_ < 0 || first >= last || !congruent) return write_through_cache(at, bytes, offset);
  if (first > offset) write_through_cache(at, static_cast<std::size_t>(first - offset), offset);
  std::int64_t done = first;
  while (done < last && done % alignment == 0) {
    const ssize_t put = ::pwrite(direct_, at + (done - offset), static_cast<std::size_t>(last - done), done);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && errno == EINVAL) break;
    if (put <= 0) fail(path_, "writing", done, put < 0 ? errno : EIO);
    done += put;
  }
  if (done < end) write_through_cache(at + (done - offset), static_cast<std::size_t>(end - done), done);
}

}  // namespace paramdelta::io

// Asks the kernel; whatever it does not know is answered by what is safe.
#include "io/storage.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "core/error.hpp"

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x00002000U
#endif
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

namespace paramdelta::io {
namespace {

constexpr std::int64_t kPage = 4096;

class Descriptor {
 public:
  Descriptor(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_NONBLOCK | O_CLOEXEC)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

std::int64_t size_of_file(int fd) {
  struct stat status{};
  return ::fstat(fd, &status) == 0 ? static_cast<std::int64_t>(status.st_size) : -1;
}

// Headers of older systems do not name what STATX_DIOALIGN fills in; its place in the structure is fixed.
struct StatxWithDirect {
  struct statx known;
  std::uint32_t mem_align() const { return at(152); }
  std::uint32_t offset_align() const { return at(156); }

 private:
  std::uint32_t at(std::size_t offset) const {
    std::uint32_t value;
    std::memcpy(&value, reinterpret_cast<const char*>(&known) + offset, sizeof value);
    return value;
  }
};

}  // namespace

std::size_t direct_alignment(const std::string& path) {
  StatxWithDirect found{};
  if (::statx(AT_FDCWD, path.c_str(), 0, STATX_DIOALIGN, &found.known) != 0) return 0;
  if (!(found.known.stx_mask & STATX_DIOALIGN) || found.offset_align() == 0) return 0;
  const std::size_t largest = std::max(found.mem_align(), found.offset_align());
  return std::max<std::size_t>(largest, kPage);
}

bool in_memory(const std::string& path) {
  struct statfs found{};
  if (::statfs(path.c_str(), &found) != 0) return false;
  const auto type = static_cast<std::uint32_t>(found.f_type);
  return type == TMPFS_MAGIC || type == RAMFS_MAGIC;
}

std::int64_t cached_bytes_by_cachestat(const std::string& path) {
  const Descriptor file(path, O_RDONLY);
  const std::int64_t size = file.fd() < 0 ? -1 : size_of_file(file.fd());
  if (size < 0) return -1;
  struct {
    std::uint64_t offset, bytes;
  } range{0, 0};  // all of it
  struct {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } pages{};
  if (::syscall(SYS_cachestat, file.fd(), &range, &pages, 0) != 0) return -1;
  return std::min(size, static_cast<std::int64_t>(pages.cached) * kPage);
}

std::int64_t cached_bytes_by_mincore(const std::string& path) {
  constexpr std::int64_t kWindow = std::int64_t{1} << 30;
  const Descriptor file(path, O_RDONLY);
  const std::int64_t size = file.fd() < 0 ? -1 : size_of_file(file.fd());
  if (size < 0) return -1;
  std::int64_t found = 0;
  std::vector<unsigned char> pages(static_cast<std::size_t>(kWindow / kPage));
  for (std::int64_t at = 0; at < size; at += kWindow) {
    const auto bytes = static_cast<std::size_t>(std::min(kWindow, size - at));
    void* mapped = ::mmap(nullptr, bytes, PROT_NONE, MAP_SHARED, file.fd(), at);
    if (mapped == MAP_FAILED) return -1;
    const int failed = ::mincore(mapped, bytes, pages.data());
    ::munmap(mapped, bytes);
    if (failed) return -1;
    const auto end = pages.begin() + static_cast<std::ptrdiff_t>((bytes + kPage - 1) / kPage);
    found += kPage * std::count_if(pages.begin(), end, [](unsigned char page) { return page & 1; });
  }
  return std::min(size, found);
}

std::int64_t cached_bytes(const std::string& path) {
  const std::int64_t found = cached_bytes_by_cachestat(path);
  return found >= 0 ? found : cached_bytes_by_mincore(path);
}

bool reserve(const std::string& path, std::int64_t bytes) {
  struct statfs found{};
  if (::statfs(path.c_str(), &found) != 0) return false;
  // File systems that allocate without writing. BTRFS_SUPER_MAGIC copies on write, so room set aside is no promise.
  const auto type = static_cast<std::uint32_t>(found.f_type);
  constexpr std::uint32_t kXfs = 0x58465342;
  if (type != EXT4_SUPER_MAGIC && type != kXfs) return false;
  const Descriptor file(path, O_WRONLY);
  if (file.fd() < 0) throw StorageError(path + ": opening failed: " + std::strerror(errno), errno);
  int code;
  do {
    code = ::fallocate(file.fd(), 0, 0, bytes) == 0 ? 0 : errno;
  } while (code == EINTR);
  if (code == EOPNOTSUPP || code == ENOSYS) return false;
  if (code)
    throw StorageError(path + ": " + std::to_string(bytes) + " bytes cannot be reserved: " + std::strerror(code), code);
  return true;
}

}  // namespace paramdelta::io

// What can be known of a file before its data is touched: whether the page cache has it, whether it can go past it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace paramdelta::io {

// What offsets, sizes and addresses of O_DIRECT transfers must be multiples of (at least a page of 4096 bytes), or 0
// where the file system has no direct transfers, or does not say how they are to be aligned.
std::size_t direct_alignment(const std::string& path);

// Whether the file lives in memory alone (tmpfs, ramfs).
bool in_memory(const std::string& path);

// Bytes of the file that the page cache has, whole pages counted; −1 where the kernel does not tell. Two ways to ask:
// cachestat(2) (Linux 6.5) and mincore(2) over a mapping whose pages are never touched.
std::int64_t cached_bytes(const std::string& path);
std::int64_t cached_bytes_by_cachestat(const std::string& path);
std::int64_t cached_bytes_by_mincore(const std::string& path);

// Allocates `bytes` for the file where that is cheap; throws StorageError where the storage has no room for them.
// Elsewhere (tmpfs zeroes every page, network file systems write them) it does nothing and returns false.
bool reserve(const std::string& path, std::int64_t bytes);

}  // namespace paramdelta::io

// Finds the tensor that a piece belongs to by bisection; rows of one tensor are summed up by Horner's rule.
#include "io/checksums.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace paramdelta::io {

Checksums::Checksums(std::vector<Extent> extents, std::size_t tensors, const std::vector<std::int64_t>& file_sizes,
                     cpu::Isa isa)
    : extents_(std::move(extents)),
      sums_(std::make_unique<std::atomic<std::uint32_t>[]>(extents_.size())),
      crc_(cpu::crc32_for(isa)) {
  std::int32_t file = 0;
  std::int64_t end = 0;
  for (std::size_t i = 0; i < extents_.size(); ++i) {
    const Extent& at = extents_[i];
    const bool known = at.file >= 0 && static_cast<std::size_t>(at.file) < file_sizes.size() && at.tensor >= 0 &&
                       static_cast<std::size_t>(at.tensor) < tensors;
    if (!known || at.begin < 0 || at.begin > at.end || at.end > file_sizes[static_cast<std::size_t>(at.file)] ||
        at.file < file || (at.file == file && at.begin < end))
      throw std::invalid_argument("extent " + std::to_string(i) + ": out of order or out of range");
    file = at.file;
    end = at.end;
  }
}

// The first extent that ends behind a byte of a file.
std::size_t Checksums::first_behind(std::int32_t file, std::int64_t offset) const {
  const auto found = std::partition_point(extents_.begin(), extents_.end(), [&](const Extent& extent) {
    return std::make_pair(extent.file, extent.end) <= std::make_pair(file, offset);
  });
  return static_cast<std::size_t>(found - extents_.begin());
}

// `end`: where in the file the bytes end whose remainder is `raw`.
void Checksums::contribute(std::size_t extent, std::uint32_t raw, std::int64_t end) {
  const auto behind = static_cast<std::uint64_t>(extents_[extent].end - end);
  sums_[extent].fetch_xor(cpu::shifted(raw, behind), std::memory_order_relaxed);
}

void Checksums::add(std::int32_t file, std::int64_t offset, const std::byte* data, std::size_t bytes) {
  if (extents_.empty()) return;
  const std::int64_t end = offset + static_cast<std::int64_t>(bytes);
  for (std::size_t i = first_behind(file, offset); i < extents_.size(); ++i) {
    const Extent& extent = extents_[i];
    if (extent.file != file || extent.begin >= end) return;
    const std::int64_t from = std::max(offset, extent.begin), to = std::min(end, extent.end);
    if (from < to) contribute(i, crc_.raw(data + (from - offset), static_cast<std::size_t>(to - from)), to);
  }
}

void Checksums::add_rows(std::int32_t file, std::int64_t offset, const std::byte* data, std::int64_t rows,
                         std::int64_t length, std::int64_t pitch) {
  if (extents_.empty() || rows == 0) return;
  if (rows == 1 || pitch == length) return add(file, offset, data, static_cast<std::size_t>(rows * length));
  const std::int64_t end = offset + (rows - 1) * pitch + length;
  const std::size_t i = first_behind(file, offset);
  const bool in_one = i < extents_.size() && extents_[i].file == file && extents_[i].begin <= offset &&
                      end <= extents_[i].end && pitch > 0;
  if (!in_one) {
    for (std::int64_t r = 0; r < rows; ++r)
      add(file, offset + r * pitch, data + r * length, static_cast<std::size_t>(length));
    return;
  }
  const std::uint32_t step = cpu::power_of_x(static_cast<std::uint64_t>(pitch));
  std::uint32_t raw = 0;
  for (std::int64_t r = 0; r < rows; ++r)
    raw = crc_.multiply(raw, step) ^ crc_.raw(data + r * length, static_cast<std::size_t>(length));
  contribute(i, raw, end);
}

}  // namespace paramdelta::io

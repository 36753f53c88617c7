// The CRC-32 of every output tensor, summed up piece by piece as the pieces leave for their files, in any order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/crc32.hpp"

namespace paramdelta::io {

// Where a tensor lies in an output file: bytes begin … end − 1.
struct Extent {
  std::int64_t begin, end;
  std::int32_t file, tensor;
};
static_assert(sizeof(Extent) == 24);

// What a piece at [o, o + n) of a tensor of T bytes contributes is raw(piece) · x^(8 (T − o − n)) (cpu/crc32.hpp);
// the exclusive or of all contributions is raw(tensor), whoever computes them, and when. Calls may come from many
// threads at once.
class Checksums {
 public:
  // Extents must be in order of file and begin, without overlaps; none switch the checksums off. Throws
  // std::invalid_argument where they are not, or do not fit their files.
  Checksums(std::vector<Extent> extents, std::size_t tensors, const std::vector<std::int64_t>& file_sizes,
            cpu::Isa isa);

  // `bytes` at `offset` of a file, which may hold parts of several tensors.
  void add(std::int32_t file, std::int64_t offset, const std::byte* data, std::size_t bytes);
  // `rows` of `length` bytes, packed in memory and `pitch` bytes apart in the file.
  void add_rows(std::int32_t file, std::int64_t offset, const std::byte* data, std::int64_t rows, std::int64_t length,
                std::int64_t pitch);

  // raw() of what has been added, for each extent.
  std::uint32_t sum(std::size_t extent) const { return sums_[extent].load(std::memory_order_relaxed); }
  const std::vector<Extent>& extents() const { return extents_; }

 private:
  std::size_t first_behind(std::int32_t file, std::int64_t offset) const;
  void contribute(std::size_t extent, std::uint32_t raw, std::int64_t end);

  std::vector<Extent> extents_;
  std::unique_ptr<std::atomic<std::uint32_t>[]> sums_;
  const cpu::Crc32& crc_;
};

}  // namespace paramdelta::io

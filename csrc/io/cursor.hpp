// Cuts the work into loads that fit a slot, in output order, for any number of workers: first the spans, then the
// regions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "io/rectangle.hpp"
#include "io/work.hpp"

namespace paramdelta::io {

// Elements first … first + count − 1 of a span.
struct Part {
  std::size_t span;
  std::int64_t first;
  std::int64_t count;
};

// Every read starts at a multiple of this many bytes in the slot, so that vector loads stay within cache lines.
inline constexpr std::size_t kReadAlignment = 64;

// What a slot carries at a time: parts whose outputs are one consecutive extent of one output file, or, where there are
// none, a piece of a region.
struct Load {
  std::vector<Part> parts;
  Piece piece;
};

class Cursor {
 public:
  // `capacity`: bytes a load of parts may take in a slot (its operands, kReadAlignment for each, and the output);
  // `slot`: all of the slot's bytes. Throws std::invalid_argument where a unit of a region does not fit a slot.
  Cursor(const Work& work, std::size_t capacity, std::size_t slot);

  // The next load; false when none is left.
  bool next(Load& load);

 private:
  void next_parts(std::vector<Part>& parts);
  bool next_piece(Piece& piece);

  const Work& work_;
  const std::size_t capacity_;
  const std::size_t slot_;
  std::mutex mutex_;
  std::size_t span_ = 0;
  std::int64_t element_ = 0;  // within span_
  Piece at_;                  // the last piece handed out
};

}  // namespace paramdelta::io

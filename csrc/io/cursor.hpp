// Cuts the work into loads that fit a slot, in output order, for any number of workers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

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

class Cursor {
 public:
  // `capacity`: bytes a load may take in a slot: its operands, kReadAlignment for each, and the output.
  Cursor(const Work& work, std::size_t capacity) : work_(work), capacity_(capacity) {}

  // The next load: parts whose outputs are one consecutive extent of one output file. False when none is left.
  bool next(std::vector<Part>& parts);

 private:
  const Work& work_;
  const std::size_t capacity_;
  std::mutex mutex_;
  std::size_t span_ = 0;
  std::int64_t element_ = 0;  // within span_
};

}  // namespace paramdelta::io

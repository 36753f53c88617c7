// Many small tensors share a load, a large one spans many. Loads end at page boundaries of the output file where they
// can: a page written in two halves costs the file system a read or a zero fill.
#include "io/cursor.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace paramdelta::io {
namespace {

constexpr std::int64_t kPage = 4096;

std::int64_t out_size(const Span& span) {
  return static_cast<std::int64_t>(size_of(static_cast<DType>(span.out_dtype)));
}

// Slot bytes of `count` elements of a span.
struct Cost {
  std::size_t fixed = 0;
  std::size_t per_element = 0;
};

Cost cost_of(const Work& work, const Span& span) {
  Cost cost{0, static_cast<std::size_t>(out_size(span))};
  if (Work::is_copy(span) && work.alignment == 1) return cost;  // read straight into the output region
  for (int k = 0; k < work.operands(span); ++k) {
    const Location at = work.operand(span, k);
    if (at.file == kZeros) continue;
    cost.fixed += kReadAlignment + work.slack();
    cost.per_element += size_of(at.dtype);
  }
  return cost;
}

// Elements that fit into `room` bytes.
std::int64_t fitting(const Cost& cost, std::size_t room) {
  return room <= cost.fixed ? 0 : static_cast<std::int64_t>((room - cost.fixed) / cost.per_element);
}

// `units` of them, but at least one and no more than fill `total`.
std::int64_t filled(std::int64_t units, std::int64_t unit, std::int64_t total) {
  return std::min(total, std::max<std::int64_t>(units, 1) * unit);
}

// The most of `total`, in multiples of `unit`, for which bytes(n) ≤ room. bytes(unit) does; it grows about evenly.
template <class Bytes>
std::int64_t most(std::int64_t total, std::int64_t unit, std::size_t room, const Bytes& bytes) {
  auto units = static_cast<std::int64_t>(room / std::max<std::size_t>(bytes(std::min(unit, total)), 1));
  while (units > 1 && bytes(filled(units, unit, total)) > room) units -= std::max<std::int64_t>(1, units / 16);
  return filled(units, unit, total);
}

// The size of pieces of `total` that are about equal, whole units, and no larger than `largest`.
std::int64_t even(std::int64_t total, std::int64_t unit, std::int64_t largest) {
  const std::int64_t pieces = (total + largest - 1) / largest;
  const std::int64_t units = (total + unit - 1) / unit;
  return std::min(total, (units + pieces - 1) / pieces * unit);
}

}  // namespace

Cursor::Cursor(const Work& work, std::size_t capacity, std::size_t slot)
    : work_(work), capacity_(capacity), slot_(slot) {
  for (const Region& region : work_.regions) {
    const Unit unit = unit_of(work_, region);
    const std::size_t needed = Rectangle::bytes_for(work_, region, unit.rows, unit.cols);
    if (needed > slot_)
      throw std::invalid_argument("slots of " + std::to_string(slot_) + " bytes are too small: elements that share a " +
                                  "scale take " + std::to_string(needed));
  }
}

bool Cursor::next(Load& load) {
  const std::lock_guard<std::mutex> lock(mutex_);
  load.parts.clear();
  next_parts(load.parts);
  return !load.parts.empty() || next_piece(load.piece);
}

// Whole rows where a unit of them fits, so that reads are long; else columns of one row of units after the other.
bool Cursor::next_piece(Piece& piece) {
  at_.col += at_.cols;
  for (;; ++at_.region, at_ = {at_.region, 0, 0, 0, 0}) {
    if (at_.region >= work_.regions.size()) return false;
    const Region& region = work_.regions[at_.region];
    at_.row = std::max(at_.row, region.first_row);
    if (at_.col >= region.cols) {
      at_.row += at_.rows;
      at_.col = 0;
    }
    if (at_.row < region.end_row && region.cols > 0) break;
  }
  const Region& region = work_.regions[at_.region];
  const Unit unit = unit_of(work_, region);
  const auto bytes = [&](std::int64_t rows, std::int64_t cols) {
    return Rectangle::bytes_for(work_, region, rows, cols);
  };
  if (at_.col == 0) {
    const std::int64_t rows = region.end_row - at_.row;
    at_.rows = std::min(unit.rows, rows);
    at_.cols = region.cols;
    if (bytes(at_.rows, at_.cols) <= slot_)
      at_.rows = most(rows, unit.rows, slot_, [&](std::int64_t n) { return bytes(n, region.cols); });
    else
      at_.cols = even(region.cols, unit.cols,
                      most(region.cols, unit.cols, slot_, [&](std::int64_t n) { return bytes(at_.rows, n); }));
  }
  piece = at_;
  piece.cols = std::min(at_.cols, region.cols - at_.col);
  return true;
}

void Cursor::next_parts(std::vector<Part>& parts) {
  std::size_t room = capacity_;
  std::int64_t end = 0;  // of the extent so far
  while (span_ < work_.spans.size()) {
    const Span& span = work_.spans[span_];
    const std::int64_t begin = span.out_offset + element_ * out_size(span);
    if (!parts.empty() && (span.out_file != work_.spans[parts.front().span].out_file || begin != end)) break;
    const std::int64_t left = span.count - element_;
    const Cost cost = cost_of(work_, span);
    std::int64_t take = std::min(left, fitting(cost, room));
    if (take < left) {
      const std::int64_t page_end = (begin + take * out_size(span)) / kPage * kPage;
      const std::int64_t aligned = (page_end - begin) / out_size(span);
      if (aligned > 0)
        take = aligned;
      else if (!parts.empty())
        break;
    }
    if (take > 0) parts.push_back({span_, element_, take});
    room -= std::min(room, cost.fixed + cost.per_element * static_cast<std::size_t>(take));
    end = begin + take * out_size(span);
    element_ += take;
    if (element_ < span.count) break;
    ++span_;
    element_ = 0;
  }
}

}  // namespace paramdelta::io

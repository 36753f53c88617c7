// Many small tensors share a load, a large one spans many. Loads end at page boundaries of the output file where they
// can: a page written in two halves costs the file system a read or a zero fill.
#include "io/cursor.hpp"

#include <algorithm>

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
  if (Work::is_copy(span)) return cost;  // read straight into the output region
  for (int k = 0; k < work.operands(span); ++k) {
    const Location at = work.operand(span, k);
    if (at.file == kZeros) continue;
    cost.fixed += kReadAlignment;
    cost.per_element += size_of(at.dtype);
  }
  return cost;
}

// Elements that fit into `room` bytes.
std::int64_t fitting(const Cost& cost, std::size_t room) {
  return room <= cost.fixed ? 0 : static_cast<std::int64_t>((room - cost.fixed) / cost.per_element);
}

}  // namespace

bool Cursor::next(std::vector<Part>& parts) {
  parts.clear();
  const std::lock_guard<std::mutex> lock(mutex_);
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
  return !parts.empty();
}

}  // namespace paramdelta::io

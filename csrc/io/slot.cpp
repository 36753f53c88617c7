// Lays a load out in its slot: one region per operand, ranges that are neighbours in a file read in one call, and
// the output extent last.
#include "io/slot.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "io/guard.hpp"

namespace paramdelta::io {
namespace {

// Regions of equal length would start at equal offsets within their pages, where the processor takes a load for
// dependent on an earlier store (only the low 12 bits are compared at first). This gap keeps them apart.
constexpr std::size_t kStagger = 1024 + kReadAlignment;

std::size_t out_size(const Span& span) { return size_of(static_cast<DType>(span.out_dtype)); }

std::byte* aligned(std::byte* at) {
  const auto value = reinterpret_cast<std::uintptr_t>(at);
  return at + (kReadAlignment - value % kReadAlignment) % kReadAlignment;
}

}  // namespace

std::size_t Slot::capacity(const Work& work, std::size_t bytes) {
  const std::size_t gaps = static_cast<std::size_t>(work.max_operands() + 1) * (kStagger + kReadAlignment);
  return bytes > gaps ? bytes - gaps : 0;
}

std::int64_t Slot::out_offset() const {
  const Span& front = work_.spans[parts_.front().span];
  return front.out_offset + parts_.front().first * static_cast<std::int64_t>(out_size(front));
}

// Ranges that are neighbours in their file and in the slot become one read.
void Slot::read_into(std::byte* to, const Location& from, std::size_t bytes) {
  if (!reads_.empty()) {
    Read& last = reads_.back();
    if (last.file == from.file && last.offset + static_cast<std::int64_t>(last.bytes) == from.offset &&
        last.to + last.bytes == to) {
      last.bytes += bytes;
      return;
    }
  }
  reads_.push_back({from.file, from.offset, bytes, to});
}

std::byte* Slot::place(const Location& at, std::size_t bytes) {
  if (at.file == kZeros) return nullptr;
  const bool neighbour = !reads_.empty() && reads_.back().file == at.file &&
                         reads_.back().offset + static_cast<std::int64_t>(reads_.back().bytes) == at.offset &&
                         reads_.back().to + reads_.back().bytes == free_;
  std::byte* to = neighbour ? free_ : aligned(free_);
  if (to + bytes <= memory_ + bytes_) allow(to, bytes);
  read_into(to, at, bytes);
  free_ = to + bytes;
  return to;
}

void Slot::lay_out_operand(std::size_t k) {
  free_ += kStagger;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const Part& part = parts_[i];
    const Span& span = work_.spans[part.span];
    std::byte* to = nullptr;
    if (static_cast<int>(k) < work_.operands(span)) {
      Location at = work_.operand(span, static_cast<int>(k));
      const std::size_t item = size_of(at.dtype);
      at.offset += part.first * static_cast<std::int64_t>(item);
      const std::size_t bytes = static_cast<std::size_t>(part.count) * item;
      if (Work::is_copy(span))
        read_into(to = outs_[i], at, bytes);
      else
        to = place(at, bytes);
    }
    where_.push_back(to);
  }
}

void Slot::lay_out(std::vector<Target>& outputs) {
  reads_.clear();
  where_.clear();
  outs_.clear();
  std::size_t operands = 1;
  out_bytes_ = 0;
  for (const Part& part : parts_) {
    const Span& span = work_.spans[part.span];
    operands = std::max(operands, static_cast<std::size_t>(work_.operands(span)));
    out_bytes_ += static_cast<std::size_t>(part.count) * out_size(span);
  }
  Target& target = outputs[static_cast<std::size_t>(work_.spans[parts_.front().span].out_file)];
  free_ = memory_;
  forbid(memory_, bytes_);
  out_ = target.memory ? target.memory + out_offset() : free_;
  if (!target.memory) {
    allow(memory_, std::min(out_bytes_, bytes_));
    free_ += out_bytes_;
  }
  std::byte* out = out_;
  for (const Part& part : parts_) {
    outs_.push_back(out);
    out += static_cast<std::size_t>(part.count) * out_size(work_.spans[part.span]);
  }
  // Operand by operand, so that what lies together in a file is read together.
  for (std::size_t k = 0; k < operands; ++k) lay_out_operand(k);
  if (free_ > memory_ + bytes_)
    throw std::logic_error("a load outgrew its slot by " + std::to_string(free_ - (memory_ + bytes_)));
}

std::size_t Slot::fill(const std::vector<Input>& inputs, std::vector<Target>& outputs) {
  lay_out(outputs);
  std::size_t total = 0;
  for (const Read& read : reads_) {
    inputs[static_cast<std::size_t>(read.file)].read_at(read.to, read.bytes, read.offset);
    total += read.bytes;
  }
  return total;
}

Merge Slot::job(std::size_t part) {
  const Span& span = work_.spans[parts_[part].span];
  const auto operand = [&](std::size_t k) {
    return Operand{where_[k * parts_.size() + part], work_.operand(span, static_cast<int>(k)).dtype};
  };
  terms_.clear();
  for (int k = 0; k < span.n_terms; ++k) {
    const auto post = static_cast<std::size_t>(1 + 2 * k);
    terms_.push_back(
        {operand(post), operand(post + 1), work_.terms[static_cast<std::size_t>(span.first_term + k)].alpha});
  }
  return {operand(0),
          terms_.data(),
          terms_.size(),
          outs_[part],
          static_cast<DType>(span.out_dtype),
          static_cast<std::size_t>(parts_[part].count)};
}

std::size_t Slot::drain(std::vector<Target>& outputs) const {
  Target& target = outputs[static_cast<std::size_t>(work_.spans[parts_.front().span].out_file)];
  if (!target.memory) target.file.write_at(out_, out_bytes_, out_offset());
  return out_bytes_;
}

}  // namespace paramdelta::io

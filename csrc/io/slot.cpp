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

}  // namespace

std::size_t Slot::capacity(const Work& work, std::size_t bytes) {
  const std::size_t gaps =
      static_cast<std::size_t>(work.max_operands() + 1) * (kStagger + kReadAlignment) + work.slack();
  return bytes > gaps ? bytes - gaps : 0;
}

std::int64_t Slot::out_offset() const {
  const Span& front = work_.spans[parts_.front().span];
  return front.out_offset + parts_.front().first * static_cast<std::int64_t>(out_size(front));
}

std::size_t Slot::part_bytes(std::size_t part) const {
  return static_cast<std::size_t>(parts_[part].count) * out_size(work_.spans[parts_[part].span]);
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

// What is read past the page cache begins as far into a page as it does in its file, on a page of its own.
std::byte* Slot::place(const Location& at, std::size_t bytes, std::size_t alignment) {
  const bool neighbour = !reads_.empty() && reads_.back().file == at.file &&
                         reads_.back().offset + static_cast<std::int64_t>(reads_.back().bytes) == at.offset &&
                         reads_.back().to + reads_.back().bytes == free_;
  std::byte* const page = placed(free_, alignment > 1 ? alignment : kReadAlignment, 0);
  const std::size_t into = static_cast<std::size_t>(at.offset) % alignment;  // 0 where alignment is 1
  std::byte* const to = neighbour ? free_ : page + into;
  std::byte* const first = neighbour ? free_ : page;
  std::byte* const end = placed(to + bytes, alignment, 0);
  if (end <= memory_ + bytes_) allow(first, static_cast<std::size_t>(end - first));
  read_into(to, at, bytes);
  free_ = to + bytes;
  return to;
}

void Slot::lay_out_operand(const std::vector<Input>& inputs, std::size_t k) {
  free_ += kStagger;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const Part& part = parts_[i];
    const Span& span = work_.spans[part.span];
    const std::byte* to = nullptr;
    Location at{kZeros, 0, DType{}};
    if (static_cast<int>(k) < work_.operands(span)) at = work_.operand(span, static_cast<int>(k));
    if (at.file != kZeros) {
      const std::size_t item = size_of(at.dtype);
      at.offset += part.first * static_cast<std::int64_t>(item);
      const std::size_t bytes = static_cast<std::size_t>(part.count) * item;
      const Input& input = inputs[static_cast<std::size_t>(at.file)];
      const bool copied = Work::is_copy(span);
      if (!copied && (input.on_device || (input.memory && reaches_memory_))) {
        to = input.memory + at.offset;
      } else if (copied && input.alignment() == 1 && !on_device_) {
        read_into(outs_[i], at, bytes);
        to = outs_[i];
      } else {
        to = place(at, bytes, input.alignment());
      }
    }
    where_.push_back(to);
  }
}

void Slot::lay_out(const std::vector<Input>& inputs, std::vector<Target>& outputs) {
  reads_.clear();
  where_.clear();
  outs_.clear();
  std::size_t operands = 1;
  out_bytes_ = 0;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    operands = std::max(operands, static_cast<std::size_t>(work_.operands(work_.spans[parts_[i].span])));
    out_bytes_ += part_bytes(i);
  }
  Target& target = outputs[static_cast<std::size_t>(work_.spans[parts_.front().span].out_file)];
  forbid(memory_, bytes_);
  on_device_ = target.on_device;
  out_ = target.memory ? target.memory + out_offset() : placed(memory_, target.alignment(), out_offset());
  operands_ = free_ = target.memory ? memory_ : out_ + out_bytes_;
  if (!target.memory && free_ <= memory_ + bytes_) allow(out_, out_bytes_);
  std::byte* out = out_;
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    outs_.push_back(out);
    out += part_bytes(i);
  }
  // Operand by operand, so that what lies together in a file is read together.
  for (std::size_t k = 0; k < operands; ++k) lay_out_operand(inputs, k);
  const std::byte* const end = placed(free_, work_.alignment, 0);
  if (end > memory_ + bytes_)
    throw std::logic_error("a load outgrew its slot by " + std::to_string(end - (memory_ + bytes_)));
}

std::size_t Slot::fill(const std::vector<Input>& inputs, std::vector<Target>& outputs) {
  lay_out(inputs, outputs);
  std::size_t total = 0;
  for (const Read& read : reads_) {
    inputs[static_cast<std::size_t>(read.file)].read_around(read.to, read.bytes, read.offset);
    total += read.bytes;
  }
  return total;
}

void Slot::add_job(std::size_t part, std::size_t variant) {
  const Span& span = work_.spans[parts_[part].span];
  const auto operand = [&](std::size_t k) {
    return Operand{where_[k * parts_.size() + part], work_.operand(span, static_cast<int>(k)).dtype};
  };
  const Term* const terms = terms_.data() + terms_.size();
  for (int k = 0; k < span.n_terms; ++k) {
    const auto post = static_cast<std::size_t>(1 + 2 * k);
    const double alpha = work_.alpha(static_cast<std::size_t>(span.first_term + k), variant);
    terms_.push_back({operand(post), operand(post + 1), alpha});
  }
  tensors_.push_back(span.tensor);
  jobs_.push_back({operand(0), terms, static_cast<std::size_t>(span.n_terms), outs_[part],
                   static_cast<DType>(span.out_dtype), static_cast<std::size_t>(parts_[part].count)});
}

StageBatch Slot::batch(std::size_t variant) {
  tensors_.clear();
  jobs_.clear();
  terms_.clear();
  std::size_t terms = 0;
  for (const Part& part : parts_) terms += static_cast<std::size_t>(work_.spans[part.span].n_terms);
  terms_.reserve(terms);  // jobs point into it
  for (std::size_t i = 0; i < parts_.size(); ++i)
    if (!Work::is_copy(work_.spans[parts_[i].span])) add_job(i, variant);
  return {{operands_, static_cast<std::size_t>(free_ - operands_), variant != 0},
          out_,
          out_bytes_,
          on_device_,
          jobs_.data(),
          tensors_.data(),
          jobs_.size()};
}

// What a copy reads from the literals of the first variant, from those of another.
void Slot::copy_own(const std::vector<Input>& inputs, std::size_t part, std::size_t variant) {
  const Location at = work_.operand(work_.spans[parts_[part].span], 0);
  const std::int64_t first = parts_[part].first * static_cast<std::int64_t>(size_of(at.dtype));
  inputs[work_.input_for(at.file, variant)].read_at(outs_[part], part_bytes(part), at.offset + first);
}

std::size_t Slot::drain(std::vector<Target>& outputs, Checksums& checksums, std::size_t variant) const {
  const std::int32_t file = work_.output_for(work_.spans[parts_.front().span].out_file, variant, outputs.size());
  Target& target = outputs[static_cast<std::size_t>(file)];
  checksums.add(file, out_offset(), out_, out_bytes_);
  if (!target.memory) target.write_at(out_, out_bytes_, out_offset());
  return out_bytes_;
}

}  // namespace paramdelta::io

// A slot: a fixed piece of memory that carries one load from read through compute to write.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

#include "core/stage.hpp"
#include "io/checksums.hpp"
#include "io/cursor.hpp"
#include "io/file.hpp"

namespace paramdelta::io {

class Slot {
 public:
  // `memory` (`bytes` long, page-aligned) belongs to the caller and outlives the slot. `reaches_memory`: operands in
  // host memory of the caller's stay where they are (Stage::reaches_memory).
  Slot(const Work& work, std::byte* memory, std::size_t bytes, bool reaches_memory)
      : work_(work), memory_(memory), bytes_(bytes), reaches_memory_(reaches_memory) {}

  // Bytes of a slot that loads may use: the rest keeps the regions from lying at equal offsets within their pages.
  static std::size_t capacity(const Work& work, std::size_t bytes);

  std::vector<Part>& parts() { return parts_; }

  // Lays the load out and reads its operands. Returns the bytes read.
  std::size_t fill(const std::vector<Input>& inputs, std::vector<Target>& outputs);
  // The parts of a variant that have arithmetic; jobs and terms are the slot's, until the next call. Variants are to
  // come one after the other, from the first.
  StageBatch batch(std::size_t variant);
  // Copies the parts that have none, write(to, from, bytes) into memory of a device. What was copied for the first
  // variant is there for the others.
  template <class Write>
  void copy(const std::vector<Input>& inputs, std::size_t variant, Write&& write) {
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const Span& span = work_.spans[parts_[i].span];
      if (!Work::is_copy(span)) continue;
      if (variant != 0 && work_.is_own(span.new_file)) copy_own(inputs, i, variant);
      if (variant != 0 || where_[i] == outs_[i]) continue;
      if (on_device_)
        write(outs_[i], where_[i], part_bytes(i));
      else
        std::memcpy(outs_[i], where_[i], part_bytes(i));
    }
  }
  // Writes the output extent as it is at the time to a variant's file, and has it summed. Returns its bytes.
  std::size_t drain(std::vector<Target>& outputs, Checksums& checksums, std::size_t variant) const;

 private:
  struct Read {
    std::int32_t file;
    std::int64_t offset;
    std::size_t bytes;
    std::byte* to;
  };
  void lay_out(const std::vector<Input>& inputs, std::vector<Target>& outputs);
  void lay_out_operand(const std::vector<Input>& inputs, std::size_t k);
  std::byte* place(const Location& at, std::size_t bytes, std::size_t alignment);
  void read_into(std::byte* to, const Location& from, std::size_t bytes);
  std::int64_t out_offset() const;
  std::size_t part_bytes(std::size_t part) const;  // of output
  void add_job(std::size_t part, std::size_t variant);
  void copy_own(const std::vector<Input>& inputs, std::size_t part, std::size_t variant);

  const Work& work_;
  std::byte* const memory_;
  const std::size_t bytes_;
  const bool reaches_memory_;
  std::byte* operands_ = nullptr;  // where they begin; they end at free_
  std::byte* free_ = nullptr;
  std::vector<Part> parts_;
  std::vector<Read> reads_;
  std::vector<const std::byte*> where_;  // operand k of part i at [k · parts + i]; null for zeros
  std::vector<std::byte*> outs_;         // output of part i
  std::byte* out_ = nullptr;
  std::size_t out_bytes_ = 0;
  bool on_device_ = false;  // out_ is
  std::vector<std::int32_t> tensors_;
  std::vector<Merge> jobs_;
  std::vector<Term> terms_;
};

}  // namespace paramdelta::io

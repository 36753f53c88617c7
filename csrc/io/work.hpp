// The work the engine is given: spans of output elements and the terms they add up, as plain columns. The layouts are
// those of SPAN and TERM in paramdelta/plan/work.py; the binding compares the item sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtypes.hpp"

namespace paramdelta::io {

inline constexpr std::int32_t kZeros = -1;  // a file number that stands for an operand of zeros

struct Span {
  std::int64_t out_offset;
  std::int64_t count;
  std::int64_t new_offset;
  std::int32_t tensor;
  std::int32_t out_file;
  std::int32_t new_file;
  std::int32_t first_term;
  std::int32_t n_terms;
  std::uint8_t out_dtype;
  std::uint8_t new_dtype;
  std::uint8_t pad[2];
};
static_assert(sizeof(Span) == 48);

struct TermRef {
  double alpha;
  std::int64_t post_offset;
  std::int64_t base_offset;
  std::int32_t post_file;
  std::int32_t base_file;
  std::uint8_t post_dtype;
  std::uint8_t base_dtype;
  std::uint8_t pad[6];
};
static_assert(sizeof(TermRef) == 40);

// Where one operand of a span lies on disk.
struct Location {
  std::int32_t file;
  std::int64_t offset;
  DType dtype;
};

// `tensors` is the number of output tensors: spans count NaN, Inf and overflow into the one they name.
struct Work {
  std::vector<Span> spans;
  std::vector<TermRef> terms;
  std::size_t tensors = 0;

  // The operands of a span in a fixed order: new_base, then post and base of each term.
  int operands(const Span& span) const { return 1 + 2 * span.n_terms; }
  Location operand(const Span& span, int index) const {
    if (index == 0) return {span.new_file, span.new_offset, static_cast<DType>(span.new_dtype)};
    const TermRef& term = terms[static_cast<std::size_t>(span.first_term + (index - 1) / 2)];
    return index % 2 ? Location{term.post_file, term.post_offset, static_cast<DType>(term.post_dtype)}
                     : Location{term.base_file, term.base_offset, static_cast<DType>(term.base_dtype)};
  }
  // True for runs of bytes that are carried over as they are: no terms, and a type without arithmetic.
  static bool is_copy(const Span& span) { return !info(static_cast<DType>(span.out_dtype)).merges; }

  int max_operands() const;

  // Throws std::invalid_argument where a span or term refers to a file, tensor, dtype or range that does not exist,
  // or where spans of one output file overlap or are out of order. The sizes are in bytes, one per file.
  void validate(const std::vector<std::int64_t>& input_sizes, const std::vector<std::int64_t>& output_sizes) const;
};

}  // namespace paramdelta::io

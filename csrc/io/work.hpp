// The work the engine is given, as plain columns: spans of output elements and the terms they add up; and regions, the
// rectangles of quantised matrices, with the views of the files they are made of. The layouts are those of
// paramdelta/plan/work.py; the binding compares the item sizes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtypes.hpp"
#include "core/scaled.hpp"
#include "io/checksums.hpp"

namespace paramdelta::io {

inline constexpr std::int32_t kZeros = -1;   // a file number that stands for an operand of zeros
inline constexpr std::int32_t kAbsent = -1;  // and one for a plane that is not there, or an output nobody wants

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

// A matrix in files: element (r, c) of its codes lies at offset + r · row_stride + c · col_stride (bytes; for nibbles,
// col_stride is 1 and counts pairs). Grids of scales likewise, by their own rows and columns. See Scales in
// core/scaled.hpp for the grid.
struct View {
  std::int64_t offset, row_stride, col_stride;
  std::int64_t scale_offset, scale_row_stride, scale_col_stride;
  std::int64_t zero_offset, zero_row_stride;  // zero points: 32-bit words, columns next to each other
  std::int64_t second_offset;
  std::int32_t file, scale_file, zero_file, second_file;
  std::uint32_t grid_rows, grid_cols, row_phase, col_phase;
  std::uint8_t codec, scale_dtype, second;
  std::uint8_t pad[5];
};
static_assert(sizeof(View) == 112);

// rows × cols elements of an output matrix, whole units of its grid, of which rows first_row … end_row − 1 are wanted
// (from the start of a unit to the end of one). Output codes: row r at out_offset + r · out_pitch.
// `recipe` < 0: plain output of out_dtype. `given_file`, `second_file`: where the binary32 scale of the whole tensor
// lies that another pass found. `unit`: where a measuring region adds up what it finds.
struct Region {
  std::int64_t out_offset, out_pitch, rows, cols, first_row, end_row;
  std::int64_t scale_out_offset, scale_out_row_stride, scale_out_col_stride;
  std::int64_t given_offset, second_offset;
  std::int32_t tensor, out_file, scale_out_file, given_file, second_file;
  std::int32_t recipe, new_view, first_term, n_terms, unit;
  std::uint32_t grid_rows, grid_cols;
  std::uint8_t out_dtype, keep, measure;
  std::uint8_t pad[5];
};
static_assert(sizeof(Region) == 144);

struct RegionTerm {
  double alpha;
  std::int32_t post_view, base_view;
};
static_assert(sizeof(RegionTerm) == 16);

struct RecipeRow {
  float largest, floor, zero;
  std::uint8_t codec, scale_dtype, rule, reciprocal, values_bf16;
  std::uint8_t pad[3];
};
static_assert(sizeof(RecipeRow) == 20);

// Where one operand of a span lies on disk.
struct Location {
  std::int32_t file;
  std::int64_t offset;
  DType dtype;
};

// Rows (or columns) of a grid that `count` elements touch, the first of them `phase` elements into its block.
constexpr std::int64_t grid_count(std::int64_t count, std::uint32_t phase, std::uint32_t block) {
  return block == 0 || count == 0 ? (count > 0) : (count + phase - 1) / block + 1;
}

// `tensors` is the number of output tensors: spans count NaN, Inf and overflow into the one they name.
//
// Variants are the same spans and regions with other alphas. Operands are read once for all of them; each has outputs
// of its own. Of F output files, T tensors and U units, variant v writes file v · F + f, counts and sums up tensor
// v · T + t, and measures unit v · U + u. Columns speak of variant 0.
struct Work {
  std::vector<Span> spans;
  std::vector<TermRef> terms;
  std::size_t tensors = 0;
  std::vector<Region> regions;
  std::vector<RegionTerm> region_terms;
  std::vector<View> views;
  std::vector<RecipeRow> recipes;
  std::vector<Extent> extents;  // of the tensors whose checksums are wanted
  std::size_t units = 0;
  std::size_t variants = 1;
  std::vector<double> term_alphas;    // of the variants behind the first: of term t in v at t · (variants − 1) + v − 1
  std::vector<double> region_alphas;  // of region terms, likewise
  std::int32_t own_input = kAbsent;   // the first of `variants` inputs, of which each variant reads its own: literals
  std::size_t alignment = 1;          // the largest of the files' (File::alignment)

  // Bytes of a slot that a direct transfer may take beyond those that are wanted: to begin on a page, and the rest of
  // its first and last one.
  std::size_t slack() const { return alignment > 1 ? 3 * alignment : 0; }

  // The operands of a span in a fixed order: new_base, then post and base of each term.
  int operands(const Span& span) const { return 1 + 2 * span.n_terms; }
  Location operand(const Span& span, int index) const {
    if (index == 0) return {span.new_file, span.new_offset, static_cast<DType>(span.new_dtype)};
    const TermRef& term = terms[static_cast<std::size_t>(span.first_term + (index - 1) / 2)];
    return index % 2 ? Location{term.post_file, term.post_offset, static_cast<DType>(term.post_dtype)}
                     : Location{term.base_file, term.base_offset, static_cast<DType>(term.base_dtype)};
  }
  double alpha(std::size_t term, std::size_t variant) const {
    return variant == 0 ? terms[term].alpha : term_alphas[term * (variants - 1) + variant - 1];
  }
  double region_alpha(std::size_t term, std::size_t variant) const {
    return variant == 0 ? region_terms[term].alpha : region_alphas[term * (variants - 1) + variant - 1];
  }
  bool is_own(std::int32_t file) const { return file >= 0 && file == own_input; }
  // The number of an input, or of an output, for one of the variants.
  std::size_t input_for(std::int32_t file, std::size_t variant) const {
    return static_cast<std::size_t>(file) + (is_own(file) ? variant : 0);
  }
  std::int32_t output_for(std::int32_t file, std::size_t variant, std::size_t outputs) const {
    return file + static_cast<std::int32_t>(variant * (outputs / variants));
  }
  // True for runs of bytes that are carried over as they are: no terms, and a type without arithmetic.
  static bool is_copy(const Span& span) { return !info(static_cast<DType>(span.out_dtype)).merges; }

  int max_operands() const;

  // Bytes of `cols` output elements of a region.
  std::int64_t out_bytes(const Region& region, std::int64_t cols) const {
    if (region.recipe < 0) return cols * static_cast<std::int64_t>(size_of(static_cast<DType>(region.out_dtype)));
    const auto codec = static_cast<Codec>(recipes[static_cast<std::size_t>(region.recipe)].codec);
    return static_cast<std::int64_t>(bytes_of(codec, static_cast<std::size_t>(cols)));
  }

  // Throws std::invalid_argument where a span or term refers to a file, tensor, dtype or range that does not exist,
  // or where spans of one output file overlap or are out of order, or where the files of variants differ in size. The
  // sizes are in bytes, one per file.
  void validate(const std::vector<std::int64_t>& input_sizes, const std::vector<std::int64_t>& output_sizes) const;

 private:
  void validate_variants(const std::vector<std::int64_t>& inputs, const std::vector<std::int64_t>& outputs) const;
  void validate_spans(const std::vector<std::int64_t>& inputs, const std::vector<std::int64_t>& outputs) const;
  void validate_regions(const std::vector<std::int64_t>& inputs, const std::vector<std::int64_t>& outputs) const;
};

}  // namespace paramdelta::io

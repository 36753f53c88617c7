// Checks the regions of quantised matrices once, before a worker starts, so that no worker has to.
#include <cmath>
#include <stdexcept>

#include "io/rectangle.hpp"
#include "io/work.hpp"

namespace paramdelta::io {
namespace {

// No matrix has more elements along one side; with it, no product or sum below can overflow.
constexpr std::int64_t kMost = std::int64_t{1} << 46;

[[noreturn]] void reject(const char* what, std::size_t index, const char* problem) {
  throw std::invalid_argument(std::string(what) + " " + std::to_string(index) + ": " + problem);
}

bool in_range(std::int64_t value, std::int64_t most) { return value >= 0 && value <= most; }

// Whether a rectangle of items lies within `size` bytes, and never backwards.
bool fits(std::int64_t offset, std::int64_t rows, std::int64_t row_stride, std::int64_t cols, std::int64_t col_stride,
          std::int64_t item, std::int64_t size) {
  if (rows == 0 || cols == 0) return true;
  if (!in_range(offset, kMost) || !in_range(row_stride, kMost) || !in_range(col_stride, kMost)) return false;
  __extension__ using Wide = __int128;
  return Wide{rows - 1} * row_stride + Wide{cols - 1} * col_stride + offset + item <= size;
}

bool is_scale(std::uint8_t code) {
  if (code >= kDTypeCount) return false;
  const auto dtype = static_cast<DType>(code);
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16 || dtype == DType::f8_e8m0 ||
         dtype == DType::f8_e4m3;
}

class Checker {
 public:
  Checker(const Work& work, const std::vector<std::int64_t>& inputs, const std::vector<std::int64_t>& outputs)
      : work_(work), inputs_(inputs), outputs_(outputs) {}

  void check(std::size_t index) {
    index_ = index;
    const Region& region = work_.regions[index];
    require(in_range(region.rows, kMost) && in_range(region.cols, kMost), "rows or cols out of range");
    require(region.cols == 0 || region.rows <= kMost / region.cols, "more elements than any tensor has");
    require(in_range(region.tensor, static_cast<std::int64_t>(work_.tensors) - 1), "tensor number out of range");
    if (region.recipe >= 0)
      check_recipe(region);
    else
      require(region.out_dtype < kMergeDTypeCount, "plain output of a type without arithmetic");
    require(in_range(region.first_row, region.end_row) && region.end_row <= region.rows, "wanted rows out of range");
    const std::int64_t unit = unit_of(work_, region).rows;
    require(
        unit == 0 || (region.first_row % unit == 0 && (region.end_row % unit == 0 || region.end_row == region.rows)),
        "wanted rows that are no whole units");
    if (region.measure) require(in_range(region.unit, static_cast<std::int64_t>(work_.units) - 1), "unit out of range");
    check_output(region);
    check_view(region, region.new_view);
    require(!keeps(region) || same_grid(region, work_.views[static_cast<std::size_t>(region.new_view)]),
            "keeps scales of another grid");
    require(region.first_term >= 0 && region.n_terms >= 0 &&
                static_cast<std::size_t>(region.first_term) + static_cast<std::size_t>(region.n_terms) <=
                    work_.region_terms.size(),
            "terms out of range");
    for (std::int32_t t = 0; t < region.n_terms; ++t) {
      const RegionTerm& term = work_.region_terms[static_cast<std::size_t>(region.first_term + t)];
      require(std::isfinite(term.alpha), "alpha is not finite");
      check_view(region, term.post_view);
      check_view(region, term.base_view);
    }
  }

 private:
  void require(bool condition, const char* problem) const {
    if (!condition) reject("region", index_, problem);
  }

  std::int64_t size_of_input(std::int32_t file) const {
    require(in_range(file, static_cast<std::int64_t>(inputs_.size()) - 1), "input file number out of range");
    return inputs_[static_cast<std::size_t>(file)];
  }

  // Whether units may keep the scales of new_base, which are then found by the number of the unit.
  bool keeps(const Region& region) const {
    const View& view = work_.views[static_cast<std::size_t>(region.new_view)];
    return region.recipe >= 0 && region.keep && view.file != kZeros && view.scale_file != kAbsent;
  }

  static bool same_grid(const Region& region, const View& view) {
    const auto extent = [](std::uint32_t block, std::int64_t whole) {
      return block == 0 || block > whole ? whole : std::int64_t{block};
    };
    return extent(view.grid_rows, region.rows) == extent(region.grid_rows, region.rows) &&
           extent(view.grid_cols, region.cols) == extent(region.grid_cols, region.cols) &&
           (view.grid_rows == 0 || view.row_phase == 0) && (view.grid_cols == 0 || view.col_phase == 0);
  }

  void check_recipe(const Region& region) const {
    require(region.recipe < static_cast<std::int64_t>(work_.recipes.size()), "recipe out of range");
    const RecipeRow& recipe = work_.recipes[static_cast<std::size_t>(region.recipe)];
    const auto codec = static_cast<Codec>(recipe.codec);
    require(codec == Codec::f8_e4m3 || codec == Codec::f4 || codec == Codec::i4, "a recipe for codes it cannot write");
    require(is_scale(recipe.scale_dtype), "a recipe with scales of another type");
    require(recipe.rule <= static_cast<std::uint8_t>(ScaleRule::nv_divide), "a recipe with an unknown rule");
    require(bits_of(codec) == 8 || region.cols % 2 == 0, "an odd number of nibbles in a row");
    require(bits_of(codec) == 8 || region.grid_cols % 2 == 0, "units that end within a byte");
  }

  void check_output(const Region& region) const {
    if (region.out_file != kAbsent && !region.measure) {
      require(in_range(region.out_file, static_cast<std::int64_t>(outputs_.size()) - 1), "output file out of range");
      const std::int64_t item = work_.out_bytes(region, region.cols);
      require(fits(region.out_offset, region.rows, region.out_pitch, 1, 0, item,
                   outputs_[static_cast<std::size_t>(region.out_file)]),
              "does not fit its output file");
    }
    if (region.recipe < 0 || region.measure) return;
    if (region.given_file != kAbsent)
      require(fits(region.given_offset, 1, 0, 1, 0, 4, size_of_input(region.given_file)), "a given scale out of range");
    if (region.second_file != kAbsent)
      require(fits(region.second_offset, 1, 0, 1, 0, 4, size_of_input(region.second_file)), "a scale out of range");
    if (region.scale_out_file == kAbsent) return;
    require(in_range(region.scale_out_file, static_cast<std::int64_t>(outputs_.size()) - 1), "scale file out of range");
    const auto item = static_cast<std::int64_t>(
        size_of(static_cast<DType>(work_.recipes[static_cast<std::size_t>(region.recipe)].scale_dtype)));
    require(fits(region.scale_out_offset, grid_count(region.rows, 0, region.grid_rows), region.scale_out_row_stride,
                 grid_count(region.cols, 0, region.grid_cols), region.scale_out_col_stride, item,
                 outputs_[static_cast<std::size_t>(region.scale_out_file)]),
            "scales do not fit their output file");
  }

  void check_view(const Region& region, std::int32_t number) const {
    require(in_range(number, static_cast<std::int64_t>(work_.views.size()) - 1), "view out of range");
    const View& view = work_.views[static_cast<std::size_t>(number)];
    require(view.codec < kCodecCount, "unknown codec");
    if (view.file == kZeros) return;
    const int bits = bits_of(static_cast<Codec>(view.codec));
    const std::int64_t item = bits == 4 ? 1 : bits / 8;
    const bool turned = view.col_stride != item;
    const std::int64_t rows = bits == 4 && turned ? (region.rows + 1) / 2 : region.rows;
    const std::int64_t cols = bits == 4 && !turned ? (region.cols + 1) / 2 : region.cols;
    require(!turned || view.row_stride == item, "a view whose elements lie apart");
    require(fits(view.offset, rows, view.row_stride, cols, view.col_stride, item, size_of_input(view.file)),
            "operand reaches beyond the end of its file");
    if (view.scale_file != kAbsent) {
      require(is_scale(view.scale_dtype), "scales of another type");
      require(view.row_phase < (1u << 30) && view.col_phase < (1u << 30), "phase out of range");
      const auto scale = static_cast<std::int64_t>(size_of(static_cast<DType>(view.scale_dtype)));
      require(fits(view.scale_offset, grid_count(region.rows, view.row_phase, view.grid_rows), view.scale_row_stride,
                   grid_count(region.cols, view.col_phase, view.grid_cols), view.scale_col_stride, scale,
                   size_of_input(view.scale_file)),
              "scales reach beyond the end of their file");
    }
    require(view.second <= static_cast<std::uint8_t>(Second::divide), "unknown second level");
    if (view.second_file != kAbsent)
      require(fits(view.second_offset, 1, 0, 1, 0, 4, size_of_input(view.second_file)), "a second scale out of range");
    if (view.zero_file != kAbsent)
      require(fits(view.zero_offset, (region.rows + view.row_phase + 7) / 8, view.zero_row_stride,
                   grid_count(region.cols, view.col_phase, view.grid_cols), 4, 4, size_of_input(view.zero_file)),
              "zero points reach beyond the end of their file");
  }

  const Work& work_;
  const std::vector<std::int64_t>& inputs_;
  const std::vector<std::int64_t>& outputs_;
  std::size_t index_ = 0;
};

}  // namespace

void Work::validate_regions(const std::vector<std::int64_t>& inputs, const std::vector<std::int64_t>& outputs) const {
  Checker checker(*this, inputs, outputs);
  for (std::size_t i = 0; i < regions.size(); ++i) checker.check(i);
}

}  // namespace paramdelta::io

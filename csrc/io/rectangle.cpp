// Carries pieces of quantised matrices: reads the planes of their operands (planes.hpp), and writes codes and scales.
#include "io/rectangle.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "io/guard.hpp"
#include "io/planes.hpp"

namespace paramdelta::io {

struct Rectangle::Plane {
  const std::byte* data = nullptr;
  std::ptrdiff_t pitch = 0;  // bytes
};

namespace {

constexpr std::size_t kLine = 64;
// Keeps planes of equal length from starting at equal offsets within their pages (see slot.cpp).
constexpr std::size_t kStagger = 1024 + kLine;

const RecipeRow* recipe_of(const Work& work, const Region& region) {
  return region.recipe < 0 ? nullptr : &work.recipes[static_cast<std::size_t>(region.recipe)];
}

std::size_t scale_item(const RecipeRow& recipe) { return size_of(static_cast<DType>(recipe.scale_dtype)); }

}  // namespace

Unit unit_of(const Work& work, const Region& region) {
  const RecipeRow* recipe = recipe_of(work, region);
  if (recipe == nullptr || region.measure || region.given_file != kAbsent)
    return {1, std::min<std::int64_t>(region.cols, 256)};
  return {region.grid_rows ? std::min<std::int64_t>(region.grid_rows, region.rows) : region.rows,
          region.grid_cols ? std::min<std::int64_t>(region.grid_cols, region.cols) : region.cols};
}

std::size_t Rectangle::bytes_for(const Work& work, const Region& region, std::int64_t rows, std::int64_t cols) {
  const std::size_t gap = kStagger + work.slack();
  const auto view = [&](std::int32_t number) {
    return memory_for(work.views[static_cast<std::size_t>(number)], rows, cols, gap);
  };
  std::size_t bytes = view(region.new_view) + 2 * gap;
  for (std::int32_t t = 0; t < region.n_terms; ++t) {
    const RegionTerm& term = work.region_terms[static_cast<std::size_t>(region.first_term + t)];
    bytes += view(term.post_view) + view(term.base_view);
  }
  if (region.measure) return bytes;
  bytes += static_cast<std::size_t>(rows * work.out_bytes(region, cols)) + gap;
  if (const RecipeRow* recipe = recipe_of(work, region))
    bytes += static_cast<std::size_t>(grid_count(rows, 0, region.grid_rows) * grid_count(cols, 0, region.grid_cols)) *
                 scale_item(*recipe) +
             kStagger;
  return bytes;
}

std::byte* Rectangle::take(std::size_t bytes) {
  const auto at = reinterpret_cast<std::uintptr_t>(free_) + kStagger;
  std::byte* to = free_ + kStagger - at % kLine;
  end_at(to + bytes);
  allow(to, bytes);
  return to;
}

void Rectangle::end_at(std::byte* end) {
  free_ = end;
  if (free_ > memory_ + bytes_)
    throw std::logic_error("a piece outgrew its slot by " + std::to_string(free_ - (memory_ + bytes_)));
}

// As take, as far into a page as `offset` is, with room for the rest of the first and the last page.
std::byte* Rectangle::take_placed(std::size_t bytes, std::size_t alignment, std::int64_t offset) {
  if (alignment == 1) return take(bytes);
  const std::size_t into = static_cast<std::size_t>(offset) % alignment;
  std::byte* page = placed(free_, alignment, 0);
  end_at(placed(page + into + bytes, alignment, 0));
  allow(page, static_cast<std::size_t>(free_ - page));
  return page + into;
}

Rectangle::Plane Rectangle::load_lines(const std::vector<Input>& inputs, const Strided& from, std::int64_t lines,
                                       std::int64_t length, std::int64_t stride) {
  const Input& input = inputs[static_cast<std::size_t>(from.file)];
  const bool once = in_one(length, stride);
  const std::int64_t pitch = once ? stride : length;
  const auto total = static_cast<std::size_t>((lines - 1) * pitch + length);
  std::byte* to;
  if (once) {
    to = take_placed(total, input.alignment(), from.offset);
    input.read_around(to, total, from.offset);
  } else {
    to = take(total);
    for (std::int64_t line = 0; line < lines; ++line)
      input.read_at(to + line * pitch, static_cast<std::size_t>(length), from.offset + line * stride);
  }
  read_ += total;
  return {to, static_cast<std::ptrdiff_t>(pitch)};
}

Rectangle::Plane Rectangle::load(const std::vector<Input>& inputs, const Strided& from) {
  const auto item = static_cast<std::int64_t>(from.item);
  if (!by_columns(from)) return load_lines(inputs, from, from.rows, from.cols * item, from.row_stride);
  const Plane stored = load_lines(inputs, from, from.cols, from.rows * item, from.col_stride);
  std::byte* rows = take(static_cast<std::size_t>(from.rows * from.cols) * from.item);
  turn(stored.data, stored.pitch, rows, from.rows, from.cols, from.item);
  return {rows, static_cast<std::ptrdiff_t>(from.cols * item)};
}

Rectangle::Plane Rectangle::load_turned_nibbles(const std::vector<Input>& inputs, const View& view) {
  const Strided from = codes_of(view, piece_.row, piece_.rows, piece_.col, piece_.cols);
  const Plane stored = load_lines(inputs, from, from.cols, from.rows, from.col_stride);
  const std::int64_t pitch = (piece_.cols + 1) / 2;
  std::byte* rows = take(static_cast<std::size_t>(piece_.rows * pitch));
  turn_nibbles(stored.data, stored.pitch, rows, piece_.rows, piece_.cols, piece_.row % 2);
  return {rows, static_cast<std::ptrdiff_t>(pitch)};
}

float Rectangle::load_float(const Input& input, std::int64_t offset) {
  float value;
  input.read_at(&value, sizeof(value), offset);
  read_ += sizeof(value);
  return value;
}

void Rectangle::load_scales(const std::vector<Input>& inputs, const View& view, Scales& scales) {
  const Strided from = scales_of(view, piece_.row, piece_.rows, piece_.col, piece_.cols);
  const Plane plane = load(inputs, from);
  scales.data = plane.data;
  scales.dtype = static_cast<DType>(view.scale_dtype);
  scales.pitch = plane.pitch / static_cast<std::ptrdiff_t>(from.item);
  scales.rows = view.grid_rows;
  scales.cols = view.grid_cols;
  scales.row_phase = place_in(piece_.row, view.row_phase, view.grid_rows).phase;
  scales.col_phase = place_in(piece_.col, view.col_phase, view.grid_cols).phase;
  if (view.second_file != kAbsent) {
    scales.second = static_cast<Second>(view.second);
    scales.second_value = load_float(inputs[static_cast<std::size_t>(view.second_file)], view.second_offset);
  }
  if (view.zero_file == kAbsent) return;
  const Plane zeros = load(inputs, zeros_of(view, piece_.row, piece_.rows, piece_.col, piece_.cols));
  scales.zero_points = zeros.data;
  scales.zero_pitch = zeros.pitch / 4;
  scales.zero_phase = static_cast<std::uint32_t>((piece_.row + view.row_phase) % 8);
}

// Rows in memory of the caller's stay where they are, if the stage reaches them.
Rectangle::Plane Rectangle::load_codes(const std::vector<Input>& inputs, const View& view) {
  if (turned_nibbles(view)) return load_turned_nibbles(inputs, view);
  const Strided from = codes_of(view, piece_.row, piece_.rows, piece_.col, piece_.cols);
  const Input& input = inputs[static_cast<std::size_t>(from.file)];
  const bool there = input.on_device ? takes_ : input.memory && stage_->reaches_memory();
  if (!there || by_columns(from)) return load(inputs, from);
  return {input.memory + from.offset, static_cast<std::ptrdiff_t>(from.row_stride)};
}

Matrix Rectangle::load_view(const std::vector<Input>& inputs, std::int32_t number) {
  const View& view = work_.views[static_cast<std::size_t>(number)];
  Matrix matrix;
  matrix.codec = static_cast<Codec>(view.codec);
  if (view.file == kZeros) return matrix;
  const Plane codes = load_codes(inputs, view);
  matrix.data = codes.data;
  matrix.pitch = codes.pitch;
  if (view.scale_file != kAbsent) load_scales(inputs, view, matrix.scales);
  return matrix;
}

std::int64_t Rectangle::out_offset() const {
  const Region& at = region();
  return at.out_offset + piece_.row * at.out_pitch + work_.out_bytes(at, piece_.col);
}

// The scale of the piece's first unit in its output.
std::int64_t Rectangle::scale_offset() const {
  const Region& at = region();
  return at.scale_out_offset + (at.grid_rows ? piece_.row / at.grid_rows : 0) * at.scale_out_row_stride +
         (at.grid_cols ? piece_.col / at.grid_cols : 0) * at.scale_out_col_stride;
}

void Rectangle::prepare_output(const std::vector<Target>& outputs) {
  const Region& at = region();
  const std::int64_t row_bytes = work_.out_bytes(at, piece_.cols);
  const RecipeRow* recipe = recipe_of(work_, at);
  codes_made_there_ = takes_ && at.out_file != kAbsent && outputs[static_cast<std::size_t>(at.out_file)].on_device;
  if (codes_made_there_) {
    job_.out = outputs[static_cast<std::size_t>(at.out_file)].memory + out_offset();
    job_.out_pitch = static_cast<std::ptrdiff_t>(at.out_pitch);
  } else {
    job_.out = take_placed(static_cast<std::size_t>(piece_.rows * row_bytes), work_.alignment, out_offset());
    job_.out_pitch = static_cast<std::ptrdiff_t>(row_bytes);
  }
  job_.out_dtype = static_cast<DType>(at.out_dtype);
  job_.given = at.given_file != kAbsent;
  if (recipe != nullptr) prepare_scales(outputs, *recipe);
}

void Rectangle::prepare_scales(const std::vector<Target>& outputs, const RecipeRow& recipe) {
  const Region& at = region();
  const std::int64_t rows = grid_count(piece_.rows, 0, at.grid_rows), cols = grid_count(piece_.cols, 0, at.grid_cols);
  const auto item = static_cast<std::int64_t>(scale_item(recipe));
  const bool in_rows = (at.scale_out_col_stride == item || cols == 1) && at.scale_out_row_stride % item == 0;
  scales_made_there_ = takes_ && in_rows && !job_.given && at.scale_out_file != kAbsent &&
                       outputs[static_cast<std::size_t>(at.scale_out_file)].on_device;
  if (scales_made_there_) {
    job_.out_scales = outputs[static_cast<std::size_t>(at.scale_out_file)].memory + scale_offset();
    job_.out_scale_pitch = static_cast<std::ptrdiff_t>(rows == 1 ? cols : at.scale_out_row_stride / item);
  } else {
    job_.out_scales = take(static_cast<std::size_t>(rows * cols * item));
    job_.out_scale_pitch = static_cast<std::ptrdiff_t>(cols);
  }
}

std::size_t Rectangle::turn_to(std::size_t variant, const std::vector<Input>& inputs) {
  const Region& at = region();
  variant_ = variant;
  read_ = 0;
  for (std::size_t t = 0; t < terms_.size(); ++t)
    terms_[t].alpha = work_.region_alpha(static_cast<std::size_t>(at.first_term) + t, variant);
  if (at.measure || !job_.quantised) return 0;
  const auto load = [&](std::int32_t file, std::int64_t offset) {
    return load_float(inputs[work_.input_for(file, variant)], offset);
  };
  if (at.second_file != kAbsent) job_.second_value = load(at.second_file, at.second_offset);
  if (job_.given) job_.given_scale = load(at.given_file, at.given_offset);
  return read_;
}

std::size_t Rectangle::fill(const Piece& piece, const std::vector<Input>& inputs, const std::vector<Target>& outputs,
                            const Stage& stage) {
  piece_ = piece;
  stage_ = &stage;
  free_ = memory_;
  forbid(memory_, bytes_);
  read_ = 0;
  const Region& at = region();
  job_ = {};
  job_.rows = static_cast<std::size_t>(piece.rows);
  job_.cols = static_cast<std::size_t>(piece.cols);
  job_.grid_rows = at.grid_rows;
  job_.grid_cols = at.grid_cols;
  job_.keep = static_cast<Keep>(at.keep);
  if (const RecipeRow* row = recipe_of(work_, at)) {
    job_.quantised = true;
    job_.recipe = {static_cast<Codec>(row->codec),
                   static_cast<DType>(row->scale_dtype),
                   static_cast<ScaleRule>(row->rule),
                   row->reciprocal != 0,
                   row->values_bf16 != 0,
                   row->largest,
                   row->floor,
                   row->zero};
  }
  job_.n_terms = static_cast<std::size_t>(at.n_terms);
  takes_ = stage.has_memory() && stage.takes(job_);
  codes_made_there_ = scales_made_there_ = false;
  if (!at.measure) prepare_output(outputs);
  operands_ = free_;
  terms_.clear();
  for (std::int32_t t = 0; t < at.n_terms; ++t) {
    const RegionTerm& term = work_.region_terms[static_cast<std::size_t>(at.first_term + t)];
    terms_.push_back({load_view(inputs, term.post_view), load_view(inputs, term.base_view), term.alpha});
  }
  job_.new_base = load_view(inputs, at.new_view);
  job_.terms = terms_.data();
  return read_;
}

std::size_t Rectangle::drain(const std::vector<Target>& outputs, Checksums& checksums, const Write& to_device) const {
  const Region& at = region();
  if (at.measure) return 0;
  std::size_t written = 0;
  const auto write = [&](std::int32_t file, const void* data, std::int64_t offset, std::int64_t rows,
                         std::int64_t stride, std::int64_t length) {
    file = work_.output_for(file, variant_, outputs.size());
    const Target& target = outputs[static_cast<std::size_t>(file)];
    const auto* from = static_cast<const std::byte*>(data);
    written += static_cast<std::size_t>(rows * length);
    if (target.on_device && (data == job_.out ? codes_made_there_ : scales_made_there_)) return;
    checksums.add_rows(file, offset, from, rows, length, stride);
    const std::int64_t lines = stride == length ? 1 : rows, bytes = stride == length ? rows * length : length;
    for (std::int64_t r = 0; r < lines; ++r) {
      const auto count = static_cast<std::size_t>(bytes);
      if (target.on_device)
        to_device(target.memory + offset + r * stride, from + r * length, count);
      else
        target.write_at(from + r * length, count, offset + r * stride);
    }
  };
  if (at.out_file != kAbsent)
    write(at.out_file, job_.out, out_offset(), piece_.rows, at.out_pitch, work_.out_bytes(at, piece_.cols));
  const RecipeRow* recipe = recipe_of(work_, at);
  if (recipe == nullptr || at.scale_out_file == kAbsent || job_.given) return written;
  const auto item = static_cast<std::int64_t>(scale_item(*recipe));
  const std::int64_t rows = grid_count(piece_.rows, 0, at.grid_rows), cols = grid_count(piece_.cols, 0, at.grid_cols);
  const std::int64_t offset = scale_offset();
  if (at.scale_out_col_stride == item || cols == 1)
    write(at.scale_out_file, job_.out_scales, offset, rows, at.scale_out_row_stride, cols * item);
  else
    for (std::int64_t r = 0; r < rows; ++r)
      write(at.scale_out_file, static_cast<const std::byte*>(job_.out_scales) + r * cols * item,
            offset + r * at.scale_out_row_stride, cols, at.scale_out_col_stride, item);
  return written;
}

}  // namespace paramdelta::io

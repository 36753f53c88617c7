// The geometry of planes.hpp.
#include "io/planes.hpp"

#include <algorithm>
#include <cstring>

namespace paramdelta::io {
namespace {

std::size_t bytes_read(std::int64_t lines, std::int64_t length, std::int64_t stride) {
  return static_cast<std::size_t>(lines * (in_one(length, stride) ? std::max(stride, length) : length));
}

// `gap`: what a plane takes beyond its bytes.
std::size_t memory_of(const Strided& from, std::size_t gap) {
  if (from.rows == 0 || from.cols == 0) return 0;
  const auto item = static_cast<std::int64_t>(from.item);
  const std::size_t packed = static_cast<std::size_t>(from.rows * from.cols) * from.item;
  if (by_columns(from)) return packed + bytes_read(from.cols, from.rows * item, from.col_stride) + 2 * gap;
  return bytes_read(from.rows, from.cols * item, from.row_stride) + gap;
}

}  // namespace

bool by_columns(const Strided& from) {
  return from.cols > 1 && from.col_stride != static_cast<std::int64_t>(from.item);
}

bool in_one(std::int64_t length, std::int64_t stride) { return 4 * stride <= 5 * length; }

bool turned_nibbles(const View& view) { return bits_of(static_cast<Codec>(view.codec)) == 4 && view.col_stride != 1; }

Strided codes_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols) {
  const int bits = bits_of(static_cast<Codec>(view.codec));
  const bool nibbles = bits == 4;
  if (turned_nibbles(view))  // a row is a pair
    return {view.file,
            view.offset + row / 2 * view.row_stride + col * view.col_stride,
            (row % 2 + rows + 1) / 2,
            view.row_stride,
            cols,
            view.col_stride,
            1};
  const std::int64_t first = nibbles ? col / 2 : col;
  return {view.file,
          view.offset + row * view.row_stride + first * view.col_stride,
          rows,
          view.row_stride,
          nibbles ? (cols + 1) / 2 : cols,
          view.col_stride,
          nibbles ? 1 : static_cast<std::size_t>(bits / 8)};
}

Place place_in(std::int64_t at, std::uint32_t phase, std::uint32_t block) {
  if (block == 0) return {0, 0};
  const std::int64_t element = at + phase;
  return {element / block, static_cast<std::uint32_t>(element % block)};
}

Strided scales_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols) {
  const Place r = place_in(row, view.row_phase, view.grid_rows), c = place_in(col, view.col_phase, view.grid_cols);
  return {view.scale_file,
          view.scale_offset + r.block * view.scale_row_stride + c.block * view.scale_col_stride,
          grid_count(rows, r.phase, view.grid_rows),
          view.scale_row_stride,
          grid_count(cols, c.phase, view.grid_cols),
          view.scale_col_stride,
          size_of(static_cast<DType>(view.scale_dtype))};
}

Strided zeros_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols) {
  const std::int64_t first = (row + view.row_phase) / 8;
  const Place c = place_in(col, view.col_phase, view.grid_cols);
  return {view.zero_file,
          view.zero_offset + first * view.zero_row_stride + c.block * 4,
          (row + view.row_phase + rows + 7) / 8 - first,
          view.zero_row_stride,
          grid_count(cols, c.phase, view.grid_cols),
          4,
          4};
}

std::size_t memory_for(const View& view, std::int64_t rows, std::int64_t cols, std::size_t gap) {
  std::size_t bytes = 0;
  if (view.file != kZeros && turned_nibbles(view)) {
    const Strided codes = codes_of(view, 1, rows, 0, cols);
    bytes +=
        bytes_read(cols, codes.rows, codes.col_stride) + static_cast<std::size_t>(rows * ((cols + 1) / 2)) + 2 * gap;
  } else if (view.file != kZeros) {
    bytes += memory_of(codes_of(view, 0, rows, 0, cols), gap);
  }
  // Wherever a piece starts within a block, it touches at most one more.
  if (view.scale_file != kAbsent) {
    Strided scales = scales_of(view, 0, rows, 0, cols);
    scales.rows += 1;
    scales.cols += 1;
    bytes += memory_of(scales, gap);
  }
  if (view.zero_file != kAbsent) {
    Strided zeros = zeros_of(view, 0, rows + 8, 0, cols);
    zeros.cols += 1;
    bytes += memory_of(zeros, gap);
  }
  return bytes;
}

void turn(const std::byte* from, std::int64_t stride, std::byte* to, std::int64_t rows, std::int64_t cols,
          std::size_t item) {
  constexpr std::int64_t kTile = 32;  // of elements: lines of both sides stay in the first-level cache
  for (std::int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (std::int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (std::int64_t c = c0; c < std::min(cols, c0 + kTile); ++c)
        for (std::int64_t r = r0; r < std::min(rows, r0 + kTile); ++r)
          std::memcpy(to + static_cast<std::size_t>(r * cols + c) * item,
                      from + c * stride + r * static_cast<std::int64_t>(item), item);
}

void turn_nibbles(const std::byte* from, std::int64_t stride, std::byte* to, std::int64_t rows, std::int64_t cols,
                  std::int64_t odd) {
  constexpr std::int64_t kTile = 64;
  const std::int64_t pitch = (cols + 1) / 2;
  const auto nibble = [&](std::int64_t r, std::int64_t c) {
    const auto byte = std::to_integer<unsigned>(from[c * stride + (r + odd) / 2]);
    return (r + odd) % 2 ? byte >> 4 : byte & 15u;
  };
  for (std::int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (std::int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (std::int64_t r = r0; r < std::min(rows, r0 + kTile); ++r)
        for (std::int64_t c = c0; c < std::min(cols, c0 + kTile); c += 2)
          to[r * pitch + c / 2] = std::byte(nibble(r, c) | (c + 1 < cols ? nibble(r, c + 1) << 4 : 0u));
}

}  // namespace paramdelta::io

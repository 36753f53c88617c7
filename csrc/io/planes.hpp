// Planes of codes, scales and zero points in files: where the items of a piece of a matrix lie, and what reading them
// takes. Planes are read by rows, in one call where rows follow each other closely; those that are stored the other way
// round are read by columns and turned in memory, so that kernels meet rows only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "io/work.hpp"

namespace paramdelta::io {

// Items of a plane in a file: (r, c) at offset + r · row_stride + c · col_stride.
struct Strided {
  std::int32_t file;
  std::int64_t offset, rows, row_stride, cols, col_stride;
  std::size_t item;
};

// The block that an element lies in, and how far in.
struct Place {
  std::int64_t block;
  std::uint32_t phase;
};
Place place_in(std::int64_t at, std::uint32_t phase, std::uint32_t block);

bool by_columns(const Strided& from);

// Whether lines of `length` bytes, `stride` apart, are read in one call, with the little that lies between them.
bool in_one(std::int64_t length, std::int64_t stride);

// Whether nibbles lie in pairs along the columns of the file's matrix, which are the view's rows.
bool turned_nibbles(const View& view);

// What a piece of a view needs: its codes; its scales; words of zero points, whose rows are counted in elements, eight
// to a word.
Strided codes_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols);
Strided scales_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols);
Strided zeros_of(const View& view, std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t cols);

// Bytes of memory that all planes of rows × cols elements of a view take at most, wherever the piece begins; `gap` is
// what a plane takes beyond its bytes.
std::size_t memory_for(const View& view, std::int64_t rows, std::int64_t cols, std::size_t gap);

// Columns of `stride` bytes each become rows of `cols` items without gaps.
void turn(const std::byte* from, std::int64_t stride, std::byte* to, std::int64_t rows, std::int64_t cols,
          std::size_t item);
// Nibble r of line c becomes nibble c of row r; `odd`: the first is the high half of its byte.
void turn_nibbles(const std::byte* from, std::int64_t stride, std::byte* to, std::int64_t rows, std::int64_t cols,
                  std::int64_t odd);

}  // namespace paramdelta::io

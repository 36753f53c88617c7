// Scratch memory of the loops over quantised matrices: made once per call by scaled.cpp, used by scaled-inl.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/scaled.hpp"

namespace paramdelta::cpu {

// Columns that are worked on at a time, so that their stages stay in L1; the columns of a chunk, which have one scale
// where every grid allows it; and the elements of one unit, or of several side by side, whose merged values are kept
// between finding their scales and making their codes. Larger units are computed twice.
inline constexpr std::size_t kTileCols = 512;
inline constexpr std::size_t kChunk = 16;
inline constexpr std::size_t kWide = 128;  // columns that often have one scale: those of blocks
inline constexpr std::size_t kTileChunks = kTileCols / kChunk;
inline constexpr std::size_t kKept = std::size_t{1} << 16;
inline constexpr std::size_t kNowhere = ~std::size_t{0};

// One operand: the scales of the columns at hand as binary64, and those that its bytes stand for.
struct Plane {
  const Matrix* matrix = nullptr;
  bool bytes = false;                                            // scales are of one byte, looked up in `table`
  bool direct = false;                                           // `scales` holds 2^1016 times what they are
  std::size_t grid_row = kNowhere, first = kNowhere, count = 0;  // of what `scales` holds
  alignas(64) double scales[kTileCols];
  alignas(64) float zeros[kTileCols];  // 8 − zero point
  double table[256];
};

struct ScaledWork {
  Plane new_base;
  alignas(64) float next[kTileCols];
  unsigned char gap0[320];
  alignas(64) float post[kTileCols];
  unsigned char gap1[320];
  alignas(64) float base[kTileCols];
  unsigned char gap2[320];
  alignas(64) double acc[kTileCols];
  unsigned char gap3[320];
  // The largest bits of |x|, and whether a delta is not zero, of each column over the rows of a unit.
  alignas(64) std::uint32_t largest[kTileCols];
  alignas(64) std::uint32_t touched[kTileCols];
  unsigned char gap4[320];
  // What the codes of each chunk or column are made with: x · factor or x / factor. `weight`: the scale relative to
  // the largest one around, for sums over values; `error_weight`, for sums of errors, is 0 where codes are not used.
  alignas(64) float factor[kTileCols];
  alignas(64) float weight[kTileCols];
  alignas(64) float error_weight[kTileCols];
  alignas(64) float error[kChunk];
  alignas(64) float value[kChunk];
  alignas(64) unsigned char out[kTileCols * sizeof(double)];
  unsigned char gap5[320];
  unsigned char padded[kTileCols * sizeof(double) + 320];
  alignas(64) float x[kTileCols];
  unsigned char way[kTileCols];  // of the units side by side: a Way of scaled-inl.hpp

  Plane* terms = nullptr;  // post and base of each term, in turn
  float* kept = nullptr;   // kKept values, and some to spare
  bool by_chunk = false;   // whether each chunk of columns has one scale in every operand
  bool direct = false;     // whether merge_row_e4m3() does all
  bool wide = false;       // and whether each kWide columns have one scale, in operands and output
  bool measure = false;
};

}  // namespace paramdelta::cpu

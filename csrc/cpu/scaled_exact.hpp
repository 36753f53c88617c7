// The literal merge of quantised matrices, element by element from the stored bits: the definition that the loops must
// equal, and their way out where something is not finite.
#pragma once

#include "core/quantise.hpp"
#include "core/scaled.hpp"

namespace paramdelta::cpu {

// Rows [row, row + rows) and columns [col, col + cols) of a region.
struct Region {
  std::size_t row, col, rows, cols;
};

enum class Effect : std::uint8_t { write, measure };

// What a unit becomes. `copied`: codes and scale are new_base's.
struct UnitChoice {
  UnitScale scale;
  bool copied = false;
};

// Whether new_base has a scale for this unit that may be kept, its index in new_base's grid, and the scale.
std::ptrdiff_t scale_index(const Scales& scales, std::size_t row, std::size_t col);
bool keeps(const ScaledMerge& job);

// Decides for the unit that starts at (row, col). `fits`: every round(x / scale kept) is a code; asked of i4 only.
UnitChoice choose(const ScaledMerge& job, std::size_t row, std::size_t col, bool touched, float amax, bool fits);

void write_scale(const ScaledMerge& job, std::size_t row, std::size_t col, const UnitChoice& choice);

// Copies the codes of a region from new_base, whose codec is that of the output.
void copy_codes(const ScaledMerge& job, const Region& region);

// One unit, or with a given scale any region, of quantised output; any region of plain output.
void unit_exact(const ScaledMerge& job, const Region& unit, Effect effect, ScaledResult& result);
void plain_exact(const ScaledMerge& job, const Region& region, Effect effect, ScaledResult& result);

}  // namespace paramdelta::cpu

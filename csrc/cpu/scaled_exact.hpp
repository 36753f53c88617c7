// The literal merge of regions of quantised matrices (core/scaled_literal.hpp, element by element): the way out of the
// loops where something is not finite.
#pragma once

#include "core/scaled_literal.hpp"

namespace paramdelta::cpu {

// Rows [row, row + rows) and columns [col, col + cols) of a region.
struct Region {
  std::size_t row, col, rows, cols;
};

enum class Effect : std::uint8_t { write, measure };

// Copies the codes of a region from new_base, whose codec is that of the output.
void copy_codes(const ScaledMerge& job, const Region& region);

// One unit, or with a given scale any region, of quantised output; any region of plain output.
void unit_exact(const ScaledMerge& job, const Region& unit, Effect effect, ScaledResult& result);
void plain_exact(const ScaledMerge& job, const Region& region, Effect effect, ScaledResult& result);

}  // namespace paramdelta::cpu

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

// Where in its grid the scale of an element is, and where in the output's the scale of the unit that holds it.
std::ptrdiff_t scale_index(const Scales& scales, std::size_t row, std::size_t col);
std::ptrdiff_t unit_index(const ScaledMerge& job, std::size_t row, std::size_t col);

// Whether new_base has scales that may be kept.
bool keeps(const ScaledMerge& job);

// Decides for one unit. `kept` is its scale in new_base, null where none may be kept. `fits`: every round(x / scale
// kept) is a code; asked of i4 only.
inline UnitChoice choose(const ScaledMerge& job, const std::uint32_t* kept, bool touched, float amax, bool fits) {
  const Recipe& recipe = job.recipe;
  if (job.given)
    return {unit_of_stored(recipe, job.second_value, DType::f32, bits_as<std::uint32_t>(job.given_scale)), false};
  if (kept != nullptr) {
    bool holds = !touched;
    const float scale = decode_scale(recipe.scale_dtype, *kept);
    if (touched && scale > 0.0f && scale < __builtin_inff()) {
      const double largest = recipe.codec == Codec::f4 ? 6.0 : 448.0;
      if (recipe.codec == Codec::i4)
        holds = fits;
      else if (recipe.scale_dtype == DType::f8_e8m0 || (recipe.rule == ScaleRule::ceil2 && is_power_of_two(scale)))
        holds = static_cast<double>(amax) <= largest * static_cast<double>(scale);
    }
    if (holds) return {unit_of_stored(recipe, job.second_value, recipe.scale_dtype, *kept), !touched};
  }
  return {unit_of_amax(recipe, job.second_value, amax), false};
}

// Copies the codes of a region from new_base, whose codec is that of the output.
void copy_codes(const ScaledMerge& job, const Region& region);

// One unit, or with a given scale any region, of quantised output; any region of plain output.
void unit_exact(const ScaledMerge& job, const Region& unit, Effect effect, ScaledResult& result);
void plain_exact(const ScaledMerge& job, const Region& region, Effect effect, ScaledResult& result);

}  // namespace paramdelta::cpu

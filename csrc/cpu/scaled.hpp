// The CPU backend's entry for quantised matrices: what core/scaled.hpp describes, for each instruction set present.
#pragma once

#include "core/scaled.hpp"
#include "cpu/merge.hpp"

namespace paramdelta::cpu {

// Both compute the whole region on the calling thread, in the default floating-point mode, and leave terms with
// alpha == 0 out. Every instruction set gives the same codes, scales, counts, amax and touched, and so does every way
// of cutting a region at multiples of whole units. With a given scale nothing is kept. amax is that of quantised output
// only; the sums are 0 where nothing was quantised.
//
// `out` and `out_scales` are memory apart from every operand.
ScaledResult merge_scaled(Isa isa, const ScaledMerge& job);

// The same, but nothing is written, and out, out_scales and the sums are of no account.
ScaledResult measure_scaled(Isa isa, const ScaledMerge& job);

// The same over `threads` threads, cut at multiples of whole rows of units; in one piece where a unit takes all rows.
ScaledResult merge_scaled_parallel(Isa isa, const ScaledMerge& job, int threads);
ScaledResult measure_scaled_parallel(Isa isa, const ScaledMerge& job, int threads);

// Rows [first, first + count) of a region; `first` is a multiple of the rows of a unit of the output. `terms` must
// outlive the result.
ScaledMerge rows_of(const ScaledMerge& job, std::size_t first, std::size_t count, std::vector<MatrixTerm>& terms);

}  // namespace paramdelta::cpu

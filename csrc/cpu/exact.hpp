// The contract, literally, one element at a time: what every faster loop falls back to for a tile in which something is
// NaN, infinite or overflows. It alone counts, so counting costs the ordinary case nothing.
#pragma once

#include "core/expression.hpp"

namespace paramdelta::cpu {

// Merges elements [first, first + n) of `job` into `out` (a buffer of its own, not job.out). No term has alpha == 0.
Counts merge_exact(const Merge& job, std::size_t first, std::size_t n, void* out);

}  // namespace paramdelta::cpu

// The norms of core/norms.hpp on the processor.
#pragma once

#include "core/expression.hpp"
#include "core/norms.hpp"
#include "cpu/merge.hpp"

namespace paramdelta::cpu {

// Adds `count` elements, which start at a leaf of their tensor and end at one or at the tensor's end, on the calling
// thread, in the default floating-point mode. A null operand stands for zeros.
void add_norms(Isa isa, const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
               NormSums& sums);

// A whole tensor's, over `threads` threads.
NormSums norms_parallel(Isa isa, const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                        int threads);

}  // namespace paramdelta::cpu

// What each instruction set's translation unit provides: the loops of merge-inl.hpp, norms-inl.hpp, gram-inl.hpp and
// scaled-inl.hpp, compiled for it.
#pragma once

#include "core/expression.hpp"
#include "core/scaled.hpp"
#include "cpu/gram.hpp"
#include "cpu/merge.hpp"
#include "cpu/norms.hpp"
#include "cpu/scaled_work.hpp"

#if defined(__x86_64__)
#define PARAMDELTA_X86 1
#else
#define PARAMDELTA_X86 0
#endif

// The loops take two 16-bit elements from one 32-bit word, the lower one first.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "little-endian machines only, as in the files themselves");

// The numbers by which the -inl files choose, where plain loops are not enough.
#define PARAMDELTA_SCALAR 0
#define PARAMDELTA_AVX2 1
#define PARAMDELTA_AVX512 2

namespace paramdelta::cpu {

// Terms with alpha == 0 are gone, and the floating-point mode is set.
namespace scalar {
Counts merge_range(const Merge& job, Store store);
void add_norms_range(const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                     NormSums& sums);
void add_gram_range(const GramRange& range);
ScaledResult scaled_region(const ScaledMerge& job, ScaledWork& work);
}  // namespace scalar
#if PARAMDELTA_X86
namespace avx2 {
Counts merge_range(const Merge& job, Store store);
void add_norms_range(const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                     NormSums& sums);
void add_gram_range(const GramRange& range);
ScaledResult scaled_region(const ScaledMerge& job, ScaledWork& work);
}  // namespace avx2
namespace avx512 {
Counts merge_range(const Merge& job, Store store);
void add_norms_range(const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                     NormSums& sums);
void add_gram_range(const GramRange& range);
ScaledResult scaled_region(const ScaledMerge& job, ScaledWork& work);
}  // namespace avx512
#endif

}  // namespace paramdelta::cpu

// The loops for AVX2 and F16C. FMA stays off: the contract rounds products.
#include "cpu/targets.hpp"

#if PARAMDELTA_X86

#include <immintrin.h>

#include <cstring>

#include "core/codec.hpp"
#include "cpu/exact.hpp"
#include "cpu/scaled_exact.hpp"

#define PARAMDELTA_TARGET PARAMDELTA_AVX2
#define PARAMDELTA_TARGET_NAMESPACE avx2

// Standard headers come before the region: inside it, their inline functions would be compiled for this set and could
// be the copy that the linker keeps for everyone.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

// clang-format off: in this order
#include "cpu/merge-inl.hpp"
#include "cpu/norms-inl.hpp"
#include "cpu/gram-inl.hpp"
#include "cpu/scaled-inl.hpp"
// clang-format on

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // PARAMDELTA_X86

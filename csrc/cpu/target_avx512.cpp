// The loops for AVX-512 (F, BW, DQ, VL) in full width.
#include "cpu/targets.hpp"

#if PARAMDELTA_X86

#include <immintrin.h>

#include <cstring>

#include "core/codec.hpp"
#include "cpu/exact.hpp"
#include "cpu/scaled_exact.hpp"

#define PARAMDELTA_TARGET PARAMDELTA_AVX512
#define PARAMDELTA_TARGET_NAMESPACE avx512

// Standard headers come before the region: inside it, their inline functions would be compiled for this set and could
// be the copy that the linker keeps for everyone.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,prefer-vector-width=512")
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

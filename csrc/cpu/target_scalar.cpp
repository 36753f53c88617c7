// The loops for the baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "cpu/targets.hpp"

#if PARAMDELTA_X86
#include <immintrin.h>
#endif

#include <cstring>

#include "core/codec.hpp"
#include "cpu/exact.hpp"
#include "cpu/scaled_exact.hpp"

#define PARAMDELTA_TARGET PARAMDELTA_SCALAR
#define PARAMDELTA_TARGET_NAMESPACE scalar

// clang-format off: in this order
#include "cpu/merge-inl.hpp"
#include "cpu/norms-inl.hpp"
#include "cpu/gram-inl.hpp"
#include "cpu/scaled-inl.hpp"
// clang-format on

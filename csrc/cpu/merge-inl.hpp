// The way of a range through tiles: fast lane, general lane, literal path, and out. Included once per instruction set,
// inside its target region, by target_*.cpp.

namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE {
namespace {

// 512 elements: the tiles of binary64 and of the output stay in L1. Tiles of 2048 and more do not, and are far slower.
constexpr std::size_t kTile = 512;
constexpr std::size_t kStep = 64;

// clang-format off: each builds on the one before
#include "cpu/tile-inl.hpp"
#include "cpu/fast-inl.hpp"
#include "cpu/store-inl.hpp"
// clang-format on

// Buffers of one tile. The gaps keep them from sharing their offset within a page: loads would otherwise wait for
// stores to another buffer whose address agrees in the last 12 bits.
union Values {
  double f64[kTile];
  float f32[kTile];
};
struct Workspace {
  alignas(64) double acc[kTile];
  unsigned char gap0[320];
  Values post;
  unsigned char gap1[320];
  Values base;
  unsigned char gap2[320];
  unsigned char out[kTile * sizeof(double)];
  unsigned char gap3[320];
  unsigned char padded[3][kTile * sizeof(double) + 320];
};

// `n` elements at `data`, followed by zeros up to a multiple of kStep where n is none.
inline const void* whole_steps(const void* data, std::size_t size, std::size_t n, unsigned char* buffer) {
  if (n % kStep == 0) return data;
  std::memcpy(buffer, data, n * size);
  std::memset(buffer + n * size, 0, (kStep - n % kStep) * size);
  return buffer;
}

inline std::size_t rounded_up(std::size_t n) { return (n + kStep - 1) / kStep * kStep; }

inline const void* at(const Operand& operand, std::size_t i) {
  return static_cast<const unsigned char*>(operand.data) + i * size_of(operand.dtype);
}

template <class Value>
inline void decode_operand(const Operand& operand, std::size_t first, std::size_t n, unsigned char* buffer,
                           Value* out) {
  const std::size_t steps = rounded_up(n);
  if (operand.data == nullptr) {
    std::memset(out, 0, steps * sizeof(Value));
    return;
  }
  const void* data = whole_steps(at(operand, first), size_of(operand.dtype), n, buffer);
  switch (operand.dtype) {
    case DType::bf16: return decode_tile<DType::bf16>(data, out, steps);
    case DType::f16: return decode_tile<DType::f16>(data, out, steps);
    case DType::f32: return decode_tile<DType::f32>(data, out, steps);
    case DType::f64: return decode_tile<DType::f64>(data, out, steps);
    case DType::f8_e4m3: return decode_tile<DType::f8_e4m3>(data, out, steps);
    default: return decode_tile<DType::f8_e5m2>(data, out, steps);
  }
}

inline bool encode_to(DType dtype, const double* in, void* out, std::size_t n) {
  switch (dtype) {
    case DType::bf16: return encode_tile<DType::bf16>(in, out, n);
    case DType::f16: return encode_tile<DType::f16>(in, out, n);
    case DType::f32: return encode_tile<DType::f32>(in, out, n);
    case DType::f64: return encode_tile<DType::f64>(in, out, n);
    case DType::f8_e4m3: return encode_tile<DType::f8_e4m3>(in, out, n);
    default: return encode_tile<DType::f8_e5m2>(in, out, n);
  }
}

template <class Value>
inline void add_term(const Term& term, std::size_t first, std::size_t n, Workspace& work, Value* post, Value* base) {
  decode_operand(term.post, first, n, work.padded[1], post);
  decode_operand(term.base, first, n, work.padded[2], base);
  add_term_tile(post, base, term.alpha, work.acc, rounded_up(n));
}

// Where post and base are bit-equal but not finite, acc comes out NaN here, and the literal path puts it right; that a
// delta of NaN or Inf never yields a finite acc is what makes looking at acc alone sufficient.
Counts merge_general(const Merge& job, std::size_t first, std::size_t n, Workspace& work) {
  const std::size_t steps = rounded_up(n);
  decode_operand(job.new_base, first, n, work.padded[0], work.acc);
  for (std::size_t t = 0; t < job.n_terms; ++t) {
    const Term& term = job.terms[t];
    if (term.post.dtype == DType::f64 || term.base.dtype == DType::f64)
      add_term(term, first, n, work, work.post.f64, work.base.f64);
    else  // half the traffic
      add_term(term, first, n, work, work.post.f32, work.base.f32);
  }
  if (!encode_to(job.out_dtype, work.acc, work.out, steps)) return {};
  return merge_exact(job, first, n, work.out);
}

using FastTile = bool (*)(const void*, const void*, const void*, void*, std::size_t);

FastTile fast_lane(const Merge& job) {
  if (job.n_terms != 1) return nullptr;
  const Term& term = job.terms[0];
  const DType dtype = job.out_dtype;
  if (term.alpha != 1.0 || term.post.dtype != dtype || term.base.dtype != dtype || job.new_base.dtype != dtype)
    return nullptr;
  if (term.post.data == nullptr || term.base.data == nullptr || job.new_base.data == nullptr) return nullptr;
  switch (dtype) {
    case DType::bf16: return fast_tile<DType::bf16>;
    case DType::f16: return fast_tile<DType::f16>;
    case DType::f32: return fast_tile<DType::f32>;
    default: return nullptr;
  }
}

}  // namespace

Counts merge_range(const Merge& job, Store store) {
  Workspace work;
  Counts counts;
  const FastTile fast = fast_lane(job);
  const std::size_t size = size_of(job.out_dtype);
  unsigned char* out = static_cast<unsigned char*>(job.out);
  // Streamed stores write whole cache lines: the first tile is cut so that every later one starts on a line.
  const bool streamed = store == Store::streamed && reinterpret_cast<std::uintptr_t>(out) % size == 0;
  std::size_t n = kTile;
  if (streamed) n -= reinterpret_cast<std::uintptr_t>(out) % 64 / size;
  for (std::size_t first = 0; first < job.count; first += n, n = kTile) {
    if (n > job.count - first) n = job.count - first;
    bool again = true;
    if (fast != nullptr) {
      const Term& term = job.terms[0];
      again = fast(whole_steps(at(term.post, first), size, n, work.padded[0]),
                   whole_steps(at(term.base, first), size, n, work.padded[1]),
                   whole_steps(at(job.new_base, first), size, n, work.padded[2]), work.out, rounded_up(n));
    }
    if (again) counts += merge_general(job, first, n, work);
    if (streamed)
      stream_out(out + first * size, work.out, n * size);
    else
      std::memcpy(out + first * size, work.out, n * size);
  }
  if (streamed) end_stream();
  return counts;
}

}  // namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE

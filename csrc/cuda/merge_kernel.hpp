// Kernels for consecutive elements: three-way lanes for one dtype and alpha = 1, a lane for one dtype and any terms,
// and one for every mixture. A thread takes kVector elements, 16 bytes to a read where addresses allow. Whatever is
// NaN, infinite or overflows is merged again, literally, by the thread that holds it.
#pragma once

#include "core/literal.hpp"
#include "cuda/launch.hpp"
#include "cuda/rounding.hpp"

namespace paramdelta::cuda {

// Tensors of one signature, as words, because a kernel's parameters have room for few terms of many tensors or for many
// terms of few: kTermWords for each term, then for each tensor kTensorWords and two addresses for each term. They lie
// in constant memory, and every thread of a block reads the same ones.
struct Batch {
  static constexpr std::uint32_t kWords = 1500;
  static constexpr std::uint32_t kTermWords = 2;    // alpha, dtypes of post and base
  static constexpr std::uint32_t kTensorWords = 5;  // first block, count, new_base, out, counts; pairs follow

  std::uint32_t n_tensors = 0, n_terms = 0;
  DType new_base = DType::f32, out = DType::f32;
  std::uint64_t words[kWords];
};

PARAMDELTA_DEVICE const void* pointer(std::uint64_t address) {
  return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));
}

// One tensor of a batch.
struct TensorView {
  const Batch& batch;
  const std::uint64_t* words;

  PARAMDELTA_DEVICE std::uint64_t first_block() const { return words[0]; }
  PARAMDELTA_DEVICE std::uint64_t count() const { return words[1]; }
  PARAMDELTA_DEVICE Operand new_base() const { return {pointer(words[2]), batch.new_base}; }
  PARAMDELTA_DEVICE unsigned char* out() const {
    return static_cast<unsigned char*>(const_cast<void*>(pointer(words[3])));
  }
  PARAMDELTA_DEVICE std::uint64_t* counts() const {
    return static_cast<std::uint64_t*>(const_cast<void*>(pointer(words[4])));
  }
  PARAMDELTA_DEVICE double alpha(std::uint32_t t) const { return bits_as<double>(batch.words[Batch::kTermWords * t]); }
  PARAMDELTA_DEVICE Operand post(std::uint32_t t) const {
    return {pointer(words[Batch::kTensorWords + 2 * t]),
            static_cast<DType>(batch.words[Batch::kTermWords * t + 1] & 0xFF)};
  }
  PARAMDELTA_DEVICE Operand base(std::uint32_t t) const {
    return {pointer(words[Batch::kTensorWords + 2 * t + 1]),
            static_cast<DType>(batch.words[Batch::kTermWords * t + 1] >> 8)};
  }
};

PARAMDELTA_DEVICE TensorView tensor(const Batch& batch, std::uint32_t i) {
  const std::uint32_t stride = Batch::kTensorWords + 2 * batch.n_terms;
  return {batch, batch.words + Batch::kTermWords * batch.n_terms + stride * i};
}

// The tensor that a block works on: the last one whose first block is not beyond it.
PARAMDELTA_DEVICE TensorView tensor_of_block(const Batch& batch, std::uint32_t block) {
  std::uint32_t low = 0, high = batch.n_tensors;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    if (tensor(batch, middle).first_block() <= block)
      low = middle;
    else
      high = middle;
  }
  return tensor(batch, low);
}

PARAMDELTA_DEVICE void add_counts(const Counts& counts, std::uint64_t* to) {
  if (counts.nan != 0) atomic_add(to, counts.nan);
  if (counts.inf != 0) atomic_add(to + 1, counts.inf);
  if (counts.overflow != 0) atomic_add(to + 2, counts.overflow);
}

// Elements from `i` on that have a bit in `special`, literally. Operands are as they were, also where `out` is one of
// them: nobody else writes these elements.
PARAMDELTA_DEVICE_CALL void merge_literally(const Batch& batch, const std::uint64_t* words, std::uint64_t i,
                                            std::uint32_t special) {
  const TensorView view{batch, words};
  Counts counts;
  PARAMDELTA_ROLLED
  for (; special != 0; special >>= 1, ++i) {
    if ((special & 1u) == 0) continue;
    Sum sum{value_at(view.new_base(), i), false};
    PARAMDELTA_ROLLED
    for (std::uint32_t t = 0; t < batch.n_terms; ++t) {
      const Operand post = view.post(t), base = view.base(t);
      if (!same_code(post, base, i)) sum.add(view.alpha(t), value_at(post, i), value_at(base, i));
    }
    store_sum(sum, view.new_base(), i, batch.out, view.out() + i * size_of(batch.out), counts);
  }
  add_counts(counts, view.counts());
}

// out = new_base + (post − base) for bf16 and f16 in binary32. z = (base − post) + 0 is never −0, so that new_base − z
// keeps new_base's −0. That this is the contract unless `ordinary` comes out false is proved in csrc/cpu/fast-inl.hpp:
// z must be exact (Fast2Sum, either way round), and the sum s exact where it lies in the middle of two codes.
template <DType D>
PARAMDELTA_DEVICE typename Format<D>::Code merge_three(typename Format<D>::Code post, typename Format<D>::Code base,
                                                       typename Format<D>::Code new_base, bool& ordinary) {
  constexpr int shift = 23 - Format<D>::mantissa;
  // The largest magnitude that does not round to Inf; NaN and Inf lie above it.
  constexpr std::uint32_t limit = D == DType::bf16 ? 0x7F7F8000u : 0x477FF000u;
  const float p = widen_float<D>(post), b = widen_float<D>(base), x = widen_float<D>(new_base);
  const float z = (b - p) + 0.0f;
  const float s = x - z;
  const std::uint32_t bits = bits_as<std::uint32_t>(s);
  const bool exact_delta = p + z == b && b - z == p;
  const bool tie = (bits & ((1u << shift) - 1)) == 1u << (shift - 1);
  const bool exact_sum = x - s == z && s + z == x;
  ordinary = exact_delta && (!tie || exact_sum) && (bits & 0x7FFFFFFFu) < limit;
  return narrow_float<D>(s);
}

// Lane::merge(view, i, n) merges the `n` elements from `i` on, up to kVector.
template <class Lane>
struct MergeKernel {
  using Params = Batch;
  static constexpr int kThreads = 256;
  static constexpr int kVector = Lane::kVector;
  static constexpr std::uint64_t kBlock = std::uint64_t{kThreads} * kVector;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& batch) {
    const TensorView view = tensor_of_block(batch, block.index);
    block.each([&](int thread) {
      const std::uint64_t i =
          (block.index - view.first_block()) * kBlock + static_cast<std::uint64_t>(thread) * kVector;
      if (i >= view.count()) return;
      const std::uint64_t rest = view.count() - i;
      Lane::merge(view, i, rest < kVector ? static_cast<int>(rest) : kVector);
    });
  }
};

// kVector elements of one dtype from element `i` on, of which `n` exist.
template <DType D, int kVector>
PARAMDELTA_DEVICE void load_vector(const void* data, std::uint64_t i, int n, typename Format<D>::Code* to) {
  using Code = typename Format<D>::Code;
  const unsigned char* from = static_cast<const unsigned char*>(data) + i * sizeof(Code);
  if (data != nullptr && n == kVector) return load_codes<kVector>(from, to);
  PARAMDELTA_UNROLL
  for (int k = 0; k < kVector; ++k)
    to[k] = data != nullptr && k < n ? code_at<D>(from, static_cast<std::size_t>(k)) : 0;
}

// Of several arrays: where all of them allow the widest reads, these follow each other without a branch between them,
// and all are under way at once.
template <DType D, int kVector, int kArrays>
PARAMDELTA_DEVICE void load_vectors(const void* const (&data)[kArrays], std::uint64_t i, int n,
                                    typename Format<D>::Code (&to)[kArrays][kVector]) {
  using Code = typename Format<D>::Code;
  static_assert(kVector * sizeof(Code) == 16, "one read each");
  bool whole = n == kVector;
  PARAMDELTA_UNROLL
  for (int a = 0; a < kArrays; ++a) whole = whole && data[a] != nullptr && is_aligned(data[a], 16);
  if (whole) {
    Sixteen bytes[kArrays];
    PARAMDELTA_UNROLL
    for (int a = 0; a < kArrays; ++a)
      bytes[a] = load_sixteen(static_cast<const unsigned char*>(data[a]) + i * sizeof(Code));
    PARAMDELTA_UNROLL
    for (int a = 0; a < kArrays; ++a) std::memcpy(to[a], &bytes[a], 16);
  } else {
    PARAMDELTA_UNROLL
    for (int a = 0; a < kArrays; ++a) load_vector<D, kVector>(data[a], i, n, to[a]);
  }
}

// Writes `n` codes, but merges those literally that have a bit in `special`.
template <DType D, int kVector>
PARAMDELTA_DEVICE void store_vector(const typename Format<D>::Code* from, const TensorView& view, std::uint64_t i,
                                    int n, std::uint32_t special) {
  using Code = typename Format<D>::Code;
  unsigned char* to = view.out() + i * sizeof(Code);
  if (n == kVector && special == 0) return store_codes<kVector>(from, to);
  if (n < kVector) special &= (1u << n) - 1;
  if (special != 0) merge_literally(view.batch, view.words, i, special);
  PARAMDELTA_UNROLL
  for (int k = 0; k < kVector; ++k)
    if (k < n && (special >> k & 1u) == 0)
      std::memcpy(to + static_cast<std::size_t>(k) * sizeof(Code), from + k, sizeof(Code));
}

// One term, alpha = 1, no operand of zeros, one dtype: bf16 or f16.
template <DType D>
struct ThreeWay {
  static constexpr int kVector = 8;

  PARAMDELTA_DEVICE static void merge(const TensorView& view, std::uint64_t i, int n) {
    using Code = typename Format<D>::Code;
    alignas(16) Code in[3][kVector], out[kVector];
    const void* const from[3] = {view.post(0).data, view.base(0).data, view.new_base().data};
    load_vectors<D, kVector, 3>(from, i, n, in);
    std::uint32_t special = 0;
    PARAMDELTA_UNROLL
    for (int k = 0; k < kVector; ++k) {
      bool ordinary;
      out[k] = merge_three<D>(in[0][k], in[1][k], in[2][k], ordinary);
      special |= ordinary ? 0u : 1u << k;
    }
    store_vector<D, kVector>(out, view, i, n, special);
  }
};

// acc and the terms in binary64. A zero delta must not be added: acc may be −0. That a delta of NaN or Inf never yields
// a finite acc is what makes looking at acc alone sufficient, and an ordinary acc that nothing touched has new_base's
// own code, because narrow() undoes widen().
PARAMDELTA_DEVICE void add_term(double& acc, double alpha, double post, double base) {
  const double delta = post - base;
  const double product = alpha * delta;
  const double sum = acc + product;
  acc = delta == 0.0 ? acc : sum;
}

// The codes of kVector binary64 to where elements from `i` on are.
template <DType D, int kVector>
PARAMDELTA_DEVICE void store_values_as(const double* acc, const TensorView& view, std::uint64_t i, int n) {
  alignas(16) typename Format<D>::Code out[kVector];
  std::uint32_t special = 0;
  PARAMDELTA_UNROLL
  for (int k = 0; k < kVector; ++k) {
    out[k] = narrow<D>(acc[k]);
    special |= is_ordinary<D>(acc[k]) ? 0u : 1u << k;
  }
  store_vector<D, kVector>(out, view, i, n, special);
}

// Any terms, one dtype throughout: bf16, f16 or f32.
template <DType D>
struct Uniform {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(typename Format<D>::Code));

  PARAMDELTA_DEVICE static void merge(const TensorView& view, std::uint64_t i, int n) {
    using Code = typename Format<D>::Code;
    alignas(16) Code first[1][kVector], pair[2][kVector];
    double acc[kVector];
    load_vectors<D, kVector, 1>({view.new_base().data}, i, n, first);
    PARAMDELTA_UNROLL
    for (int k = 0; k < kVector; ++k) acc[k] = widen<D>(first[0][k]);
    for (std::uint32_t t = 0; t < view.batch.n_terms; ++t) {
      load_vectors<D, kVector, 2>({view.post(t).data, view.base(t).data}, i, n, pair);
      const double alpha = view.alpha(t);
      PARAMDELTA_UNROLL
      for (int k = 0; k < kVector; ++k) add_term(acc[k], alpha, widen<D>(pair[0][k]), widen<D>(pair[1][k]));
    }
    store_values_as<D, kVector>(acc, view, i, n);
  }
};

template <DType D, int kVector>
PARAMDELTA_DEVICE void read_values_as(const Operand& operand, std::uint64_t i, int n, double* values) {
  alignas(16) typename Format<D>::Code codes[kVector];
  load_vector<D, kVector>(operand.data, i, n, codes);
  PARAMDELTA_UNROLL
  for (int k = 0; k < kVector; ++k) values[k] = widen<D>(codes[k]);
}

template <int kVector>
PARAMDELTA_DEVICE void read_values(const Operand& operand, std::uint64_t i, int n, double* values) {
  switch (operand.dtype) {
    case DType::bf16: return read_values_as<DType::bf16, kVector>(operand, i, n, values);
    case DType::f16: return read_values_as<DType::f16, kVector>(operand, i, n, values);
    case DType::f32: return read_values_as<DType::f32, kVector>(operand, i, n, values);
    case DType::f64: return read_values_as<DType::f64, kVector>(operand, i, n, values);
    case DType::f8_e4m3: return read_values_as<DType::f8_e4m3, kVector>(operand, i, n, values);
    default: return read_values_as<DType::f8_e5m2, kVector>(operand, i, n, values);
  }
}

// Any mixture of dtypes.
struct Mixed {
  static constexpr int kVector = 8;

  PARAMDELTA_DEVICE static void merge(const TensorView& view, std::uint64_t i, int n) {
    double acc[kVector];
    read_values<kVector>(view.new_base(), i, n, acc);
    PARAMDELTA_ROLLED
    for (std::uint32_t t = 0; t < view.batch.n_terms; ++t) {
      double post[kVector], base[kVector] = {};
      PARAMDELTA_ROLLED
      for (int side = 0; side < 2; ++side) {  // rolled, so that the reads of every dtype are there once
        PARAMDELTA_UNROLL
        for (int k = 0; k < kVector; ++k) post[k] = base[k];
        read_values<kVector>(side == 0 ? view.post(t) : view.base(t), i, n, base);
      }
      const double alpha = view.alpha(t);
      PARAMDELTA_UNROLL
      for (int k = 0; k < kVector; ++k) add_term(acc[k], alpha, post[k], base[k]);
    }
    switch (view.batch.out) {
      case DType::bf16: return store_values_as<DType::bf16, kVector>(acc, view, i, n);
      case DType::f16: return store_values_as<DType::f16, kVector>(acc, view, i, n);
      case DType::f32: return store_values_as<DType::f32, kVector>(acc, view, i, n);
      case DType::f64: return store_values_as<DType::f64, kVector>(acc, view, i, n);
      case DType::f8_e4m3: return store_values_as<DType::f8_e4m3, kVector>(acc, view, i, n);
      default: return store_values_as<DType::f8_e5m2, kVector>(acc, view, i, n);
    }
  }
};

}  // namespace paramdelta::cuda

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
  bool wide = false;  // every address is a multiple of 16, the outputs' too, and none stands for zeros
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

// s = new_base + (post − base) for bf16 and f16 in binary32. z = (base − post) + 0 is never −0, so that new_base − z
// keeps new_base's −0. That s rounds to the contract's code unless `doubts` has other bits than the sign's, or
// `largest` reaches `limit`, is proved in csrc/cpu/fast-inl.hpp: z must be exact (Fast2Sum, either way round), and s
// exact where it lies in the middle of two codes. Bits that should agree are compared by exclusive or, all but the
// sign: one operation for each test, and none for each element that is as it should be.
template <DType D>
struct ThreeSum {
  static constexpr int kDropped = 23 - Format<D>::mantissa;
  // The smallest magnitude that rounds to Inf; NaN and Inf lie above it.
  static constexpr std::uint32_t limit = D == DType::bf16 ? 0x7F7F8000u : 0x477FF000u;

  std::uint32_t doubts = 0, largest = 0;

  PARAMDELTA_DEVICE static std::uint32_t differ(float a, float b) {
    return bits_as<std::uint32_t>(a) ^ bits_as<std::uint32_t>(b);
  }
  PARAMDELTA_DEVICE float of(float p, float b, float x) {
    const float z = (b - p) + 0.0f;
    const float s = x - z;
    const std::uint32_t bits = bits_as<std::uint32_t>(s), magnitude = bits & 0x7FFFFFFFu;
    doubts |= differ(p + z, b) | differ(b - z, p);
    const std::uint32_t inexact = differ(x - s, z) | differ(s + z, x);
    if ((bits & ((1u << kDropped) - 1)) == 1u << (kDropped - 1)) doubts |= inexact;
    largest = magnitude > largest ? magnitude : largest;
    return s;
  }
  PARAMDELTA_DEVICE bool is_ordinary() const { return (doubts & 0x7FFFFFFFu) == 0 && largest < limit; }
};

// Lane::merge(view, i, n) merges the `n` elements from `i` on, up to kVector.
template <class Lane>
struct MergeKernel {
  using Params = Batch;
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = Lane::kBlocksPerProcessor;
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

// The same of a whole vector at a multiple of 16 bytes: reads without a branch between them are under way together.
template <DType D>
PARAMDELTA_DEVICE Sixteen load_whole(const void* data, std::uint64_t i) {
  return load_sixteen(static_cast<const unsigned char*>(data) + i * sizeof(typename Format<D>::Code));
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

// The same of a whole vector at a multiple of 16 bytes.
template <DType D, int kVector>
PARAMDELTA_DEVICE void store_whole(const typename Format<D>::Code* from, const TensorView& view, std::uint64_t i,
                                   std::uint32_t special) {
  if (special != 0) return store_vector<D, kVector>(from, view, i, kVector, special);
  store_codes<kVector>(from, view.out() + i * sizeof(typename Format<D>::Code));
}

// acc and the terms in binary64. A zero delta must not be added: acc may be −0. That a delta of NaN or Inf never yields
// a finite acc is what makes looking at acc alone sufficient, and an ordinary acc that nothing touched has new_base's
// own code, because narrow() undoes widen().
PARAMDELTA_DEVICE void add_term(double& acc, double alpha, double post, double base) {
  const double delta = post - base;
  const double product = alpha * delta;
  const double sum = acc + product;
  acc = delta == 0.0 ? acc : sum;
}

// The codes of kVector binary64; returns which are not ordinary.
template <DType D, int kVector>
PARAMDELTA_DEVICE std::uint32_t narrow_all(const double* acc, typename Format<D>::Code* out) {
  std::uint32_t special = 0;
  PARAMDELTA_UNROLL
  for (int k = 0; k < kVector; ++k) {
    out[k] = narrow<D>(acc[k]);
    special |= is_ordinary<D>(acc[k]) ? 0u : 1u << k;
  }
  return special;
}

// The same, to where elements from `i` on are.
template <DType D, int kVector>
PARAMDELTA_DEVICE void store_values_as(const double* acc, const TensorView& view, std::uint64_t i, int n) {
  alignas(16) typename Format<D>::Code out[kVector];
  const std::uint32_t special = narrow_all<D, kVector>(acc, out);
  store_vector<D, kVector>(out, view, i, n, special);
}

// Any terms, one dtype throughout: bf16, f16 or f32.
//
// acc − |alpha| · z, with z = base − post + 0 or, for alpha < 0, post − base + 0, is the contract's sum in every bit:
// the same numbers with their signs turned twice. z is never −0, so a zero delta takes +0 away and leaves acc as it is,
// −0 too, without a comparison.
template <DType D>
struct Uniform {
  using Code = typename Format<D>::Code;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Code));
  static constexpr int kBlocksPerProcessor = 4;

  // The operand that z starts from, and the one taken from it.
  struct Pair {
    const void *from, *less;
    double weight;

    PARAMDELTA_DEVICE Pair(const TensorView& view, std::uint32_t t) {
      const double alpha = view.alpha(t);
      const bool adds = alpha > 0.0;
      from = adds ? view.base(t).data : view.post(t).data;
      less = adds ? view.post(t).data : view.base(t).data;
      weight = adds ? alpha : -alpha;
    }
  };

  PARAMDELTA_DEVICE static void start(double* acc, const Code* codes) {
    PARAMDELTA_UNROLL
    for (int k = 0; k < kVector; ++k) acc[k] = widen<D>(codes[k]);
  }
  PARAMDELTA_DEVICE static void add(double* acc, double weight, const Code* from, const Code* less) {
    PARAMDELTA_UNROLL
    for (int k = 0; k < kVector; ++k) {
      const double z = (widen<D>(from[k]) - widen<D>(less[k])) + 0.0;
      const double product = weight * z;
      acc[k] = acc[k] - product;
    }
  }

  // Operands that are zeros or lie at any address, and the last elements.
  PARAMDELTA_DEVICE_CALL static void merge_narrow(const Batch& batch, const std::uint64_t* words, std::uint64_t i,
                                                  int n) {
    const TensorView view{batch, words};
    alignas(16) Code from[kVector], less[kVector];
    double acc[kVector];
    load_vector<D, kVector>(view.new_base().data, i, n, from);
    start(acc, from);
    PARAMDELTA_ROLLED
    for (std::uint32_t t = 0; t < batch.n_terms; ++t) {
      const Pair pair(view, t);
      load_vector<D, kVector>(pair.from, i, n, from);
      load_vector<D, kVector>(pair.less, i, n, less);
      add(acc, pair.weight, from, less);
    }
    alignas(16) Code out[kVector];
    const std::uint32_t special = narrow_all<D, kVector>(acc, out);
    store_vector<D, kVector>(out, view, i, n, special);
  }

  PARAMDELTA_DEVICE static void merge(const TensorView& view, std::uint64_t i, int n) {
    if (!view.batch.wide || n != kVector) return merge_narrow(view.batch, view.words, i, n);
    const std::uint32_t n_terms = view.batch.n_terms;
    alignas(16) Code from[kVector], less[kVector];
    double acc[kVector], weight = 0.0;
    // The reads of a term are under way while the one before it is added.
    const Sixteen first = load_whole<D>(view.new_base().data, i);
    Sixteen next_from{}, next_less{};
    const auto read = [&](std::uint32_t t) {
      const Pair pair(view, t);
      next_from = load_whole<D>(pair.from, i);
      next_less = load_whole<D>(pair.less, i);
      weight = pair.weight;
    };
    if (n_terms != 0) read(0);
    std::memcpy(from, &first, 16);
    start(acc, from);
    PARAMDELTA_ROLLED
    for (std::uint32_t t = 0; t < n_terms; ++t) {
      const double by = weight;
      std::memcpy(from, &next_from, 16);
      std::memcpy(less, &next_less, 16);
      if (t + 1 < n_terms) read(t + 1);
      add(acc, by, from, less);
    }
    alignas(16) Code out[kVector];
    const std::uint32_t special = narrow_all<D, kVector>(acc, out);
    store_whole<D, kVector>(out, view, i, special);
  }
};

// One term, alpha = 1, no operand of zeros, one dtype: bf16 or f16.
template <DType D>
struct ThreeWay {
  static constexpr int kVector = 8;
  static constexpr int kBlocksPerProcessor = 4;

  PARAMDELTA_DEVICE static void merge(const TensorView& view, std::uint64_t i, int n) {
    using Code = typename Format<D>::Code;
    if (!view.batch.wide || n != kVector) return Uniform<D>::merge_narrow(view.batch, view.words, i, n);
    alignas(16) Code post[kVector], base[kVector], new_base[kVector], out[kVector];
    const Sixteen reads[3] = {load_whole<D>(view.post(0).data, i), load_whole<D>(view.base(0).data, i),
                              load_whole<D>(view.new_base().data, i)};
    std::memcpy(post, &reads[0], 16);
    std::memcpy(base, &reads[1], 16);
    std::memcpy(new_base, &reads[2], 16);
    ThreeSum<D> sum;
    PARAMDELTA_UNROLL
    for (int k = 0; k < kVector; k += 2) {
      float s[2];
      PARAMDELTA_UNROLL
      for (int j = k; j < k + 2; ++j)
        s[j - k] = sum.of(widen_float<D>(post[j]), widen_float<D>(base[j]), widen_float<D>(new_base[j]));
      narrow_two<D>(s, out + k);
    }
    // All of a thread's elements literally where one is not ordinary: weights have none.
    store_whole<D, kVector>(out, view, i, sum.is_ordinary() ? 0u : (1u << kVector) - 1);
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
  static constexpr int kBlocksPerProcessor = 2;

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

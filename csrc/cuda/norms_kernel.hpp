// The kernel of the norms: a block to a leaf, a thread to a lane, so that what the threads of a warp read lies together
// and every lane's order of additions is its thread's own. The halving tree takes eight numbers at a time in registers:
// 256 to 32 to 4 to 1. Leaves are added to the totals as integers, in any order.
#pragma once

#include "core/literal.hpp"
#include "cuda/launch.hpp"
#include "cuda/norms.hpp"
#include "cuda/rounding.hpp"

namespace paramdelta::cuda {

struct NormsParams {
  Operand post, base, new_base;
  std::uint64_t count = 0;
  NormTotals* totals = nullptr;
};

inline constexpr int kLeafRows = static_cast<int>(kLeaf / kLanes);

template <DType D>
PARAMDELTA_DEVICE float float_of(typename Format<D>::Code code) {
  if constexpr (D == DType::f64) {
    return static_cast<float>(bits_as<double>(code));
  } else if constexpr (D == DType::f32) {
    return bits_as<float>(code);
  } else {
    const float value = widen_float<D>(code);
    if constexpr (D == DType::bf16 || !Format<D>::has_inf) {
      return value;
    } else {
      const std::uint32_t sign = static_cast<std::uint32_t>(code >> (Format<D>::width - 1)) << 31;
      return (code & (Format<D>::sign - 1)) == Format<D>::beyond ? bits_as<float>(sign | 0x7F800000u) : value;
    }
  }
}

// A lane's elements of a leaf: first, first + 256, …
template <DType D>
PARAMDELTA_DEVICE void read_whole_lane(const void* data, std::uint64_t first, float (&values)[kLeafRows]) {
  const auto* from = static_cast<const typename Format<D>::Code*>(data) + first;
  PARAMDELTA_UNROLL
  for (int row = 0; row < kLeafRows; ++row) values[row] = float_of<D>(from[static_cast<std::size_t>(row) * kLanes]);
}

// Those of which `n` exist, the others being 0, as zeros are; at any address.
template <DType D>
PARAMDELTA_DEVICE void read_part_of_lane(const void* data, std::uint64_t first, int n, float (&values)[kLeafRows]) {
  PARAMDELTA_UNROLL
  for (int row = 0; row < kLeafRows; ++row) {
    const std::size_t i = first + static_cast<std::size_t>(row) * kLanes;
    values[row] = data == nullptr || row >= n ? 0.0f : float_of<D>(code_at<D>(data, i));
  }
}

template <DType D>
PARAMDELTA_DEVICE bool is_whole(const void* data, int n) {
  return n == kLeafRows && data != nullptr && is_aligned(data, sizeof(typename Format<D>::Code));
}

// What a lane holds of the three operands.
struct LaneValues {
  float post[kLeafRows], base[kLeafRows], new_base[kLeafRows];
};

// One dtype throughout: where a whole leaf is read no branch lies between the reads, and all are under way at once.
template <DType D>
struct UniformRows {
  PARAMDELTA_DEVICE static void read(const NormsParams& params, std::uint64_t first, int n, LaneValues& values) {
    const void *post = params.post.data, *base = params.base.data, *new_base = params.new_base.data;
    if (is_whole<D>(post, n) && is_whole<D>(base, n) && is_whole<D>(new_base, n)) {
      read_whole_lane<D>(post, first, values.post);
      read_whole_lane<D>(base, first, values.base);
      read_whole_lane<D>(new_base, first, values.new_base);
    } else {
      read_part_of_lane<D>(post, first, n, values.post);
      read_part_of_lane<D>(base, first, n, values.base);
      read_part_of_lane<D>(new_base, first, n, values.new_base);
    }
  }
};

template <DType D>
PARAMDELTA_DEVICE void read_lane_as(const void* data, std::uint64_t first, int n, float (&values)[kLeafRows]) {
  if (is_whole<D>(data, n)) return read_whole_lane<D>(data, first, values);
  read_part_of_lane<D>(data, first, n, values);
}

PARAMDELTA_DEVICE void read_lane(const Operand& operand, std::uint64_t first, int n, float (&values)[kLeafRows]) {
  switch (operand.dtype) {
    case DType::bf16: return read_lane_as<DType::bf16>(operand.data, first, n, values);
    case DType::f16: return read_lane_as<DType::f16>(operand.data, first, n, values);
    case DType::f32: return read_lane_as<DType::f32>(operand.data, first, n, values);
    case DType::f64: return read_lane_as<DType::f64>(operand.data, first, n, values);
    case DType::f8_e4m3: return read_lane_as<DType::f8_e4m3>(operand.data, first, n, values);
    default: return read_lane_as<DType::f8_e5m2>(operand.data, first, n, values);
  }
}

// Any mixture.
struct MixedRows {
  PARAMDELTA_DEVICE static void read(const NormsParams& params, std::uint64_t first, int n, LaneValues& values) {
    read_lane(params.post, first, n, values.post);
    read_lane(params.base, first, n, values.base);
    read_lane(params.new_base, first, n, values.new_base);
  }
};

PARAMDELTA_DEVICE double joined(double a, double b) { return a + b; }
PARAMDELTA_DEVICE std::uint32_t joined(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// Eight sums or maxima, kApart places from each other: halves to halves.
template <int kApart, class T>
PARAMDELTA_DEVICE T tree_of_eight(const T* from) {
  T v[8];
  PARAMDELTA_UNROLL
  for (int j = 0; j < 8; ++j) v[j] = from[kApart * j];
  PARAMDELTA_UNROLL
  for (int half = 4; half > 0; half /= 2) {
    PARAMDELTA_UNROLL
    for (int j = 0; j < half; ++j) v[j] = joined(v[j], v[j + half]);
  }
  return v[0];
}

PARAMDELTA_DEVICE void add_leaf(double sum, std::int64_t* digits, std::uint32_t* special) {
  const ExactParts added = exact_parts(sum);
  if (added.special != 0) atomic_or(special, added.special);
  for (int i = 0; i < 3; ++i)  // two's complement: a negative part is added modulo 2^64
    if (added.parts[i] != 0)
      atomic_add(reinterpret_cast<std::uint64_t*>(digits + added.digit + i),
                 static_cast<std::uint64_t>(added.parts[i]));
}

template <class Rows>
struct NormsKernel {
  using Params = NormsParams;
  static constexpr int kThreads = static_cast<int>(kLanes);

  // Of each sum and of the maximum, 256 lanes, then what the first eight-fold tree makes of them.
  struct Shared {
    double lanes[NormTotals::kSums][kLanes];
    double parts[NormTotals::kSums][32];
    std::uint32_t largest[kLanes];
    std::uint32_t largest_parts[32];
  };

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    Shared& shared = *reinterpret_cast<Shared*>(block.shared);
    const std::uint64_t start = static_cast<std::uint64_t>(block.index) * kLeaf;
    NormTotals& totals = *params.totals;
    block.each([&](int thread) {
      const std::uint64_t first = start + static_cast<std::uint64_t>(thread);
      const std::uint64_t rest = first < params.count ? (params.count - first + kLanes - 1) / kLanes : 0;
      const int n = rest < kLeafRows ? static_cast<int>(rest) : kLeafRows;
      LaneValues values;
      Rows::read(params, first, n, values);
      float sums[NormTotals::kSums] = {};
      std::uint32_t largest = 0;
      PARAMDELTA_UNROLL
      for (int row = 0; row < kLeafRows; ++row) {
        const float delta = values.post[row] - values.base[row];
        const float drift = values.new_base[row] - values.base[row];
        sums[0] = sums[0] + delta * delta;
        sums[1] = sums[1] + drift * drift;
        sums[2] = sums[2] + delta * drift;
        const std::uint32_t magnitude = bits_as<std::uint32_t>(delta) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
      }
      for (int k = 0; k < NormTotals::kSums; ++k) shared.lanes[k][thread] = static_cast<double>(sums[k]);
      shared.largest[thread] = largest;
    });
    // A warp to each sum, and one to the maximum. The lanes of before take what a tree makes of its parts: a phase
    // writes nothing that it reads.
    constexpr int kMaximum = NormTotals::kSums;
    block.each([&](int thread) {
      const int k = thread / 32, lane = thread % 32;
      if (k < kMaximum)
        shared.parts[k][lane] = tree_of_eight<32>(shared.lanes[k] + lane);
      else if (k == kMaximum)
        shared.largest_parts[lane] = tree_of_eight<32>(shared.largest + lane);
    });
    block.each([&](int thread) {
      const int k = thread / 32, lane = thread % 32;
      if (lane >= 4) return;
      if (k < kMaximum)
        shared.lanes[k][lane] = tree_of_eight<4>(shared.parts[k] + lane);
      else if (k == kMaximum)
        shared.largest[lane] = tree_of_eight<4>(shared.largest_parts + lane);
    });
    block.each([&](int thread) {
      const int k = thread / 32;
      if (thread % 32 != 0) return;
      if (k < kMaximum) {
        const double* v = shared.lanes[k];
        add_leaf((v[0] + v[2]) + (v[1] + v[3]), totals.digits[k], totals.special + k);
      } else if (k == kMaximum) {
        const std::uint32_t* v = shared.largest;
        const std::uint32_t largest = joined(joined(v[0], v[2]), joined(v[1], v[3]));
        if (largest > seen(&totals.largest_delta)) atomic_max(&totals.largest_delta, largest);
      }
    });
  }
};

}  // namespace paramdelta::cuda

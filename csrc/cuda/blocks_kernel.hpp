// Kernel for the commonest quantised merge: f8_e4m3 in blocks of 128 × 128 that share a scale, one term, merged into
// such blocks. It is built to wait for nothing but memory:
//
// - Thread blocks stay, and take tile after tile. What they read arrives in shared memory by asynchronous copies, a
//   tile or two ahead, so that loads are under way whatever the threads do. A thread copies and reads the same bytes:
//   no barrier lies between.
// - A block's 16384 values stay in registers from the largest |x| to the codes, 64 a thread.
// - Codes become binary64 by moving bits, products of code and scale are fused where that is exact, codes come from two
//   products in place of a division.
//
// Exactness. Let n, p, b be codes with scales s, and a = |alpha|. A product of a code (4 bits) and a scale (24, or 48
// of two levels) has at most 52 bits and is exact, so a fused multiply-add that uses it rounds as the sum of the
// contract does. z = fma(b, b_s, 0), then fma(−p, p_s, z), is base − post rounded once; neither is ever −0, since +0 is
// added to a product or to something that is not −0. So acc = fma(n, n_s, −(a · z)) is n · n_s where z is zero, −0
// included: a zero delta leaves acc untouched. For alpha < 0 post and base change places. A power of two goes into p_s
// and b_s. Scales are below 256 and a is within 2^±64, so nothing overflows, and every product is a normal number or
// zero.
//
// Codes are of y = fl(x / f). Let low ≤ 1/f ≤ high be the binary32 around it: for x ≥ 0, x · low ≤ x / f ≤ x · high,
// and rounding is monotone, to binary32 and to codes; so where both products have one code, it is y's. For x < 0 all
// of it is mirrored. Where they do not, about once in 2^18, a thread divides.
#pragma once

#include "cuda/e4m3.hpp"
#include "cuda/scaled_codes.hpp"

namespace paramdelta::cuda {

inline constexpr std::uint32_t kSide = 128;
inline constexpr int kBlocksThreads = 256;
inline constexpr int kChunks = 4;    // of 16 columns of a row, for each thread
inline constexpr int kOperands = 3;  // new_base, what delta is subtracted from, and what is subtracted
inline constexpr std::uint32_t kMostTilesAhead = 2;

PARAMDELTA_HOST_DEVICE inline bool is_power_of_two(double weight) {
  return (bits_as<std::uint64_t>(weight) & ((std::uint64_t{1} << 52) - 1)) == 0;
}

struct BlocksParams {
  ScaledParams scaled;
  std::uint32_t tiles = 0, stride = 0;               // of the matrix; thread blocks
  std::uint32_t stride_down = 0, stride_across = 0;  // the same in rows of tiles, and what is left
  std::uint32_t ahead = 1;                           // tiles that are on their way
  Matrix operands[kOperands];                        // new_base; base and post, the other way round for alpha < 0
  double weight = 1.0;                               // |alpha|
};

// The tiles that a thread block takes: every stride-th one, without a division for each.
struct TileCursor {
  std::uint32_t number, down, across;

  PARAMDELTA_DEVICE TileCursor(const BlocksParams& params, std::uint32_t first)
      : number(first), down(first / params.scaled.tiles_across), across(first - down * params.scaled.tiles_across) {}

  PARAMDELTA_DEVICE void advance(const BlocksParams& params) {
    number += params.stride;
    down += params.stride_down;
    across += params.stride_across;
    const bool over = across >= params.scaled.tiles_across;
    across -= over ? params.scaled.tiles_across : 0;
    down += over ? 1 : 0;
  }
  PARAMDELTA_DEVICE bool is_there(const BlocksParams& params) const { return number < params.tiles; }
  PARAMDELTA_DEVICE Tile tile(const BlocksParams& params) const {
    const ScaledMerge& job = params.scaled.job;
    const std::uint32_t row = down * kSide, col = across * kSide;
    return {row, col, least(kSide, static_cast<std::uint32_t>(job.rows) - row),
            least(kSide, static_cast<std::uint32_t>(job.cols) - col)};
  }
};

// What a block of the output becomes, for all threads.
struct BlockChoice {
  float low, high;  // around the factor of x
  float factor;     // x / factor is what has a code, or x · factor
  float scale;
  std::uint32_t divide;  // all bits: low and high do not serve
  std::uint32_t copied;
};

struct BlocksShared {
  double scales[2][kOperands];  // times kCodePower, of this tile and the next, in turns
  std::uint32_t stored[2];      // new_base's, as bits
  std::uint32_t unsuited[2];    // a scale is too large, or none
  std::uint32_t largest[2], touched[2];
  std::uint32_t total_largest, total_touched;
  BlockChoice choice;
};

// A thread's own from phase to phase.
struct BlocksState {
  float x[kChunks][16];
  std::uint32_t scale = 0;
  double error = 0.0, value = 0.0;
};

struct Odd {
  float x;
  std::uint32_t touched;
};

// An element literally: where a code is NaN, or a scale unsuited. Zero beyond the matrix.
PARAMDELTA_DEVICE_CALL Odd merge_odd(const ScaledParams& params, bool is, std::uint32_t row, std::uint32_t col) {
  if (!is) return {0.0f, 0};
  const Sum sum = sum_at(params.job, params.terms, row, col);
  const float x = rounded_value(params.job.recipe, sum.acc);
  Counts counts;
  if (!is_finite(x)) {
    count_value(counts, sum.acc, x);
    add_totals(counts, Gathered{}, params.totals);
  }
  return {x, sum.touched ? 1u : 0u};
}

PARAMDELTA_DEVICE_CALL std::uint32_t divided_codes(float x0, float x1, float x2, float x3, float factor,
                                                   bool multiply) {
  const float xs[4] = {x0, x1, x2, x3};
  std::uint32_t word = 0;
  PARAMDELTA_UNROLL
  for (int k = 0; k < 4; ++k) {
    const float y = is_inf(xs[k]) ? xs[k] : multiply ? xs[k] * factor : xs[k] / factor;
    word |= encode_code(Codec::f8_e4m3, y) << (8 * k);
  }
  return word;
}

// What quantising x lost, and x², in units of the scale squared: of a value that is finite, which y = x / scale need
// not be in binary32.
struct LostOdd {
  double error, value;
};
PARAMDELTA_DEVICE_CALL LostOdd lose_odd(float x, const BlockChoice& choice, bool multiply) {
  if (!is_finite(x)) return {0.0, 0.0};
  const std::uint32_t code = divided_codes(x, 0.0f, 0.0f, 0.0f, choice.factor, multiply) & 0xFFu;
  const double y = static_cast<double>(x) / static_cast<double>(choice.scale);
  const double e = decode<DType::f8_e4m3>(static_cast<std::uint8_t>(code)) - y;
  return {e * e, y * y};
}

PARAMDELTA_DEVICE_CALL std::uint32_t block_scale(const Matrix& matrix, const Tile& tile) {
  return load_scale(matrix.scales.dtype, matrix.scales.data, scale_index(matrix.scales, tile.row, tile.col));
}

PARAMDELTA_DEVICE_CALL void use_scale(const BlocksParams& params, int operand, std::uint32_t stored, int turn,
                                      BlocksShared& shared) {
  const Scales& s = params.operands[operand].scales;
  double scale = value_scale(s.second, s.second_value, decode_scale(s.dtype, stored));
  if (operand != 0 && is_power_of_two(params.weight)) scale = scale * params.weight;
  if (!(scale > -kMostScale && scale < kMostScale)) atomic_or(&shared.unsuited[turn], 1u);
  shared.scales[turn][operand] = scale * kCodePower;
  if (operand == 0) shared.stored[turn] = stored;
}

PARAMDELTA_DEVICE_CALL void choose_block(const BlocksParams& params, const Tile& tile, int turn, BlocksShared& shared) {
  const ScaledMerge& job = params.scaled.job;
  const std::uint32_t largest = shared.largest[turn], touched = shared.touched[turn];
  if (largest > shared.total_largest) shared.total_largest = largest;
  shared.total_touched |= touched;
  const UnitChoice unit =
      choose(job, keeps(job) ? &shared.stored[turn] : nullptr, touched != 0, bits_as<float>(largest), true);
  store_scale(job.recipe.scale_dtype, job.out_scales, unit_index(job, tile.row, tile.col), unit.scale.stored);
  BlockChoice choice;
  choice.factor = unit.scale.factor;
  choice.scale = unit.scale.scale;
  choice.copied = unit.copied ? 1u : 0u;
  choice.low = choice.high = choice.factor;
  bool serves = true;
  if (!multiplies(job.recipe)) {
    const float near = 1.0f / choice.factor;
    const std::uint32_t bits = bits_as<std::uint32_t>(near);
    // A normal number between others, so that its neighbours are one bit away; f < 0 or NaN are not.
    serves = bits > 0x00800000u && bits < 0x7F7FFFFFu;
    const double product = static_cast<double>(near) * static_cast<double>(choice.factor);  // exact
    choice.low = product > 1.0 ? bits_as<float>(bits - 1) : near;
    choice.high = product < 1.0 ? bits_as<float>(bits + 1) : near;
  }
  choice.divide = serves ? 0u : 0xFFFFFFFFu;
  shared.choice = choice;
}

// kPower: alpha is a power of two, and in the scales.
template <bool kPower>
struct BlocksKernel {
  using Params = BlocksParams;
  static constexpr int kThreads = kBlocksThreads;
  static constexpr int kBlocksPerProcessor = 2;

  struct Place {
    std::uint32_t row, col;  // in the tile
    bool is;                 // in the matrix

    PARAMDELTA_DEVICE Place(const Tile& tile, int thread, int chunk) {
      const std::uint32_t at = static_cast<std::uint32_t>(chunk * kBlocksThreads + thread);
      row = at / (kSide / 16);
      col = at % (kSide / 16) * 16;
      is = row < tile.rows && col < tile.cols;
    }
  };

  PARAMDELTA_DEVICE static Sixteen* slot(Sixteen* slots, std::uint32_t place, int operand, int chunk, int thread) {
    return slots +
           ((place * kOperands + static_cast<std::uint32_t>(operand)) * kChunks + static_cast<std::uint32_t>(chunk)) *
               kBlocksThreads +
           thread;
  }

  // Starts a thread's share of a tile's copies; zeros beyond the matrix.
  PARAMDELTA_DEVICE static void fetch(const Params& params, const TileCursor& cursor, std::uint32_t place,
                                      Sixteen* slots, int thread) {
    if (cursor.is_there(params)) {
      const Tile tile = cursor.tile(params);
      PARAMDELTA_UNROLL
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const Place at(tile, thread, chunk);
        PARAMDELTA_UNROLL
        for (int i = 0; i < kOperands; ++i)
          copy_sixteen(slot(slots, place, i, chunk, thread),
                       row_of(params.operands[i], at.is ? tile.row + at.row : 0) + (at.is ? tile.col + at.col : 0),
                       at.is);
      }
    }
    end_copies();
  }

  PARAMDELTA_DEVICE static float merge_one(double n, double from, double less, const double* scales, double weight,
                                           std::uint32_t& touched) {
    const double z = fused(-less, scales[2], fused(from, scales[1], 0.0));
    const std::uint64_t bits = bits_as<std::uint64_t>(z);
    touched |= static_cast<std::uint32_t>(bits) | static_cast<std::uint32_t>(bits >> 32);
    return static_cast<float>(fused(n, scales[0], -(kPower ? z : weight * z)));
  }

  // Values of sixteen columns, and the largest |x|.
  PARAMDELTA_DEVICE static float merge_sixteen(const Sixteen* codes, const double* scales, double weight, float* x,
                                               std::uint32_t& touched, std::uint32_t& nan) {
    float largest = 0.0f;
    PARAMDELTA_UNROLL
    for (int w = 0; w < 4; ++w) {
      const FourCodes n(codes[0].words[w]), from(codes[1].words[w]), less(codes[2].words[w]);
      nan |= nan_bits(n.codes) | nan_bits(from.codes) | nan_bits(less.codes);
      x[4 * w] = merge_one(n.value<0>(), from.value<0>(), less.value<0>(), scales, weight, touched);
      x[4 * w + 1] = merge_one(n.value<1>(), from.value<1>(), less.value<1>(), scales, weight, touched);
      x[4 * w + 2] = merge_one(n.value<2>(), from.value<2>(), less.value<2>(), scales, weight, touched);
      x[4 * w + 3] = merge_one(n.value<3>(), from.value<3>(), less.value<3>(), scales, weight, touched);
      PARAMDELTA_UNROLL
      for (int k = 0; k < 4; ++k) largest = larger_magnitude(largest, x[4 * w + k]);
    }
    return largest;
  }

  // Codes of sixteen columns, and what they lost, in units of the scale.
  PARAMDELTA_DEVICE static Sixteen encode_sixteen(const float* x, const BlockChoice& choice, bool multiply,
                                                  float& error, float& value) {
    Sixteen codes;
    std::uint32_t differ = 0;
    PARAMDELTA_UNROLL
    for (int w = 0; w < 4; ++w) {
      const float* v = x + 4 * w;
      const std::uint32_t other =
          encode_four(v[0] * choice.high, v[1] * choice.high, v[2] * choice.high, v[3] * choice.high);
      float y[4], near[4];
      PARAMDELTA_UNROLL
      for (int k = 0; k < 4; ++k) y[k] = v[k] * choice.low;
      codes.words[w] = encode_four(y[0], y[1], y[2], y[3]);
      differ |= codes.words[w] ^ other;
      decode_four(codes.words[w], near);
      PARAMDELTA_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float e = near[k] - y[k];
        error = fused(e, e, error);
        value = fused(y[k], y[k], value);
      }
    }
    if ((differ | choice.divide) != 0) {
      PARAMDELTA_UNROLL
      for (int w = 0; w < 4; ++w)
        codes.words[w] = divided_codes(x[4 * w], x[4 * w + 1], x[4 * w + 2], x[4 * w + 3], choice.factor, multiply);
    }
    return codes;
  }

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    const ScaledMerge& job = params.scaled.job;
    Sixteen* const slots = reinterpret_cast<Sixteen*>(block.shared);
    BlocksShared& shared = *reinterpret_cast<BlocksShared*>(slots + params.ahead * kSlots);
    PerThread<BlocksState, kThreads> states;
    const bool multiply = multiplies(job.recipe);

    TileCursor cursor(params, block.index), next = cursor, fetched = cursor;
    next.advance(params);
    for (std::uint32_t i = 0; i < params.ahead; ++i, fetched.advance(params))
      block.spread([&](int thread) { fetch(params, fetched, i, slots, thread); });
    block.each([&](int thread) {
      if (thread == 0) {
        shared.total_largest = shared.total_touched = 0;
        shared.unsuited[0] = shared.largest[0] = shared.touched[0] = 0;
      }
    });
    block.each([&](int thread) {
      if (thread < kOperands)
        use_scale(params, thread, block_scale(params.operands[thread], cursor.tile(params)), 0, shared);
    });

    int turn = 0;
    std::uint32_t place = 0;
    PARAMDELTA_ROLLED
    while (cursor.is_there(params)) {
      const Tile tile = cursor.tile(params);
      const bool more = next.is_there(params);
      block.each([&](int thread) {
        BlocksState& state = states.of(thread);
        // What the next tile needs is asked for here and looked at below, when it has come.
        if (thread == 0) shared.unsuited[turn ^ 1] = shared.largest[turn ^ 1] = shared.touched[turn ^ 1] = 0;
        if (more && thread >= 32 && thread - 32 < kOperands)
          state.scale = block_scale(params.operands[thread - 32], next.tile(params));
        await_copies(params.ahead - 1);
        float largest = 0.0f;
        std::uint32_t touched = 0;
        double scales[kOperands];
        PARAMDELTA_UNROLL
        for (int i = 0; i < kOperands; ++i) scales[i] = shared.scales[turn][i];
        PARAMDELTA_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          Sixteen codes[kOperands];
          PARAMDELTA_UNROLL
          for (int i = 0; i < kOperands; ++i) codes[i] = *slot(slots, place, i, chunk, thread);
          std::uint32_t touches = 0, nan = 0;
          float here = merge_sixteen(codes, scales, params.weight, state.x[chunk], touches, nan);
          if (((nan & 0x80808080u) | shared.unsuited[turn]) != 0) {
            const Place at(tile, thread, chunk);
            here = 0.0f;
            touches = 0;
            PARAMDELTA_UNROLL
            for (int k = 0; k < 16; ++k) {
              const Odd odd =
                  merge_odd(params.scaled, at.is, tile.row + at.row, tile.col + at.col + static_cast<std::uint32_t>(k));
              state.x[chunk][k] = odd.x;
              touches |= odd.touched;
              if (is_finite(odd.x)) here = larger_magnitude(here, odd.x);
            }
          }
          largest = here > largest ? here : largest;
          touched |= touches;
        }
        fetch(params, fetched, place, slots, thread);
        warp_max(thread, &shared.largest[turn], bits_as<std::uint32_t>(largest));
        warp_or(thread, &shared.touched[turn], touched != 0 ? 1u : 0u);
      });
      block.each([&](int thread) {
        if (thread == 0) choose_block(params, tile, turn, shared);
        if (more && thread >= 32 && thread - 32 < kOperands)
          use_scale(params, thread - 32, states.of(thread).scale, turn ^ 1, shared);
      });
      // No barrier behind this: the next phase touches what the other turn has.
      block.spread([&](int thread) {
        BlocksState& state = states.of(thread);
        const BlockChoice choice = shared.choice;
        float error = 0.0f, value = 0.0f;
        PARAMDELTA_UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          const Place at(tile, thread, chunk);
          Sixteen codes = encode_sixteen(state.x[chunk], choice, multiply, error, value);
          if (!at.is) continue;
          const std::size_t row = tile.row + at.row, col = tile.col + at.col;
          if (choice.copied != 0) codes = load_sixteen(row_of(job.new_base, row) + col);
          store_sixteen(static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(row) * job.out_pitch + col,
                        codes);
        }
        double lost = static_cast<double>(error), whole = static_cast<double>(value);
        if (!is_finite(error) || !is_finite(value)) {
          lost = whole = 0.0;
          PARAMDELTA_UNROLL
          for (int k = 0; k < kChunks * 16; ++k) {
            const LostOdd odd = lose_odd(state.x[k / 16][k % 16], choice, multiply);
            lost += odd.error;
            whole += odd.value;
          }
        }
        const double squared = static_cast<double>(choice.scale) * static_cast<double>(choice.scale);
        state.error += choice.copied != 0 ? 0.0 : lost * squared;
        state.value += whole * squared;
      });
      cursor = next;
      next.advance(params);
      fetched.advance(params);
      turn ^= 1;
      place = place + 1 == params.ahead ? 0 : place + 1;
    }
    block.each([&](int thread) {
      add_lost(thread, states.of(thread).error, states.of(thread).value, params.scaled.totals);
      const Gathered all{0, shared.total_largest, shared.total_touched};
      if (thread == 0) add_totals(Counts{}, all, params.scaled.totals);
    });
  }

  static constexpr std::uint32_t kSlots = kOperands * kChunks * kBlocksThreads;  // of a tile

  static std::size_t shared_bytes(std::uint32_t ahead) {
    return ahead * kSlots * sizeof(Sixteen) + sizeof(BlocksShared);
  }
};

}  // namespace paramdelta::cuda

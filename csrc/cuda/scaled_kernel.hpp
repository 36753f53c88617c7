// Kernels for quantised matrices. A block works on a tile of the output, its threads on groups of kGroup columns.
//
// Where units are small, a tile holds whole units (UnitsKernel): values are found once and kept in shared memory, each
// unit's scale is chosen, codes are made. Larger units, plain output and given scales are cut as suits (TilesKernel):
// a pass gathers each unit's largest |x| in device memory, ChooseKernel chooses, a second pass makes the codes.
// What is not finite is merged literally by the thread that meets it.
#pragma once

#include "cuda/scaled_codes.hpp"

namespace paramdelta::cuda {

struct SharedLayout {
  Unit* units;
  TilePlane* planes;
  float* values;

  PARAMDELTA_DEVICE static SharedLayout of(unsigned char* shared, std::uint32_t units, std::uint32_t planes) {
    SharedLayout layout;
    layout.planes = reinterpret_cast<TilePlane*>(shared);
    layout.units = reinterpret_cast<Unit*>(layout.planes + planes);
    // To a multiple of 16 bytes.
    const std::size_t before = (planes * sizeof(TilePlane) + units * sizeof(Unit) + 15) / 16 * 16;
    layout.values = reinterpret_cast<float*>(shared + before);
    return layout;
  }
  static std::size_t bytes(std::size_t units, std::size_t planes, std::size_t values) {
    return (planes * sizeof(TilePlane) + units * sizeof(Unit) + 15) / 16 * 16 + values * sizeof(float);
  }
};

// f(index, group) for the groups of a tile that a thread works on.
template <class F>
PARAMDELTA_DEVICE void each_group(const Tile& tile, int thread, F f) {
  const std::uint32_t across = (tile.cols + kGroup - 1) / kGroup;
  PARAMDELTA_ROLLED
  for (std::uint32_t i = static_cast<std::uint32_t>(thread); i < tile.rows * across; i += kScaledThreads) {
    const std::uint32_t row = i / across, col = (i - row * across) * kGroup;
    const std::uint32_t rest = tile.cols - col;
    f(row * across * kGroup + col,
      Group{tile.row + row, tile.col + col, rest < kGroup ? static_cast<int>(rest) : static_cast<int>(kGroup)});
  }
}

PARAMDELTA_DEVICE void prepare_planes(const ScaledParams& params, const Tile& tile, int thread, TilePlane* planes) {
  for (std::uint32_t i = static_cast<std::uint32_t>(thread); i < 1 + 2 * params.job.n_terms; i += kScaledThreads) {
    const MatrixTerm& term = params.terms[i == 0 ? 0 : (i - 1) / 2];
    prepare_plane(i == 0 ? params.job.new_base : i % 2 == 1 ? term.post : term.base, tile, planes[i]);
  }
}

// A tile of whole units, side by side.
template <bool kE4m3>
struct UnitsKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    const ScaledMerge& job = params.job;
    const Tile tile = tile_of(params, block.index);
    const SharedLayout shared =
        SharedLayout::of(block.shared, params.units_across, static_cast<std::uint32_t>(1 + 2 * job.n_terms));
    const std::uint32_t n_units = (tile.cols + params.unit_cols - 1) / params.unit_cols;
    const bool whole_groups = params.unit_cols % kGroup == 0;
    const auto unit_of = [&](const Group& group, int k) {
      return (group.col - tile.col + static_cast<std::uint32_t>(k)) / params.unit_cols;
    };

    block.each([&](int thread) {
      prepare_planes(params, tile, thread, shared.planes);
      for (std::uint32_t u = static_cast<std::uint32_t>(thread); u < n_units; u += kScaledThreads)
        shared.units[u] = Unit{};
    });
    block.each([&](int thread) {
      Counts counts;
      Gathered gathered;
      each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
        double acc[kGroup];
        std::uint32_t touched;
        merge_group<kE4m3>(params, shared.planes, group, acc, touched);
        std::uint32_t unit = unit_of(group, 0);
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          const float x = round_value(job.recipe, acc[k]);
          shared.values[index + static_cast<std::uint32_t>(k)] = x;
          if (!is_finite(x)) count_value(counts, acc[k], x);
          if (!whole_groups && k < group.n) unit = unit_of(group, k);
          if (k < group.n) gathered.add(shared.units, unit, bits_as<std::uint32_t>(x) & 0x7FFFFFFFu, touched >> k & 1u);
        }
      });
      gathered.tell(shared.units);
      add_totals(counts, Gathered{}, params.totals);
    });
    if (asks_fit(job)) {
      block.each([&](int thread) {
        each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
          for (int k = 0; k < group.n; ++k) {
            check_fit(job, group.row, group.col + static_cast<std::uint32_t>(k),
                      shared.values[index + static_cast<std::uint32_t>(k)], shared.units[unit_of(group, k)]);
          }
        });
      });
    }
    block.each([&](int thread) {
      Gathered all;
      for (std::uint32_t u = static_cast<std::uint32_t>(thread); u < n_units; u += kScaledThreads) {
        Unit& unit = shared.units[u];
        all.largest = unit.largest > all.largest ? unit.largest : all.largest;
        all.touched |= unit.touched;
        choose_unit(params, tile.row, tile.col + u * params.unit_cols, unit);
      }
      add_totals(Counts{}, all, params.totals);
    });
    block.each([&](int thread) {
      Lost lost;
      each_group(tile, thread, [&](std::uint32_t index, const Group& group) {
        float x[kGroup];
        const Unit* units[kGroup];
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          x[k] = shared.values[index + static_cast<std::uint32_t>(k)];
          units[k] = shared.units + (k == 0 || (!whole_groups && k < group.n) ? unit_of(group, k) : unit_of(group, 0));
        }
        encode_group(params, group, x, units, lost);
      });
      lost.settle();
      add_lost(thread, lost.error, lost.value, params.totals);
    });
  }
};

// Plain output of one element that is NaN, infinite or overflows.
PARAMDELTA_DEVICE_CALL void store_odd(const ScaledParams& params, std::uint32_t row, std::uint32_t col, Sum sum,
                                      unsigned char* to, Counts& counts) {
  const ScaledMerge& job = params.job;
  std::uint64_t code = 0;
  const bool overflow = store_at(job.out_dtype, sum.acc, &code);
  count(counts, sum.acc, overflow);
  if (!sum.touched && keeps_bits(job)) code = code_at(job.new_base, row, col);
  if (params.stage == Stage::plain)
    for (std::size_t i = 0; i < size_of(job.out_dtype); ++i) to[i] = static_cast<unsigned char>(code >> (8 * i));
}

// Plain output: acc of a group rounded once.
template <DType D>
PARAMDELTA_DEVICE void store_plain_as(const ScaledParams& params, const Group& group, const double* acc,
                                      std::uint32_t touched, Counts& counts) {
  using Code = typename Format<D>::Code;
  const ScaledMerge& job = params.job;
  alignas(16) Code codes[kGroup];
  bool ordinary = group.n == static_cast<int>(kGroup);
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    codes[k] = narrow<D>(acc[k]);
    ordinary = ordinary && is_ordinary<D>(acc[k]);
  }
  unsigned char* to = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(group.row) * job.out_pitch +
                      group.col * sizeof(Code);
  if (ordinary) {
    if (params.stage == Stage::plain) store_codes<static_cast<int>(kGroup)>(codes, to);
    return;
  }
  PARAMDELTA_UNROLL
  for (int k = 0; k < static_cast<int>(kGroup); ++k) {
    if (k >= group.n) continue;
    unsigned char* at = to + static_cast<std::size_t>(k) * sizeof(Code);
    if (!is_ordinary<D>(acc[k]))
      store_odd(params, group.row, group.col + static_cast<std::uint32_t>(k), Sum{acc[k], (touched >> k & 1u) != 0}, at,
                counts);
    else if (params.stage == Stage::plain)
      std::memcpy(at, codes + k, sizeof(Code));
  }
}

PARAMDELTA_DEVICE void store_plain(const ScaledParams& params, const Group& group, const double* acc,
                                   std::uint32_t touched, Counts& counts) {
  switch (params.job.out_dtype) {
    case DType::bf16: return store_plain_as<DType::bf16>(params, group, acc, touched, counts);
    case DType::f16: return store_plain_as<DType::f16>(params, group, acc, touched, counts);
    case DType::f32: return store_plain_as<DType::f32>(params, group, acc, touched, counts);
    case DType::f64: return store_plain_as<DType::f64>(params, group, acc, touched, counts);
    case DType::f8_e4m3: return store_plain_as<DType::f8_e4m3>(params, group, acc, touched, counts);
    default: return store_plain_as<DType::f8_e5m2>(params, group, acc, touched, counts);
  }
}

// Any tile, one stage of the work. Where params.units is null, all is one unit that nobody asks about, and codes are
// made against the given scale.
template <bool kE4m3>
struct TilesKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    const ScaledMerge& job = params.job;
    const Tile tile = tile_of(params, block.index);
    const SharedLayout shared = SharedLayout::of(block.shared, 1, static_cast<std::uint32_t>(1 + 2 * job.n_terms));
    const auto unit_of = [&](const Group& group, int k) {
      return group.row / params.unit_rows * params.units_across +
             (group.col + static_cast<std::uint32_t>(k)) / params.unit_cols;
    };
    block.each([&](int thread) {
      prepare_planes(params, tile, thread, shared.planes);
      if (thread != 0) return;
      shared.units[0] = Unit{};
      if (job.given) shared.units[0].scale = choose(job, nullptr, true, 0.0f, true).scale;
    });
    block.each([&](int thread) {
      Counts counts;
      Gathered all, gathered;
      Lost lost;
      each_group(tile, thread, [&](std::uint32_t, const Group& group) {
        double acc[kGroup];
        std::uint32_t touched;
        merge_group<kE4m3>(params, shared.planes, group, acc, touched);
        all.touched |= touched;
        if (!job.quantised) return store_plain(params, group, acc, touched, counts);
        float x[kGroup];
        const Unit* units[kGroup];
        PARAMDELTA_UNROLL
        for (int k = 0; k < static_cast<int>(kGroup); ++k) {
          x[k] = round_value(job.recipe, acc[k]);
          const std::uint32_t magnitude = bits_as<std::uint32_t>(x[k]) & 0x7FFFFFFFu;
          if (!is_finite(x[k])) count_value(counts, acc[k], x[k]);
          if (magnitude < 0x7F800000u && magnitude > all.largest) all.largest = magnitude;
          if (k >= group.n || params.units == nullptr) {
            units[k] = shared.units;
            continue;
          }
          const std::uint32_t unit = unit_of(group, k);
          units[k] = params.units + unit;
          if (params.stage == Stage::measure) gathered.add(params.units, unit, magnitude, touched >> k & 1u);
          if (params.stage == Stage::fit)
            check_fit(job, group.row, group.col + static_cast<std::uint32_t>(k), x[k], params.units[unit]);
        }
        if (params.stage == Stage::encode) encode_group(params, group, x, units, lost);
      });
      gathered.tell(params.units);
      lost.settle();
      if (!params.counts) {
        counts = Counts{};
        all = Gathered{};
      }
      if (!job.quantised) all.largest = 0;
      add_totals(counts, all, params.totals);
      add_lost(thread, lost.error, lost.value, params.totals);
    });
  }
};

// One thread for each unit of the output: `measure` clears it, `encode` chooses its scale.
struct ChooseKernel {
  using Params = ScaledParams;
  static constexpr int kThreads = kScaledThreads;

  PARAMDELTA_DEVICE static void block(Block& block, const Params& params) {
    block.each([&](int thread) {
      const std::uint64_t u = std::uint64_t{block.index} * kThreads + static_cast<std::uint64_t>(thread);
      const std::uint64_t down = (params.job.rows + params.unit_rows - 1) / params.unit_rows;
      if (u >= down * params.units_across) return;
      const std::uint32_t row = static_cast<std::uint32_t>(u / params.units_across) * params.unit_rows;
      const std::uint32_t col = static_cast<std::uint32_t>(u % params.units_across) * params.unit_cols;
      if (params.stage == Stage::measure)
        params.units[u] = Unit{};
      else
        choose_unit(params, row, col, params.units[u]);
    });
  }
};

}  // namespace paramdelta::cuda

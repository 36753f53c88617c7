// The launches of scaled.hpp: how a region is cut, and which passes it takes.
#include <algorithm>
#include <string>

#include "cuda/blocks_kernel.hpp"
#include "cuda/scaled.hpp"
#include "cuda/scaled_kernel.hpp"

namespace paramdelta::cuda {
namespace {

std::uint32_t clamped(std::uint32_t unit, std::size_t extent) {
  return unit == 0 || unit > extent ? static_cast<std::uint32_t>(extent) : unit;
}

std::uint32_t rounded_up(std::uint32_t n, std::uint32_t to) { return (n + to - 1) / to * to; }

// How UnitsKernel cuts: the columns of a tile, 0 where it cannot do it at all.
std::uint32_t units_tile(const ScaledMerge& job, std::uint32_t unit_rows, std::uint32_t unit_cols) {
  const bool nibbles = bits_of(job.recipe.codec) == 4;
  const std::uint64_t cols = job.cols;
  const auto fits = [&](std::uint64_t width) {
    return unit_rows * std::uint64_t{rounded_up(static_cast<std::uint32_t>(width), kGroup)} <= kKeptValues &&
           (width + unit_cols - 1) / unit_cols <= kMostUnits;
  };
  std::uint64_t step = unit_cols;
  if (nibbles && unit_cols % 2 != 0) step *= 2;  // no two tiles share a byte
  if (step >= cols) return fits(cols) ? static_cast<std::uint32_t>(cols) : 0;
  if (!fits(step)) return 0;
  // Some thousands of values, so that every thread has a few groups, or one unit.
  std::uint64_t width = step;
  while (width + step <= cols && unit_rows * (width + step) <= 8192 && fits(width + step)) width += step;
  return static_cast<std::uint32_t>(width);
}

bool all_e4m3(const ScaledMerge& job) {
  bool all = job.new_base.codec == Codec::f8_e4m3;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    all = all && job.terms[t].post.codec == Codec::f8_e4m3 && job.terms[t].base.codec == Codec::f8_e4m3;
  return all;
}

std::uint64_t tiles(ScaledParams& params) {
  params.tiles_across = static_cast<std::uint32_t>((params.job.cols + params.tile_cols - 1) / params.tile_cols);
  return (params.job.rows + params.tile_rows - 1) / params.tile_rows * params.tiles_across;
}

template <template <bool> class Kernel>
void launch_tiles(ScaledParams& params, std::size_t units, std::size_t values, Stream stream) {
  const std::size_t shared = SharedLayout::bytes(units, 1 + 2 * params.job.n_terms, values);
  const std::uint64_t blocks = tiles(params);
  if (params.all_e4m3)
    launch<Kernel<true>>(blocks, shared, params, stream);
  else
    launch<Kernel<false>>(blocks, shared, params, stream);
}

bool is_wide(const void* data, std::ptrdiff_t pitch) {
  return data != nullptr && reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && pitch % 16 == 0;
}

// Whether every block of the output lies in one cell of an operand's grid, and 16 bytes can be read at once.
bool suits_blocks(const Matrix& matrix) {
  const Scales& s = matrix.scales;
  const auto divides = [](std::uint32_t unit, std::uint32_t phase) {
    return unit == 0 || (unit % kSide == 0 && phase % kSide == 0);
  };
  return matrix.codec == Codec::f8_e4m3 && s.data != nullptr && divides(s.rows, s.row_phase) &&
         divides(s.cols, s.col_phase) && is_wide(matrix.data, matrix.pitch);
}

// Whether a merge is BlocksKernel's.
bool suits_blocks(const ScaledMerge& job, const MatrixTerm* terms) {
  if (job.n_terms != 1 || job.grid_rows != kSide || job.grid_cols != kSide || job.cols % 16 != 0) return false;
  if (job.recipe.codec != Codec::f8_e4m3 || job.recipe.values_bf16) return false;
  const double weight = terms[0].alpha < 0.0 ? -terms[0].alpha : terms[0].alpha;
  return weight >= 0x1p-64 && weight <= 0x1p64 && is_wide(job.out, job.out_pitch) && suits_blocks(job.new_base) &&
         suits_blocks(terms[0].post) && suits_blocks(terms[0].base);
}

template <bool kPower>
void launch_blocks(BlocksParams& params, int device, Stream stream) {
  using Kernel = BlocksKernel<kPower>;
  const Processors on = processors(device);
  // Two tiles on their way to each block, where a processor has the memory for it.
  params.ahead = on.shared_bytes >= Kernel::kBlocksPerProcessor * (Kernel::shared_bytes(kMostTilesAhead) + 1024)
                     ? kMostTilesAhead
                     : 1;
  params.stride = std::min(params.tiles, static_cast<std::uint32_t>(on.count * Kernel::kBlocksPerProcessor));
  params.stride_down = params.stride / params.scaled.tiles_across;
  params.stride_across = params.stride % params.scaled.tiles_across;
  launch<Kernel>(params.stride, Kernel::shared_bytes(params.ahead), params, stream);
}

void merge_blocks(const ScaledParams& scaled, int device, Stream stream) {
  BlocksParams params;
  params.scaled = scaled;
  params.scaled.tile_rows = params.scaled.tile_cols = kSide;
  const std::uint64_t blocks = tiles(params.scaled);
  if (blocks > 0x7FFFFFFFu) throw std::invalid_argument("a matrix has at most 2^31 - 1 blocks: merge in parts");
  params.tiles = static_cast<std::uint32_t>(blocks);
  const MatrixTerm& term = scaled.terms[0];
  const bool adds = term.alpha > 0.0;
  params.operands[0] = scaled.job.new_base;
  params.operands[1] = adds ? term.base : term.post;
  params.operands[2] = adds ? term.post : term.base;
  params.weight = adds ? term.alpha : -term.alpha;
  if (is_power_of_two(params.weight))
    launch_blocks<true>(params, device, stream);
  else
    launch_blocks<false>(params, device, stream);
}

// Whether scales follow from values, so that they must be known before codes are made.
bool needs_units(const ScaledMerge& job, ScaledEffect effect) {
  return job.quantised && !job.given && effect == ScaledEffect::write;
}

std::size_t units_of(const ScaledMerge& job) {
  const std::size_t rows = clamped(job.grid_rows, job.rows), cols = clamped(job.grid_cols, job.cols);
  return (job.rows + rows - 1) / rows * ((job.cols + cols - 1) / cols);
}

void refuse(const ScaledMerge& job, const ScaledTotals* totals) {
  if (job.rows > 0x7FFFFFFFu || job.cols > 0x7FFFFFFFu)
    throw std::invalid_argument("a matrix has at most 2^31 - 1 rows and columns");
  if (totals == nullptr) throw std::invalid_argument("totals has no memory");
}

}  // namespace

std::size_t most_scaled_terms() { return kMostScaledTerms; }

std::size_t workspace_bytes(const ScaledMerge& job, ScaledEffect effect) {
  if (job.rows == 0 || job.cols == 0 || !needs_units(job, effect)) return 0;
  const std::uint32_t rows = clamped(job.grid_rows, job.rows), cols = clamped(job.grid_cols, job.cols);
  return units_tile(job, rows, cols) != 0 ? 0 : units_of(job) * sizeof(Unit);
}

void merge_scaled(const ScaledMerge& given, ScaledEffect effect, ScaledTotals* totals, void* workspace, int device,
                  Stream stream) {
  if (given.rows == 0 || given.cols == 0) return;
  refuse(given, totals);
  ScaledParams params;
  params.job = given;
  params.job.terms = nullptr;
  params.job.n_terms = 0;
  for (std::size_t t = 0; t < given.n_terms; ++t) {
    if (given.terms[t].alpha == 0.0) continue;  // no term at all: not even 0 · Inf of it is
    if (params.job.n_terms == kMostScaledTerms)
      throw std::invalid_argument("a merge of quantised matrices on a GPU has at most " +
                                  std::to_string(kMostScaledTerms) + " deltas: merge in parts, or on the CPU");
    params.terms[params.job.n_terms++] = given.terms[t];
  }
  const ScaledMerge& job = params.job;
  params.totals = totals;
  params.all_e4m3 = all_e4m3(given);
  params.unit_rows = clamped(job.grid_rows, job.rows);
  params.unit_cols = clamped(job.grid_cols, job.cols);
  const OnDevice current(device);

  if (needs_units(job, effect)) {
    if (suits_blocks(job, params.terms)) return merge_blocks(params, device, stream);
    const std::uint32_t width = units_tile(job, params.unit_rows, params.unit_cols);
    if (width != 0) {
      params.tile_rows = params.unit_rows;
      params.tile_cols = width;
      params.units_across = (width + params.unit_cols - 1) / params.unit_cols;
      const std::size_t values = std::size_t{params.unit_rows} * rounded_up(width, kGroup);
      return launch_tiles<UnitsKernel>(params, params.units_across, values, stream);
    }
  }
  params.tile_rows = 16;
  params.tile_cols = 1024;
  if (!needs_units(job, effect)) {
    params.stage = effect == ScaledEffect::measure ? Stage::measure : job.quantised ? Stage::encode : Stage::plain;
    return launch_tiles<TilesKernel>(params, 1, 0, stream);
  }
  const std::size_t units = units_of(job);
  if (units > 0xFFFFFFF0u) throw std::invalid_argument("a matrix has at most 2^32 units");
  if (workspace == nullptr) throw std::invalid_argument("workspace has no memory");
  params.units = static_cast<Unit*>(workspace);
  params.units_across = static_cast<std::uint32_t>((job.cols + params.unit_cols - 1) / params.unit_cols);
  const std::uint64_t blocks = (units + kScaledThreads - 1) / kScaledThreads;
  params.stage = Stage::measure;
  launch<ChooseKernel>(blocks, 0, params, stream);
  launch_tiles<TilesKernel>(params, 1, 0, stream);
  params.counts = false;
  if (keeps(job) && job.recipe.codec == Codec::i4) {
    params.stage = Stage::fit;
    launch_tiles<TilesKernel>(params, 1, 0, stream);
  }
  params.stage = Stage::encode;
  launch<ChooseKernel>(blocks, 0, params, stream);
  launch_tiles<TilesKernel>(params, 1, 0, stream);
}

}  // namespace paramdelta::cuda

// The entries of scaled.hpp: the floating-point mode, terms that are none, scratch memory, the choice of loops.
#include "cpu/scaled.hpp"

#include <memory>

#include "cpu/float_mode.hpp"
#include "cpu/parallel.hpp"
#include "cpu/scaled_exact.hpp"
#include "cpu/scaled_work.hpp"
#include "cpu/targets.hpp"

namespace paramdelta::cpu {
namespace {

ScaledResult scaled_region(Isa isa, const ScaledMerge& job, ScaledWork& work) {
  switch (isa) {
#if PARAMDELTA_X86
    case Isa::avx512: return avx512::scaled_region(job, work);
    case Isa::avx2: return avx2::scaled_region(job, work);
#endif
    default: return scalar::scaled_region(job, work);
  }
}

void prepare(const Matrix& matrix, Plane& plane) {
  const Scales& s = matrix.scales;
  plane.matrix = &matrix;
  plane.bytes = s.data != nullptr && scale_size(s.dtype) == 1;
  for (std::size_t i = 0; i < kTileCols; ++i) plane.scales[i] = 1.0;
  for (std::size_t i = 0; i < kTileCols; ++i) plane.zeros[i] = 0.0f;
  if (!plane.bytes) return;
  for (std::uint32_t byte = 0; byte < 256; ++byte)
    plane.table[byte] = value_scale(s.second, s.second_value, decode_scale(s.dtype, byte));
}

ScaledResult run(Isa isa, const ScaledMerge& given, bool measure) {
  if (given.rows == 0 || given.cols == 0) return {};
  const DefaultFloatMode mode;
  ScaledMerge job = given;
  std::vector<MatrixTerm> terms;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    if (job.terms[t].alpha != 0.0) terms.push_back(job.terms[t]);
  job.terms = terms.data();
  job.n_terms = terms.size();

  const std::unique_ptr<ScaledWork> work(new ScaledWork);
  const std::unique_ptr<Plane[]> planes(new Plane[2 * job.n_terms]);
  const std::unique_ptr<float[]> kept(new float[kKept + kTileCols]);
  prepare(job.new_base, work->new_base);
  for (std::size_t t = 0; t < job.n_terms; ++t) {
    prepare(terms[t].post, planes[2 * t]);
    prepare(terms[t].base, planes[2 * t + 1]);
  }
  work->terms = planes.get();
  work->kept = kept.get();
  work->measure = measure;
  return scaled_region(isa, job, *work);
}

Matrix rows_from(Matrix matrix, std::size_t first) {
  if (matrix.data == nullptr) return matrix;
  matrix.data = static_cast<const unsigned char*>(matrix.data) + static_cast<std::ptrdiff_t>(first) * matrix.pitch;
  Scales& s = matrix.scales;
  const std::size_t row = s.row_phase + first, zero_row = s.zero_phase + first;
  s.row_phase = static_cast<std::uint32_t>(s.rows == 0 ? 0 : row % s.rows);
  s.zero_phase = static_cast<std::uint32_t>(zero_row % 8);
  if (s.data != nullptr && s.rows != 0)  // whole rows of the grid go into the pointers
    s.data = static_cast<const unsigned char*>(s.data) +
             static_cast<std::ptrdiff_t>(row / s.rows * scale_size(s.dtype)) * s.pitch;
  if (s.zero_points != nullptr)
    s.zero_points = static_cast<const unsigned char*>(s.zero_points) +
                    static_cast<std::ptrdiff_t>(zero_row / 8 * sizeof(std::uint32_t)) * s.zero_pitch;
  return matrix;
}

// Whole rows of units at a time, some 2^17 elements.
std::size_t rows_at_a_time(const ScaledMerge& job) {
  const bool free = !job.quantised || job.given;
  if (!free && job.grid_rows == 0) return job.rows;
  const std::size_t unit = free ? 1 : job.grid_rows;
  const std::size_t units = kPiece / (unit * (job.cols == 0 ? 1 : job.cols));
  return unit * (units == 0 ? 1 : units);
}

ScaledResult run_parallel(Isa isa, const ScaledMerge& job, int threads, bool measure) {
  const std::size_t step = rows_at_a_time(job);
  if (threads <= 1 || step >= job.rows) return run(isa, job, measure);
  const std::size_t pieces = (job.rows + step - 1) / step;
  std::vector<ScaledResult> results(pieces);
  for_each_step(pieces, threads, [&](std::size_t, std::size_t piece) {
    std::vector<MatrixTerm> terms;
    const std::size_t first = piece * step, rest = job.rows - first;
    results[piece] = run(isa, rows_of(job, first, rest < step ? rest : step, terms), measure);
  });
  ScaledResult total;
  for (const ScaledResult& each : results) {
    total.counts += each.counts;
    total.touched = total.touched || each.touched;
    if (each.amax > total.amax) total.amax = each.amax;
    total.error_squared += each.error_squared;
    total.value_squared += each.value_squared;
  }
  return total;
}

}  // namespace

ScaledMerge rows_of(const ScaledMerge& job, std::size_t first, std::size_t count, std::vector<MatrixTerm>& terms) {
  terms.assign(job.terms, job.terms + job.n_terms);
  for (MatrixTerm& term : terms) {
    term.post = rows_from(term.post, first);
    term.base = rows_from(term.base, first);
  }
  ScaledMerge part = job;
  part.new_base = rows_from(job.new_base, first);
  part.terms = terms.data();
  part.rows = count;
  if (job.out != nullptr)
    part.out = static_cast<unsigned char*>(job.out) + static_cast<std::ptrdiff_t>(first) * job.out_pitch;
  if (job.out_scales != nullptr && job.grid_rows != 0)
    part.out_scales = static_cast<unsigned char*>(job.out_scales) +
                      static_cast<std::ptrdiff_t>(first / job.grid_rows) * job.out_scale_pitch *
                          static_cast<std::ptrdiff_t>(scale_size(job.recipe.scale_dtype));
  return part;
}

ScaledResult merge_scaled(Isa isa, const ScaledMerge& job) { return run(isa, job, false); }
ScaledResult measure_scaled(Isa isa, const ScaledMerge& job) { return run(isa, job, true); }

ScaledResult merge_scaled_parallel(Isa isa, const ScaledMerge& job, int threads) {
  return run_parallel(isa, job, threads, false);
}
ScaledResult measure_scaled_parallel(Isa isa, const ScaledMerge& job, int threads) {
  return run_parallel(isa, job, threads, true);
}

}  // namespace paramdelta::cpu

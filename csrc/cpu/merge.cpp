// The entries of merge.hpp: the floating-point mode, terms that are none, the choice of loops.
#include "cpu/merge.hpp"

#include <algorithm>

#include "cpu/float_mode.hpp"
#include "cpu/parallel.hpp"
#include "cpu/targets.hpp"

namespace paramdelta::cpu {
namespace {

Counts merge_range(Isa isa, const Merge& job, Store store) {
  switch (isa) {
#if PARAMDELTA_X86
    case Isa::avx512: return avx512::merge_range(job, store);
    case Isa::avx2: return avx2::merge_range(job, store);
#endif
    default: return scalar::merge_range(job, store);
  }
}

bool has_idle_term(const Merge& job) {
  for (std::size_t t = 0; t < job.n_terms; ++t)
    if (job.terms[t].alpha == 0.0) return true;
  return false;
}

// Elements [first, first + count) of `job`; `terms` must outlive the result.
Merge part_of(const Merge& job, std::size_t first, std::size_t count, std::vector<Term>& terms) {
  terms.assign(job.terms, job.terms + job.n_terms);
  for (Term& term : terms) {
    term.post = advanced(term.post, first);
    term.base = advanced(term.base, first);
  }
  Merge part = job;
  part.new_base = advanced(job.new_base, first);
  part.terms = terms.data();
  part.out = static_cast<unsigned char*>(job.out) + first * size_of(job.out_dtype);
  part.count = count;
  return part;
}

}  // namespace

Counts merge(Isa isa, const Merge& job, Store store) {
  if (job.count == 0) return {};
  const DefaultFloatMode mode;
  if (!has_idle_term(job)) return merge_range(isa, job, store);
  // A term with alpha == 0 is no term at all: not even 0 · Inf of it is.
  std::vector<Term> terms;
  for (std::size_t t = 0; t < job.n_terms; ++t)
    if (job.terms[t].alpha != 0.0) terms.push_back(job.terms[t]);
  Merge rest = job;
  rest.terms = terms.data();
  rest.n_terms = terms.size();
  return merge_range(isa, rest, store);
}

Counts merge_parallel(Isa isa, const Merge& job, Store store, int threads) {
  if (pieces_for(job.count, threads) <= 1) return merge(isa, job, store);
  std::vector<Counts> counts(static_cast<std::size_t>(threads));
  for_each_piece(job.count, threads, [&](std::size_t worker, std::size_t first, std::size_t count) {
    std::vector<Term> terms;
    counts[worker] += merge(isa, part_of(job, first, count, terms), store);
  });
  Counts total;
  for (const Counts& each : counts) total += each;
  return total;
}

std::vector<Counts> merge_many(Isa isa, const std::vector<Merge>& jobs, std::size_t streamed_from, int threads) {
  struct Piece {
    std::size_t job, first, count;
  };
  std::vector<Piece> pieces;
  pieces.reserve(jobs.size());
  std::vector<std::size_t> loads;  // the first piece of each: what a thread takes at once
  std::size_t load = kPiece;       // elements in the last of them
  for (std::size_t j = 0; j < jobs.size(); ++j) {
    const std::size_t size = piece_size(jobs[j].count, threads);
    for (std::size_t first = 0; first < jobs[j].count; first += size) {
      const std::size_t count = std::min(size, jobs[j].count - first);
      if (load >= kPiece) loads.push_back(pieces.size()), load = 0;
      pieces.push_back({j, first, count});
      load += count;
    }
  }
  loads.push_back(pieces.size());
  std::vector<Counts> found(pieces.size());
  for_each_step(loads.size() - 1, threads, [&](std::size_t, std::size_t step) {
    std::vector<Term> terms;
    for (std::size_t p = loads[step]; p < loads[step + 1]; ++p) {
      const Merge& job = jobs[pieces[p].job];
      const Store store = job.count * size_of(job.out_dtype) >= streamed_from ? Store::streamed : Store::cached;
      found[p] = pieces[p].count == job.count
                     ? merge(isa, job, store)
                     : merge(isa, part_of(job, pieces[p].first, pieces[p].count, terms), store);
    }
  });
  std::vector<Counts> counts(jobs.size());
  for (std::size_t p = 0; p < pieces.size(); ++p) counts[pieces[p].job] += found[p];
  return counts;
}

}  // namespace paramdelta::cpu

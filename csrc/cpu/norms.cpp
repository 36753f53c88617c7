// The entries of norms.hpp: the floating-point mode, threads, the choice of loops.
#include "cpu/norms.hpp"

#include "cpu/float_mode.hpp"
#include "cpu/parallel.hpp"
#include "cpu/targets.hpp"

namespace paramdelta::cpu {

static_assert(kCut % kLeaf == 0, "pieces are whole leaves");

void add_norms(Isa isa, const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
               NormSums& sums) {
  const DefaultFloatMode mode;
  switch (isa) {
#if PARAMDELTA_X86
    case Isa::avx512: return avx512::add_norms_range(post, base, new_base, count, sums);
    case Isa::avx2: return avx2::add_norms_range(post, base, new_base, count, sums);
#endif
    default: return scalar::add_norms_range(post, base, new_base, count, sums);
  }
}

NormSums norms_parallel(Isa isa, const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                        int threads) {
  std::vector<NormSums> parts(static_cast<std::size_t>(threads < 1 ? 1 : threads));
  for_each_piece(count, threads, [&](std::size_t worker, std::size_t first, std::size_t n) {
    add_norms(isa, advanced(post, first), advanced(base, first), advanced(new_base, first), n, parts[worker]);
  });
  for (std::size_t worker = 1; worker < parts.size(); ++worker) parts[0].merge(parts[worker]);
  return parts[0];
}

}  // namespace paramdelta::cpu

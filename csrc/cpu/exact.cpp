// The literal element-wise merge of exact.hpp.
#include "cpu/exact.hpp"

#include "core/literal.hpp"

namespace paramdelta::cpu {

Counts merge_exact(const Merge& job, std::size_t first, std::size_t n, void* out) {
  Counts counts;
  for (std::size_t k = 0; k < n; ++k) {
    const std::size_t i = first + k;
    store_sum(sum_at(job.new_base, job.terms, job.n_terms, i), job.new_base, i, job.out_dtype,
              static_cast<unsigned char*>(out) + k * size_of(job.out_dtype), counts);
  }
  return counts;
}

}  // namespace paramdelta::cpu

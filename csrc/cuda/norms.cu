// The launches of norms.hpp.
#include <stdexcept>
#include <string>

#include "cuda/norms.hpp"
#include "cuda/norms_kernel.hpp"

namespace paramdelta::cuda {
namespace {

template <class Rows>
void add_norms_with(const NormsParams& params, Stream stream) {
  using Kernel = NormsKernel<Rows>;
  launch<Kernel>((params.count + kLeaf - 1) / kLeaf, sizeof(typename Kernel::Shared), params, stream);
}

}  // namespace

void add_norms(const Operand& post, const Operand& base, const Operand& new_base, std::uint64_t count,
               NormTotals* totals, int device, Stream stream) {
  if (totals == nullptr) throw std::invalid_argument("totals has no memory");
  // Nothing carries on the device.
  if (count > kExactAdditions * std::uint64_t{kLeaf})
    throw std::invalid_argument("norms on a GPU are of at most 2^41 elements, not " + std::to_string(count));
  const OnDevice current(device);
  const NormsParams params{post, base, new_base, count, totals};
  if (post.dtype == base.dtype && base.dtype == new_base.dtype) {
    switch (post.dtype) {
      case DType::bf16: return add_norms_with<UniformRows<DType::bf16>>(params, stream);
      case DType::f16: return add_norms_with<UniformRows<DType::f16>>(params, stream);
      case DType::f32: return add_norms_with<UniformRows<DType::f32>>(params, stream);
      default: break;
    }
  }
  add_norms_with<MixedRows>(params, stream);
}

NormSums sums_of(const NormTotals& totals) {
  const auto sum = [&](int k) { return ExactSum(totals.digits[k], totals.special[k]); };
  return {sum(0), sum(1), sum(2), totals.largest_delta};
}

}  // namespace paramdelta::cuda

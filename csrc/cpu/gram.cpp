// The entries of gram.hpp: checks, the floating-point mode, the choice of loops.
#include "cpu/gram.hpp"

#include <memory>
#include <stdexcept>

#include "cpu/float_mode.hpp"
#include "cpu/norms.hpp"
#include "cpu/targets.hpp"

namespace paramdelta::cpu {
namespace {

constexpr std::size_t kRow = 256;

void run(Isa isa, const GramRange& range) {
  const DefaultFloatMode mode;
  switch (isa) {
#if PARAMDELTA_X86
    case Isa::avx512: return avx512::add_gram_range(range);
    case Isa::avx2: return avx2::add_gram_range(range);
#endif
    default: return scalar::add_gram_range(range);
  }
}

}  // namespace

GramSums::GramSums(std::size_t operands, std::vector<Difference> differences, std::vector<Product> products)
    : operands_(operands),
      differences_(std::move(differences)),
      products_(std::move(products)),
      sums_(products_.size()),
      facts_(differences_.size()) {
  const auto there = [&](std::int32_t number) { return number >= 0 && static_cast<std::size_t>(number) < operands_; };
  for (const Difference& d : differences_)
    if (!there(d.minuend) || !(there(d.subtrahend) || d.subtrahend == Difference::kNothing))
      throw std::invalid_argument("a difference of operands that are not there");
  for (const auto& [i, j] : products_)
    if (i >= differences_.size() || j >= differences_.size())
      throw std::invalid_argument("a product of differences that are not there");
}

void GramSums::add(Isa isa, const std::vector<Operand>& operands, std::size_t count, std::uint64_t first) {
  if (operands.size() != operands_) throw std::invalid_argument("another number of operands");
  if (first % kLeaf != 0) throw std::invalid_argument("a part begins within a leaf");
  std::vector<float> rows(kRow * (operands.size() + differences_.size() + products_.size()) + 16);
  void* memory = rows.data();
  std::size_t space = rows.size() * sizeof(float);
  GramRange range;
  range.operands = operands.data();
  range.n_operands = operands.size();
  range.differences = differences_.data();
  range.n_differences = differences_.size();
  range.products = products_.data();
  range.n_products = products_.size();
  range.count = count;
  range.first = first;
  range.rows = static_cast<float*>(std::align(64, space - 64, memory, space));
  range.sums = sums_.data();
  range.facts = facts_.data();
  run(isa, range);
}

void GramSums::merge(const GramSums& other) {
  if (other.sums_.size() != sums_.size()) throw std::invalid_argument("sums of another kind");
  for (std::size_t p = 0; p < sums_.size(); ++p) sums_[p].merge(other.sums_[p]);
}

std::vector<double> GramSums::products() const {
  std::vector<double> rounded;
  rounded.reserve(sums_.size());
  for (const ExactSum& sum : sums_) rounded.push_back(sum.rounded());
  return rounded;
}

}  // namespace paramdelta::cpu

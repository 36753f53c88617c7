// What an analysis wants of a few checkpoints at once: inner products of differences of operands (the Gram matrix, or a
// part of it), and of each difference its largest element, how many are not finite, and how many are bit-equal.
//
// Operands are rounded to binary32 (exact except for f64) and subtracted in binary32; a difference that is NaN or
// infinite is counted and enters the sums as 0. Leaves, lanes and the last rounding are those of the norms (norms.hpp),
// so that where everything is finite the sums have the same bits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "core/exact_sum.hpp"
#include "core/expression.hpp"
#include "cpu/merge.hpp"

namespace paramdelta::cpu {

// Operands by number. With kNothing as subtrahend, the difference is the minuend itself.
struct Difference {
  static constexpr std::int32_t kNothing = -1;
  std::int32_t minuend = 0;
  std::int32_t subtrahend = kNothing;
};

struct DifferenceFacts {
  static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};
  std::uint32_t largest = 0;    // finite |difference| as binary32 bits, which order as the numbers do
  std::uint64_t at = kNowhere;  // the first element that has it; kNowhere where all are zero
  std::uint64_t nonfinite = 0;  // differences that are NaN or infinite
  std::uint64_t unchanged = 0;  // operands of one type and the same bits; of two types, the same value
};

using Product = std::pair<std::uint32_t, std::uint32_t>;  // of differences, by number

// What the loops see, without the containers that own it.
struct GramRange {
  const Operand* operands;
  std::size_t n_operands;
  const Difference* differences;
  std::size_t n_differences;
  const Product* products;
  std::size_t n_products;
  std::size_t count;
  std::uint64_t first;  // the number of the first element within the run: a multiple of kLeaf
  float* rows;          // 256 for each operand, difference and product
  ExactSum* sums;
  DifferenceFacts* facts;
};

// Sums over the parts of a run of elements, added in the order in which they lie.
class GramSums {
 public:
  // Throws std::invalid_argument where a number is beyond its list.
  GramSums(std::size_t operands, std::vector<Difference> differences, std::vector<Product> products);

  // Adds `count` elements from `first` of the run on, which is a multiple of kLeaf, as is their end or it is the run's.
  // Calling thread, default floating-point mode. A null operand stands for zeros.
  void add(Isa isa, const std::vector<Operand>& operands, std::size_t count, std::uint64_t first);
  // Adds the products of another run. Facts stay those of this one: where runs lie is for the caller to know.
  void merge(const GramSums& other);

  std::vector<double> products() const;
  const std::vector<DifferenceFacts>& facts() const { return facts_; }

 private:
  std::size_t operands_;
  std::vector<Difference> differences_;
  std::vector<Product> products_;
  std::vector<ExactSum> sums_;
  std::vector<DifferenceFacts> facts_;
};

}  // namespace paramdelta::cpu

// Leaves of gram.hpp, 256 elements at a time: decoded once, whatever the number of differences they enter, and
// everything stays in L1, or in L2 where several deltas are compared. Included like norms-inl.hpp, after it.

namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE {
namespace {

struct RowFacts {
  std::uint32_t largest;
  std::uint32_t nonfinite;
};

// A difference that is not finite is written as 0. Without a subtrahend, `base` is a row of zeros: x − 0 is x, but for
// the sign of a zero, which no sum sees.
inline RowFacts subtract_row(const float* post, const float* base, float* out) {
  constexpr std::uint32_t kInf = 0x7F800000u;
  RowFacts facts = {0, 0};
  for (std::size_t l = 0; l < kLanes; ++l) {
    const float difference = post[l] - base[l];
    const std::uint32_t bits = bits_as<std::uint32_t>(difference);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t finite = magnitude < kInf ? ~0u : 0u;
    facts.nonfinite -= ~finite;
    facts.largest = larger(facts.largest, magnitude & finite);
    out[l] = bits_as<float>(bits & finite);
  }
  return facts;
}

template <class Code>
inline std::size_t equal_codes(const void* post, const void* base, std::size_t n) {
  const unsigned char* p = static_cast<const unsigned char*>(post);
  const unsigned char* b = static_cast<const unsigned char*>(base);
  Code equal = 0;  // at most 255 of a row's 256 elements in a byte: the last one is added below
  for (std::size_t i = 0; i + 1 < n; ++i) {
    Code x, y;
    std::memcpy(&x, p + i * sizeof(Code), sizeof(Code));
    std::memcpy(&y, b + i * sizeof(Code), sizeof(Code));
    equal = static_cast<Code>(equal + (x == y ? 1 : 0));
  }
  const std::size_t last = (n - 1) * sizeof(Code);
  return static_cast<std::size_t>(equal) + (std::memcmp(p + last, b + last, sizeof(Code)) == 0 ? 1 : 0);
}

// Elements of a row, at least one, with the same bits; of two types, or against zeros, with the same value.
inline std::size_t equal_in_row(const Operand& post, const Operand& base, std::size_t first, std::size_t n,
                                const float* post_row, const float* base_row) {
  if (post.data != nullptr && base.data != nullptr && post.dtype == base.dtype) {
    const void *p = at(post, first), *b = at(base, first);
    switch (size_of(post.dtype)) {
      case 1: return equal_codes<std::uint8_t>(p, b, n);
      case 2: return equal_codes<std::uint16_t>(p, b, n);
      case 4: return equal_codes<std::uint32_t>(p, b, n);
      default: return equal_codes<std::uint64_t>(p, b, n);
    }
  }
  std::uint32_t equal = 0;
  for (std::size_t l = 0; l < n; ++l) equal += post_row[l] == base_row[l] ? 1u : 0u;
  return equal;
}

inline std::size_t first_of_magnitude(const float* row, std::uint32_t magnitude) {
  std::size_t l = 0;
  while ((bits_as<std::uint32_t>(row[l]) & 0x7FFFFFFFu) != magnitude) ++l;
  return l;
}

inline void add_products(const GramRange& range, const float* differences, float* lanes) {
  for (std::size_t p = 0; p < range.n_products; ++p) {
    const float* x = differences + range.products[p].first * kLanes;
    const float* y = differences + range.products[p].second * kLanes;
    float* sums = lanes + p * kLanes;
    for (std::size_t l = 0; l < kLanes; ++l) sums[l] = sums[l] + x[l] * y[l];
  }
}

}  // namespace

void add_gram_range(const GramRange& range) {
  alignas(64) float zeros[kLanes] = {};
  unsigned char padded[kLanes * sizeof(double)];
  float* const rows = range.rows;
  float* const differences = rows + range.n_operands * kLanes;
  float* const lanes = differences + range.n_differences * kLanes;
  for (std::size_t start = 0; start < range.count; start += kLeaf) {
    const std::size_t end = range.count - start < kLeaf ? range.count : start + kLeaf;
    std::memset(lanes, 0, range.n_products * kLanes * sizeof(float));
    for (std::size_t first = start; first < end; first += kLanes) {
      const std::size_t n = end - first < kLanes ? end - first : kLanes;
      for (std::size_t o = 0; o < range.n_operands; ++o)
        read_row(range.operands[o], first, n, padded, rows + o * kLanes);
      for (std::size_t d = 0; d < range.n_differences; ++d) {
        const Difference& difference = range.differences[d];
        const bool whole = difference.subtrahend == Difference::kNothing;
        const float* post = rows + difference.minuend * kLanes;
        const float* base = whole ? zeros : rows + difference.subtrahend * kLanes;
        float* out = differences + d * kLanes;
        DifferenceFacts& facts = range.facts[d];
        const RowFacts found = subtract_row(post, base, out);
        facts.nonfinite += found.nonfinite;
        if (found.largest > facts.largest) {
          facts.largest = found.largest;
          facts.at = range.first + first + first_of_magnitude(out, found.largest);
        }
        if (!whole)
          facts.unchanged += equal_in_row(range.operands[difference.minuend], range.operands[difference.subtrahend],
                                          first, n, post, base);
      }
      add_products(range, differences, lanes);
    }
    for (std::size_t p = 0; p < range.n_products; ++p) range.sums[p].add(tree_sum(lanes + p * kLanes));
  }
}

}  // namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE

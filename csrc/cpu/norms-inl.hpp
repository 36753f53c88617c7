// Leaves of the norms (norms.hpp), 256 elements at a time so that everything stays in L1. Included like merge-inl.hpp,
// after it.

namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE {
namespace {

struct LeafLanes {
  alignas(64) float delta[kLanes];
  alignas(64) float drift[kLanes];
  alignas(64) float inner[kLanes];
  std::uint32_t largest;
};

// Lanes do not depend on each other, so that a vector of them keeps each one's order of additions.
inline void add_row(const float* post, const float* base, const float* new_base, LeafLanes& leaf) {
  std::uint32_t largest = leaf.largest;
  for (std::size_t l = 0; l < kLanes; ++l) {
    const float delta = post[l] - base[l];
    const float drift = new_base[l] - base[l];
    leaf.delta[l] = leaf.delta[l] + delta * delta;
    leaf.drift[l] = leaf.drift[l] + drift * drift;
    leaf.inner[l] = leaf.inner[l] + delta * drift;
    largest = larger(largest, bits_as<std::uint32_t>(delta) & 0x7FFFFFFFu);
  }
  leaf.largest = largest;
}

inline double tree_sum(const float* lanes) {
  double sums[kLanes];
  for (std::size_t l = 0; l < kLanes; ++l) sums[l] = static_cast<double>(lanes[l]);
  for (std::size_t half = kLanes / 2; half > 0; half /= 2)
    for (std::size_t l = 0; l < half; ++l) sums[l] = sums[l] + sums[l + half];
  return sums[0];
}

inline void read_row(const Operand& operand, std::size_t first, std::size_t n, unsigned char* buffer, float* out) {
  if (operand.data == nullptr) {
    std::memset(out, 0, kLanes * sizeof(float));
    return;
  }
  const void* data = at(operand, first);
  const std::size_t size = size_of(operand.dtype);
  if (n < kLanes) {
    std::memcpy(buffer, data, n * size);
    std::memset(buffer + n * size, 0, (kLanes - n) * size);
    data = buffer;
  }
  switch (operand.dtype) {
    case DType::bf16: return decode_tile<DType::bf16>(data, out, kLanes);
    case DType::f16: return decode_tile<DType::f16>(data, out, kLanes);
    case DType::f32: return decode_tile<DType::f32>(data, out, kLanes);
    case DType::f64: return decode_tile<DType::f64>(data, out, kLanes);
    case DType::f8_e4m3: return decode_tile<DType::f8_e4m3>(data, out, kLanes);
    default: return decode_tile<DType::f8_e5m2>(data, out, kLanes);
  }
}

}  // namespace

void add_norms_range(const Operand& post, const Operand& base, const Operand& new_base, std::size_t count,
                     NormSums& sums) {
  alignas(64) float rows[3][kLanes];
  unsigned char padded[kLanes * sizeof(double)];
  LeafLanes leaf;
  for (std::size_t start = 0; start < count; start += kLeaf) {
    const std::size_t end = count - start < kLeaf ? count : start + kLeaf;
    std::memset(&leaf, 0, sizeof(leaf));
    for (std::size_t first = start; first < end; first += kLanes) {
      const std::size_t n = end - first < kLanes ? end - first : kLanes;
      read_row(post, first, n, padded, rows[0]);
      read_row(base, first, n, padded, rows[1]);
      read_row(new_base, first, n, padded, rows[2]);
      add_row(rows[0], rows[1], rows[2], leaf);
    }
    sums.delta_squared.add(tree_sum(leaf.delta));
    sums.drift_squared.add(tree_sum(leaf.drift));
    sums.inner.add(tree_sum(leaf.inner));
    if (leaf.largest > sums.largest_delta) sums.largest_delta = leaf.largest;
  }
}

}  // namespace paramdelta::cpu::PARAMDELTA_TARGET_NAMESPACE

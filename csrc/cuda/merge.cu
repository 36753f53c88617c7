// The launches of merge.hpp: which lane, and how tensors are packed into a kernel's parameters.
#include "cuda/merge.hpp"
#include "cuda/merge_kernel.hpp"

namespace paramdelta::cuda {
namespace {

bool is_wide(const TensorAddresses& tensor) {
  bool wide = tensor.new_base != 0 && tensor.new_base % 16 == 0 && tensor.out % 16 == 0;
  for (const std::uintptr_t address : tensor.pairs) wide = wide && address != 0 && address % 16 == 0;
  return wide;
}

template <class Lane>
void merge_with(const Signature& signature, const std::vector<TensorAddresses>& tensors, Stream stream) {
  using Kernel = MergeKernel<Lane>;
  const std::size_t n_terms = signature.terms.size();
  const std::size_t room = (Batch::kWords - Batch::kTermWords * n_terms) / (Batch::kTensorWords + 2 * n_terms);
  Batch batch;
  batch.n_terms = static_cast<std::uint32_t>(n_terms);
  batch.new_base = signature.new_base;
  batch.out = signature.out;
  batch.wide = true;
  std::uint64_t* word = batch.words;
  for (const TermTypes& term : signature.terms) {
    *word++ = bits_as<std::uint64_t>(term.alpha);
    *word++ = static_cast<std::uint64_t>(term.post) | static_cast<std::uint64_t>(term.base) << 8;
  }
  std::uint64_t* const first_word = word;
  std::uint64_t blocks = 0;
  const auto flush = [&] {
    launch<Kernel>(blocks, 0, batch, stream);
    batch.n_tensors = 0;
    batch.wide = true;
    word = first_word;
    blocks = 0;
  };
  for (const TensorAddresses& tensor : tensors) {
    if (tensor.count == 0) continue;
    const std::uint64_t wanted = (tensor.count + Kernel::kBlock - 1) / Kernel::kBlock;
    if (batch.n_tensors == room || (batch.n_tensors != 0 && blocks + wanted > 0x7FFFFFFFu)) flush();
    *word++ = blocks;
    *word++ = tensor.count;
    *word++ = tensor.new_base;
    *word++ = tensor.out;
    *word++ = tensor.counts;
    for (const std::uintptr_t address : tensor.pairs) *word++ = address;
    batch.wide = batch.wide && is_wide(tensor);
    ++batch.n_tensors;
    blocks += wanted;
  }
  flush();
}

bool has_zeros(const std::vector<TensorAddresses>& tensors) {
  for (const TensorAddresses& tensor : tensors) {
    if (tensor.new_base == 0) return true;
    for (const std::uintptr_t address : tensor.pairs)
      if (address == 0) return true;
  }
  return false;
}

template <DType D>
void merge_uniform(const Signature& signature, const std::vector<TensorAddresses>& tensors, Stream stream) {
  if constexpr (D != DType::f32) {
    if (signature.terms.size() == 1 && signature.terms[0].alpha == 1.0 && !has_zeros(tensors))
      return merge_with<ThreeWay<D>>(signature, tensors, stream);
  }
  return merge_with<Uniform<D>>(signature, tensors, stream);
}

}  // namespace

std::size_t most_terms() { return (Batch::kWords - Batch::kTensorWords) / (Batch::kTermWords + 2); }

void merge(const Signature& given, const std::vector<TensorAddresses>& given_tensors, int device, Stream stream) {
  // A term with alpha == 0 is no term at all: not even 0 · Inf of it is.
  Signature signature{given.new_base, given.out, {}};
  for (const TermTypes& term : given.terms)
    if (term.alpha != 0.0) signature.terms.push_back(term);
  if (signature.terms.size() > most_terms())
    throw std::invalid_argument("a merge on a GPU has at most " + std::to_string(most_terms()) + " deltas, not " +
                                std::to_string(signature.terms.size()) + ": merge in parts, or on the CPU");
  for (const TensorAddresses& tensor : given_tensors) {
    if (tensor.pairs.size() != 2 * given.terms.size())
      throw std::invalid_argument("expected post and base of " + std::to_string(given.terms.size()) + " terms, got " +
                                  std::to_string(tensor.pairs.size()) + " addresses");
    if (tensor.count != 0 && (tensor.out == 0 || tensor.counts == 0))
      throw std::invalid_argument("out or counts has no memory");
  }
  std::vector<TensorAddresses> without_idle;
  if (signature.terms.size() != given.terms.size()) {
    without_idle = given_tensors;
    for (TensorAddresses& tensor : without_idle) {
      PairAddresses kept;
      for (std::size_t t = 0; t < given.terms.size(); ++t) {
        if (given.terms[t].alpha == 0.0) continue;
        kept.push_back(tensor.pairs.begin()[2 * t]);
        kept.push_back(tensor.pairs.begin()[2 * t + 1]);
      }
      tensor.pairs = kept;
    }
  }
  const std::vector<TensorAddresses>& tensors = without_idle.empty() ? given_tensors : without_idle;
  const OnDevice current(device);
  const DType out = signature.out;
  bool uniform = signature.new_base == out;
  for (const TermTypes& term : signature.terms) uniform = uniform && term.post == out && term.base == out;
  if (uniform) {
    switch (out) {
      case DType::bf16: return merge_uniform<DType::bf16>(signature, tensors, stream);
      case DType::f16: return merge_uniform<DType::f16>(signature, tensors, stream);
      case DType::f32: return merge_uniform<DType::f32>(signature, tensors, stream);
      default: break;
    }
  }
  merge_with<Mixed>(signature, tensors, stream);
}

}  // namespace paramdelta::cuda

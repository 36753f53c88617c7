// Checks the columns once, before a worker starts, so that no worker has to.
#include "io/work.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace paramdelta::io {
namespace {

[[noreturn]] void reject(std::size_t span, const std::string& what) {
  throw std::invalid_argument("span " + std::to_string(span) + ": " + what);
}

// Whether `count` elements at `offset` lie within `size` bytes; written so that nothing can overflow.
bool fits(std::int64_t offset, std::int64_t count, DType dtype, std::int64_t size) {
  const auto item = static_cast<std::int64_t>(size_of(dtype));
  return offset >= 0 && count >= 0 && offset <= size && count <= (size - offset) / item;
}

constexpr std::size_t kMostVariants = std::size_t{1} << 16;

bool has_bytes(std::uint8_t code) { return code < kDTypeCount && kDTypes[code].bits % 8 == 0; }

}  // namespace

int Work::max_operands() const {
  int most = 1;
  for (const Span& span : spans) most = std::max(most, operands(span));
  return most;
}

void Work::validate(const std::vector<std::int64_t>& input_sizes, const std::vector<std::int64_t>& output_sizes) const {
  validate_variants(input_sizes, output_sizes);
  const std::vector<std::int64_t> own(
      output_sizes.begin(), output_sizes.begin() + static_cast<std::ptrdiff_t>(output_sizes.size() / variants));
  validate_spans(input_sizes, own);
  validate_regions(input_sizes, own);
}

// Behind the first variant, only what is its own is looked at: alphas, the sizes of outputs and literals.
void Work::validate_variants(const std::vector<std::int64_t>& input_sizes,
                             const std::vector<std::int64_t>& output_sizes) const {
  const auto require = [](bool condition, const char* problem) {
    if (!condition) throw std::invalid_argument(std::string("variants: ") + problem);
  };
  require(variants >= 1 && variants <= kMostVariants, "expected at least one, and no more than 65,536");
  require(tensors <= (std::size_t{1} << 31) / variants, "more tensors than can be numbered");
  require(output_sizes.size() % variants == 0, "expected as many output files of each");
  const std::size_t outputs = output_sizes.size() / variants;
  for (std::size_t i = outputs; i < output_sizes.size(); ++i)
    require(output_sizes[i] == output_sizes[i % outputs], "output files of different sizes");
  require(term_alphas.size() == terms.size() * (variants - 1), "expected an alpha of each for every term");
  require(region_alphas.size() == region_terms.size() * (variants - 1), "expected an alpha of each for every term");
  for (const std::vector<double>* alphas : {&term_alphas, &region_alphas})
    for (const double alpha : *alphas) require(std::isfinite(alpha), "alpha is not finite");
  if (variants == 1 || own_input == kAbsent) return;
  const auto first = static_cast<std::size_t>(own_input);
  require(own_input >= 0 && first < input_sizes.size() && variants <= input_sizes.size() - first,
          "literals out of range");
  for (std::size_t v = 0; v < variants; ++v)
    require(input_sizes[first + v] == input_sizes[first], "literals of different sizes");
  // Operands are read once for all: only bytes that are copied, and given scales, can be a variant's own.
  for (const Span& span : spans) require(is_copy(span) || !is_own(span.new_file), "literals that are an operand");
  for (const TermRef& term : terms)
    require(!is_own(term.post_file) && !is_own(term.base_file), "literals that are an operand");
  for (const View& view : views)
    require(!is_own(view.file) && !is_own(view.scale_file) && !is_own(view.zero_file) && !is_own(view.second_file),
            "literals that are an operand");
}

void Work::validate_spans(const std::vector<std::int64_t>& input_sizes,
                          const std::vector<std::int64_t>& output_sizes) const {
  const auto inputs = static_cast<std::int64_t>(input_sizes.size());
  std::int64_t file = 0;
  std::int64_t end = 0;  // of the previous span in the same file
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const Span& span = spans[i];
    if (span.tensor < 0 || static_cast<std::size_t>(span.tensor) >= tensors) reject(i, "tensor number out of range");
    if (span.out_file < 0 || static_cast<std::size_t>(span.out_file) >= output_sizes.size())
      reject(i, "output file number out of range");
    if (!has_bytes(span.out_dtype) || !has_bytes(span.new_dtype)) reject(i, "dtype code out of range");
    if (span.n_terms < 0 || span.first_term < 0 ||
        static_cast<std::size_t>(span.first_term) + static_cast<std::size_t>(span.n_terms) > terms.size())
      reject(i, "terms out of range");
    const auto out_dtype = static_cast<DType>(span.out_dtype);
    if (!fits(span.out_offset, span.count, out_dtype, output_sizes[static_cast<std::size_t>(span.out_file)]))
      reject(i, "does not fit its output file");
    if (is_copy(span) && (span.n_terms != 0 || span.new_dtype != span.out_dtype || span.new_file == kZeros))
      reject(i, "a type without arithmetic can only be copied");
    if (span.out_file < file || (span.out_file == file && span.out_offset < end)) reject(i, "out of order");
    file = span.out_file;
    end = span.out_offset + span.count * static_cast<std::int64_t>(size_of(out_dtype));
    for (int k = 0; k < operands(span); ++k) {
      if (k > 0) {
        const TermRef& term = terms[static_cast<std::size_t>(span.first_term + (k - 1) / 2)];
        if (!has_bytes(term.post_dtype) || !has_bytes(term.base_dtype)) reject(i, "dtype code of a term out of range");
        if (!std::isfinite(term.alpha)) reject(i, "alpha is not finite");
      }
      const Location at = operand(span, k);
      if (!is_copy(span) && !info(at.dtype).merges) reject(i, "operand of a type without arithmetic");
      if (at.file == kZeros) continue;
      if (at.file < 0 || at.file >= inputs) reject(i, "input file number out of range");
      if (!fits(at.offset, span.count, at.dtype, input_sizes[static_cast<std::size_t>(at.file)]))
        reject(i, "operand reaches beyond the end of its file");
    }
  }
}

}  // namespace paramdelta::io

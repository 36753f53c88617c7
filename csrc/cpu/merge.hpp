// The CPU backend's entry: merge, decode, encode and norms over contiguous ranges, for each instruction set present.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "core/expression.hpp"

namespace paramdelta::cpu {

enum class Isa : std::uint8_t { scalar, avx2, avx512 };

// PARAMDELTA_ISA names an instruction set that this machine does not run.
class UnavailableIsa : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

const char* name_of(Isa isa);
std::vector<Isa> available_isas();  // those this machine runs, slowest first
Isa best_isa();                     // the last of them, or what PARAMDELTA_ISA names; throws UnavailableIsa

// Where the output goes: `cached` leaves it in the cache (a slot that is written to a file next), `streamed` uses
// non-temporal stores (a large array that nothing reads soon).
enum class Store : std::uint8_t { cached, streamed };

// Merges one contiguous range on the calling thread. The floating-point mode is set to the default for the call and
// restored. Every instruction set gives the same bits and the same counts; so does every way of cutting a range.
Counts merge(Isa isa, const Merge& job, Store store);

// The same over `threads` threads, cut at multiples of 4096 elements.
Counts merge_parallel(Isa isa, const Merge& job, Store store, int threads);

// Many merges, over `threads` threads that take the small ones by the hundred and large ones in parts. Outputs must be
// apart from all memory of the other merges. Those of `streamed_from` bytes or more are stored past the cache.
std::vector<Counts> merge_many(Isa isa, const std::vector<Merge>& jobs, std::size_t streamed_from, int threads);

}  // namespace paramdelta::cpu

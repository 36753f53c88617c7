// Which instruction sets this machine runs, and which one is used.
#include <cstdlib>

#include "cpu/merge.hpp"
#include "cpu/targets.hpp"

namespace paramdelta::cpu {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
bool has_avx2() {
#if PARAMDELTA_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if PARAMDELTA_X86
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa chosen_isa() {
  const std::vector<Isa> isas = available_isas();
  const char* wanted = std::getenv("PARAMDELTA_ISA");
  if (wanted == nullptr || *wanted == '\0') return isas.back();
  std::string names;
  for (Isa isa : isas) {
    if (std::string(wanted) == name_of(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw UnavailableIsa("PARAMDELTA_ISA is '" + std::string(wanted) + "', but this machine runs: " + names +
                       ". Unset the variable, or name one of these.");
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas = {Isa::scalar};
  if (has_avx2()) isas.push_back(Isa::avx2);
  if (has_avx512()) isas.push_back(Isa::avx512);
  return isas;
}

Isa best_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace paramdelta::cpu

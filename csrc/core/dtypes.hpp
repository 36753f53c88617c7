// The one list of dtypes in C++. Numbering and names are those of paramdelta/dtypes.py; a test holds the two together.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define PARAMDELTA_HOST_DEVICE __host__ __device__
#else
#define PARAMDELTA_HOST_DEVICE
#endif

namespace paramdelta {

enum class DType : std::uint8_t {
  bf16,
  f16,
  f32,
  f64,
  f8_e4m3,
  f8_e5m2,  // the types with arithmetic
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  f6_e2m3,
  f6_e3m2,
  f4,
  boolean,
  u8,
  i8,
  u16,
  i16,
  u32,
  i32,
  u64,
  i64,
  c64,
};

struct DTypeInfo {
  const char* name;
  int bits;
  bool merges;
};

inline constexpr DTypeInfo kDTypes[] = {
    {"bf16", 16, true},        {"f16", 16, true},     {"f32", 32, true},     {"f64", 64, true},
    {"f8_e4m3", 8, true},      {"f8_e5m2", 8, true},  {"f8_e8m0", 8, false}, {"f8_e4m3fnuz", 8, false},
    {"f8_e5m2fnuz", 8, false}, {"f6_e2m3", 6, false}, {"f6_e3m2", 6, false}, {"f4", 4, false},
    {"bool", 8, false},        {"u8", 8, false},      {"i8", 8, false},      {"u16", 16, false},
    {"i16", 16, false},        {"u32", 32, false},    {"i32", 32, false},    {"u64", 64, false},
    {"i64", 64, false},        {"c64", 64, false},
};
inline constexpr std::size_t kDTypeCount = sizeof(kDTypes) / sizeof(kDTypes[0]);
inline constexpr std::size_t kMergeDTypeCount = 6;

constexpr const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)]; }

// Bytes of one element of a type with arithmetic.
PARAMDELTA_HOST_DEVICE constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::bf16:
    case DType::f16: return 2;
    case DType::f32: return 4;
    case DType::f64: return 8;
    default: return 1;
  }
}

}  // namespace paramdelta

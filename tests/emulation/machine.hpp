// What translated kernels (translate.py) run on: threads of a block as fibers that take turns at barriers and
// exchanges, shared memory, and accesses that are checked as a GPU checks them, and more: alignment, and that memory is
// allocated.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emulated {

using b8 = std::uint8_t;
using b16 = std::uint16_t;
using b32 = std::uint32_t;
using b64 = std::uint64_t;
using u8 = b8;
using u16 = b16;
using u32 = b32;
using u64 = b64;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using f32 = float;
using f64 = double;
using pred = bool;

// What stops a kernel on a GPU; `code` is the cudaError_t that the next call of the runtime returns.
struct Fault : std::runtime_error {
  int code;
  Fault(int error, const std::string& text) : std::runtime_error(text), code(error) {}
};

struct Block;

// Of `bytes` bytes to shared memory, the first `given` are copied and the others zero.
struct Copy {
  b64 to, from;
  b32 bytes, given;
};

struct Thread {
  Block* block;
  b32 index;  // in the block
  b32 exchanges = 0;

  // Copies to shared memory that have happened only when they were waited for: by groups, but for the last `later`.
  std::vector<std::vector<Copy>> copies = {};
  void copy(b64 to, b64 from, b32 bytes, b32 given);
  void end_copies();
  void await_copies(b32 later);

  // All lanes of a warp, which is what an exchange must be between.
  b32 whole_warp(b32 clamp) const;
  b32 lane() const { return index % 32; }
  void barrier();
  // The values that the lanes of this thread's warp gave, all of them.
  const b32* exchange(b32 value, b32 mask);
  // The place of an address of shared memory; `bytes` from there must be the block's.
  std::byte* shared(b64 offset, std::size_t bytes) const;
  b64 shared_base() const;
  b32 block_index() const;
  b32 threads() const;
  b32 blocks() const;
  // Throws Fault unless `bytes` at a generic address are allocated and aligned.
  void check(b64 address, std::size_t bytes) const;
};

using Entry = void (*)(Thread&, std::byte* parameters);

// Where a kernel's parameter lies in the memory that its entry is given.
struct Parameter {
  std::size_t offset, bytes;
};

// Makes a kernel known by its name.
struct Known {
  Known(const char* name, Entry entry, std::initializer_list<Parameter> parameters);
};

// A register is a word of its width; what an instruction takes from it is said by the instruction's type.
template <class T, class R>
inline T get(R r) {
  if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(T) == sizeof(R), "a register of the type's width");
    T value;
    std::memcpy(&value, &r, sizeof(T));
    return value;
  } else {
    return static_cast<T>(r);
  }
}

template <class R, class T>
inline void put(R& r, T value) {
  if constexpr (std::is_floating_point_v<T>) {
    static_assert(sizeof(T) == sizeof(R), "a register of the type's width");
    std::memcpy(&r, &value, sizeof(T));
  } else {
    r = static_cast<R>(value);  // of signed types, with their sign
  }
}

template <class T>
inline T bits(b64 word) {
  using W = std::conditional_t<sizeof(T) == 4, b32, b64>;
  return get<T>(static_cast<W>(word));
}

// NaNs of binary32 arithmetic are one code on a GPU; of binary64 nobody says which, and here it is another than a
// CPU's.
inline f32 made(f32 x) { return std::isnan(x) ? bits<f32>(0x7FFFFFFFu) : x; }
inline f64 made(f64 x) { return std::isnan(x) ? bits<f64>(0xFFFFFFFFFFFFFFFFull) : x; }
template <class T>
inline std::enable_if_t<!std::is_floating_point_v<T>, T> made(T x) {
  return x;
}

template <class T>
using word_of =
    std::conditional_t<sizeof(T) == 1, b8,
                       std::conditional_t<sizeof(T) == 2, b16, std::conditional_t<sizeof(T) == 4, b32, b64>>>;

// Integers wrap around: they are added as words without sign.
template <class T>
inline T add(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return made(a + b);
  else
    return static_cast<T>(static_cast<word_of<T>>(static_cast<b64>(a) + static_cast<b64>(b)));
}
template <class T>
inline T sub(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return made(a - b);
  else
    return static_cast<T>(static_cast<word_of<T>>(static_cast<b64>(a) - static_cast<b64>(b)));
}
template <class T>
inline T mul(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return made(a * b);
  else
    return static_cast<T>(static_cast<word_of<T>>(static_cast<b64>(a) * static_cast<b64>(b)));
}
template <class T>
using wider = std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 2, s32, s64>,
                                 std::conditional_t<sizeof(T) == 2, u32, u64>>;
template <class T>
inline wider<T> mul_wide(T a, T b) {
  return static_cast<wider<T>>(a) * static_cast<wider<T>>(b);
}
template <class T>
inline T mul_hi(T a, T b) {
  using W = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<W>(a) * static_cast<W>(b) >> 8 * sizeof(T));
}
template <class T>
inline T mad(T a, T b, T c) {
  return add<T>(mul<T>(a, b), c);
}
template <class T>
inline wider<T> mad_wide(T a, T b, wider<T> c) {
  return add<wider<T>>(mul_wide<T>(a, b), c);
}
template <class T>
inline T fma(T a, T b, T c) {
  return made(std::fma(a, b, c));
}
template <class T>
inline T div(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return made(a / b);
  else
    return b == 0 ? static_cast<T>(-1) : static_cast<T>(a / b);
}
template <class T>
inline T rem(T a, T b) {
  return b == 0 ? a : static_cast<T>(a % b);
}
template <class T>
inline T rcp(T a) {
  return made(T{1} / a);
}
// The number where one is NaN; −0 is less than 0.
template <class T>
inline T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return made(std::isnan(a) ? b : a);
    return a < b || (a == b && std::signbit(a)) ? a : b;
  } else {
    return b < a ? b : a;
  }
}
template <class T>
inline T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a) || std::isnan(b)) return made(std::isnan(a) ? b : a);
    return a > b || (a == b && !std::signbit(a)) ? a : b;
  } else {
    return b > a ? b : a;
  }
}
template <class T>
inline T neg(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return -a;
  else
    return sub<T>(T{0}, a);
}
template <class T>
inline T abs(T a) {
  if constexpr (std::is_floating_point_v<T>)
    return std::fabs(a);
  else
    return a < 0 ? neg<T>(a) : a;
}
template <class T>
inline T and_(T a, T b) {
  return static_cast<T>(a & b);
}
template <class T>
inline T or_(T a, T b) {
  return static_cast<T>(a | b);
}
template <class T>
inline T xor_(T a, T b) {
  return static_cast<T>(a ^ b);
}
template <class T>
inline T not_(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return static_cast<T>(~a);
}
// Shifts by a type's width or more give zero, or the sign.
template <class T>
inline T shl(T a, b32 n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<word_of<T>>(a) << n);
}
template <class T>
inline T shr(T a, b32 n) {
  constexpr b32 width = 8 * sizeof(T);
  if (n >= width) return std::is_signed_v<T> ? static_cast<T>(a >> (width - 1)) : T{0};
  return static_cast<T>(a >> n);
}
template <class T>
inline T bfe(T a, b32 position, b32 length) {
  const b32 from = position & 255, n = length & 255, width = 8 * sizeof(T);
  const T field = shr<T>(a, from);
  if (n >= width) return field;
  const auto word = static_cast<word_of<T>>(field) & ((word_of<T>{1} << n) - 1);
  const bool negative = std::is_signed_v<T> && n != 0 && (static_cast<word_of<T>>(shr<T>(a, from + n - 1)) & 1) != 0;
  return static_cast<T>(negative ? word | ~((word_of<T>{1} << n) - 1) : word);
}
template <class T>
inline T bfi(T insert, T into, b32 position, b32 length) {
  const b32 from = position & 255, n = length & 255;
  const T ones = n >= 8 * sizeof(T) ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << n) - 1);
  const T mask = shl<T>(ones, from);
  return static_cast<T>((shl<T>(insert, from) & mask) | (into & ~mask));
}
template <class T>
inline b32 popc(T a) {
  return static_cast<b32>(__builtin_popcountll(a));
}
template <class T>
inline b32 clz(T a) {
  return a == 0 ? static_cast<b32>(8 * sizeof(T)) : static_cast<b32>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
// Bytes of b:a, as the four selectors of c say; bit 3 of a selector spreads the byte's sign.
inline b32 prmt(b32 a, b32 b, b32 c) {
  const b64 bytes = static_cast<b64>(b) << 32 | a;
  b32 made = 0;
  for (int i = 0; i < 4; ++i) {
    const b32 selector = c >> 4 * i & 15;
    const b32 byte = static_cast<b32>(bytes >> 8 * (selector & 7)) & 255;
    made |= ((selector & 8) == 0 ? byte : (byte & 128) != 0 ? 255u : 0u) << 8 * i;
  }
  return made;
}
inline b32 lop3(b32 a, b32 b, b32 c, b32 table) {
  b32 made = 0;
  for (b32 i = 0; i < 8; ++i)
    if (table >> i & 1) made |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return made;
}
inline b32 shf_l(b32 low, b32 high, b32 n) { return static_cast<b32>((static_cast<b64>(high) << 32 | low) << n >> 32); }
inline b32 shf_r(b32 low, b32 high, b32 n) { return static_cast<b32>((static_cast<b64>(high) << 32 | low) >> n); }

// Conversions. From floating point to integers: towards zero, clamped, NaN to zero.
template <class To, class From>
inline To cvt(From x) {
  if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
    if (std::isnan(x)) return To{0};
    const f64 least = std::is_signed_v<To> ? -std::ldexp(1.0, 8 * sizeof(To) - 1) : 0.0;
    const f64 limit = std::ldexp(1.0, 8 * sizeof(To) - (std::is_signed_v<To> ? 1 : 0));
    if (x <= least) return static_cast<To>(least);
    if (x >= limit) return static_cast<To>(~To{0} ^ (std::is_signed_v<To> ? To{1} << (8 * sizeof(To) - 1) : To{0}));
    return static_cast<To>(x);
  } else if constexpr (std::is_floating_point_v<To>) {
    return made(static_cast<To>(x));
  } else {
    return static_cast<To>(x);
  }
}

// Codes of types that C++ has not, rounded to nearest even; e4m3, which has no Inf, is ±448 at most. NaN is the code
// that a GPU makes.
b16 f16(f32 x);
b16 bf16(f32 x);
b16 e4m3(f32 x);
f32 f16_value(b16 code);
f32 e4m3_value(b16 code);

template <class T>
inline bool unordered(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return std::isnan(a) || std::isnan(b);
  else
    return false;
}

// Memory that is global or generic.
template <class T>
inline T* global(const Thread& t, b64 address) {
  t.check(address, sizeof(T));
  return reinterpret_cast<T*>(address);
}

template <class T>
inline T atomic_add(T* at, T value) {
  if constexpr (std::is_floating_point_v<T>) {
    T before;
    __atomic_load(at, &before, __ATOMIC_RELAXED);
    T after = add(before, value);
    while (!__atomic_compare_exchange(at, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
      after = add(before, value);
    return before;
  } else {
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
  }
}
template <class T>
inline T atomic_or(T* at, T value) {
  return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);
}
template <class T>
inline T atomic_max(T* at, T value) {
  T before = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (before < value &&
         !__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
  }
  return before;
}
template <class T>
inline T atomic_min(T* at, T value) {
  T before = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < before &&
         !__atomic_compare_exchange_n(at, &before, value, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
  }
  return before;
}

}  // namespace emulated

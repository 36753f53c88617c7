// CRC-32 of IEEE 802.3, the one of zlib, taken apart so that the pieces of a message can be summed in any order.
//
// A message of n bytes is a polynomial M over GF(2): its first byte holds the highest powers, the lowest bit of each
// byte the highest of those. With P = x^32 + x^26 + x^23 + x^22 + x^16 + x^12 + x^11 + x^10 + x^8 + x^7 + x^5 + x^4 +
// x^2 + x + 1:
//
//     raw(M)   = M · x^32 mod P
//     raw(A B) = raw(A) · x^(8|B|) + raw(B)
//     crc32(M) = raw(M) + 0xFFFFFFFF · x^(8n) + 0xFFFFFFFF
//
// Sums are exclusive ors. A remainder is stored as zlib does it: bit 31 − k is the coefficient of x^k.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/merge.hpp"

namespace paramdelta::cpu {

// The operations that instruction sets speed up; all give the same bits.
struct Crc32 {
  std::uint32_t (*raw)(const std::byte* data, std::size_t bytes);
  std::uint32_t (*multiply)(std::uint32_t a, std::uint32_t b);  // of remainders, mod P
};
const Crc32& crc32_for(Isa isa);

std::uint32_t power_of_x(std::uint64_t bytes);                               // x^(8 · bytes) mod P
std::uint32_t shifted(std::uint32_t remainder, std::uint64_t bytes);         // remainder · x^(8 · bytes)
std::uint32_t crc32_of_raw(std::uint32_t raw, std::uint64_t message_bytes);  // what zlib gives for the message

}  // namespace paramdelta::cpu

"""One element at a time: stored bits to a value that binary64 holds, and binary64 to stored bits with one rounding.

Pointers and conversions are of integers throughout, but for two that are right everywhere: binary32 to binary64, which
is exact, and binary64 to binary32, to nearest even. Triton's own conversions to short types round twice, depend on the
architecture, or differ between compiler and interpreter.

A short format lies in binary32 with its exponent shifted: its magnitude, moved to the top of the mantissa, reads as
value · 2^-rebias, subnormals included, where rebias = 127 − bias.
"""

from typing import NamedTuple

import triton
import triton.language as tl

INF_OF_F32 = tl.constexpr(0x7F800000)
NAN_OF_F32 = tl.constexpr(0x7FC00000)
MAGNITUDE_OF_F32 = tl.constexpr(0x7FFFFFFF)


class Format(NamedTuple):
    """Stored bits, those of the mantissa, 127 − bias, the largest finite code, what lies beyond it, and NaN."""

    bits: int
    mantissa: int
    rebias: int
    largest: int
    beyond: int
    nan: int


FORMATS = {
    "bf16": Format(16, 7, 0, 0x7F7F, 0x7F80, 0x7FC0),
    "f16": Format(16, 10, 112, 0x7BFF, 0x7C00, 0x7E00),
    "f32": Format(32, 23, 0, 0x7F7FFFFF, 0x7F800000, 0x7FC00000),
    "f8_e4m3": Format(8, 3, 120, 0x7E, 0x7E, 0x7F),
    "f8_e5m2": Format(8, 2, 112, 0x7B, 0x7C, 0x7E),
}


@triton.constexpr_function
def of(format, field):
    """Return a field of a format, while compiling."""
    return getattr(FORMATS[format], field)


@triton.constexpr_function
def item(values, index):
    """Return an element of a tuple of constants as a constant: the compiler of Triton 3.6 makes a bare value of it."""
    return values[index]


@triton.constexpr_function
def power(exponent):
    """Return 2^exponent, while compiling."""
    return 2.0**exponent


@triton.jit
def pointer(address, FORMAT: tl.constexpr, ALIGN: tl.constexpr):
    """Return a pointer to the codes of a format at an address, which is a multiple of ALIGN bytes.

    What is known of an integer is forgotten where it becomes a pointer; without the hint every access is of one code.
    """
    BITS: tl.constexpr = of(FORMAT, "bits")
    if BITS == 8:
        typed = address.to(tl.pointer_type(tl.uint8))
    elif BITS == 16:
        typed = address.to(tl.pointer_type(tl.uint16))
    else:
        typed = address.to(tl.pointer_type(tl.uint32))
    return tl.multiple_of(typed, ALIGN)


@triton.jit
def raw(code, FORMAT: tl.constexpr):
    """Return value · 2^-rebias in binary32: what a code stands for, NaN and Inf included, before `unit`."""
    SHIFT: tl.constexpr = 23 - of(FORMAT, "mantissa")
    SIGN: tl.constexpr = 1 << (of(FORMAT, "bits") - 1)
    LARGEST: tl.constexpr = of(FORMAT, "largest")
    wide = code.to(tl.uint32)
    if of(FORMAT, "rebias") == 0:
        bits = wide << SHIFT
    else:
        magnitude = wide & (SIGN - 1)
        bits = magnitude << SHIFT
        # Beyond the largest lie Inf, where there is one, and NaN.
        if of(FORMAT, "beyond") == LARGEST:
            bits = tl.where(magnitude > LARGEST, NAN_OF_F32, bits)
        else:
            bits = tl.where(magnitude > LARGEST, bits | INF_OF_F32, bits)
        bits |= (wide & SIGN) << (32 - of(FORMAT, "bits"))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def value(code, FORMAT: tl.constexpr):
    """Return what a code stands for, in binary64."""
    return raw(code, FORMAT).to(tl.float64) * power(of(FORMAT, "rebias"))


@triton.jit
def round_to_odd(x):
    """Return the bits of binary64 x in binary32: cut off, and odd where that lost something.

    Rounding those to a type of at most 22 significant bits, whose quantum is at least four times 2^-149, gives what
    rounding x once gives: the odd bit stands for all that was cut, so that nothing becomes a tie that was none.
    """
    near = x.to(tl.float32)
    back = near.to(tl.float64)
    bits = near.to(tl.uint32, bitcast=True)
    # One less is one step towards zero: for either sign, from Inf to the largest number, from the smallest to zero.
    bits = tl.where(tl.abs(back) > tl.abs(x), bits - 1, bits)
    return tl.where(back != x, bits | 1, bits)


@triton.jit
def shorten(magnitude, FORMAT: tl.constexpr):
    """Return the code, beyond the largest where it overflows, of the bits of |x| in binary32, to nearest even."""
    SHIFT: tl.constexpr = 23 - of(FORMAT, "mantissa")
    REBIAS: tl.constexpr = of(FORMAT, "rebias")
    code = (magnitude - (REBIAS << 23) + ((1 << (SHIFT - 1)) - 1) + ((magnitude >> SHIFT) & 1)) >> SHIFT
    if REBIAS > 0:
        # Added to a number whose last bit is the smallest subnormal, the sum's low bits count them, rounded.
        EXPONENT: tl.constexpr = REBIAS - 126 + SHIFT
        counted = magnitude.to(tl.float32, bitcast=True) + power(EXPONENT)
        small = counted.to(tl.uint32, bitcast=True) - ((EXPONENT + 127) << 23)
        code = tl.where(magnitude < ((REBIAS + 1) << 23), small, code)
    return code


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """Return binary64 x rounded once to a format, as uint32, and whether that exceeds the largest finite value.

    As reference.encode: the second is False for NaN, and for Inf where the format has one.
    """
    LARGEST: tl.constexpr = of(FORMAT, "largest")
    BEYOND: tl.constexpr = of(FORMAT, "beyond")
    if FORMAT == "f32":
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        magnitude = bits & MAGNITUDE_OF_F32
    else:
        bits = round_to_odd(x)
        magnitude = shorten(bits & MAGNITUDE_OF_F32, FORMAT)
    over = (magnitude > LARGEST) & (x == x)
    if BEYOND != LARGEST:
        over &= tl.abs(x) != float("inf")
    code = tl.minimum(magnitude, BEYOND) | ((bits >> 31) << (of(FORMAT, "bits") - 1))
    return tl.where(x == x, code, of(FORMAT, "nan")), over

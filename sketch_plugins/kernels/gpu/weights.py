"""Weights of 24 and 32 bits: `sketch_plugins.kernels.weight_code` for Triton, bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(p, c, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr):
    """The float32 numbers that weights and their corrections stand for."""
    FRACTION: tl.constexpr = 8 if C_TYPE == tl.int8 else 16
    TOP: tl.constexpr = 0x7F80 if P_TYPE == tl.bfloat16 else 0x7C00  # infinity
    stored = p.to(tl.int16, bitcast=True).to(tl.int32)
    h = ((stored & 0x7FFF) << FRACTION) + c.to(tl.int32)
    h = tl.where(h < 0, 0, h)
    if P_TYPE == tl.bfloat16:
        bits = h << (16 - FRACTION)
    else:
        if FRACTION == 8:
            normal = (h << 5) + 0x38000000
            subnormal = h.to(tl.float32) * 2.3283064365386963e-10  # 2**-32
        else:
            normal = (h >> 3) + 0x38000000
            subnormal = h.to(tl.float32) * 9.094947017729282e-13  # 2**-40
        bits = tl.where((h >> (10 + FRACTION)) > 0, normal, subnormal.to(tl.int32, bitcast=True))
    # A minus sign would lose the sign of zero, so the bit is set.
    value = (bits | ((stored & 0x8000) << 16)).to(tl.float32, bitcast=True)
    return tl.where((stored & 0x7FFF) < TOP, value, p.to(tl.float32))


@triton.jit
def encode(x, random, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr):
    """Weights and corrections of float32 numbers. ``random`` is the noise that rounds to 24 bits."""
    FRACTION: tl.constexpr = 8 if C_TYPE == tl.int8 else 16
    TOP: tl.constexpr = 0x7F80 if P_TYPE == tl.bfloat16 else 0x7C00  # infinity
    TIE: tl.constexpr = 0x7F7F8000 if P_TYPE == tl.bfloat16 else 0x477FF000  # the least float32 that rounds to infinity
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    noise = (random & 0xFF).to(tl.int32)
    if P_TYPE == tl.bfloat16:
        if FRACTION == 8:
            h = (magnitude + noise) >> 8
        else:
            h = magnitude
    else:
        if FRACTION == 8:
            scaled = tl.abs(x) * 137438953472.0  # 2**37
        else:
            scaled = tl.abs(x) * 1099511627776.0  # 2**40
        scaled = tl.where(scaled < 67108864.0, scaled, 67108864.0)
        low = tl.where(scaled < 8388608.0, scaled + 0.5, scaled).to(tl.int32)
        high = tl.where(magnitude < 0x47800000, magnitude, 0x47800000) - 0x38000000
        if FRACTION == 8:
            low = (low + (noise >> 3)) >> 5
            high = (high + (noise >> 3)) >> 5
        else:
            high = high << 3
        h = tl.where(magnitude < 0x38800000, low, high)
    last = (TOP << FRACTION) - (1 << (FRACTION - 1)) - 1
    h = tl.where(h < last, h, last)
    stored = (h + (1 << (FRACTION - 1))) >> FRACTION
    code = h - (stored << FRACTION)
    finite = magnitude < TIE
    stored = tl.where(finite, stored, TOP)
    weight = (stored | ((bits >> 16) & 0x8000)).to(tl.int16).to(P_TYPE, bitcast=True)
    # A NaN is converted by the hardware.
    return tl.where(magnitude > 0x7F800000, x.to(P_TYPE), weight), tl.where(finite, code, 0).to(C_TYPE)

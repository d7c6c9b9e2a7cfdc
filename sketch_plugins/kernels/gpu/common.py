"""What all kernels share: addresses, gradients, rounding noise, denominators."""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins import hashing
from sketch_plugins.kernels.gpu import weights
from sketch_plugins.kernels.gpu.table import (
    BEGIN,
    CODES,
    COLUMNS,
    COUNT,
    FIELDS,
    FLOOR,
    G_STRIDE,
    HEIGHT,
    INDEX,
    INSIDE,
    L2,
    NUMBER,
    OWN,
    P_STRIDE,
    SCALE,
    SEED,
    SHIFT,
    SIGN,
    G,
    P,
)

# How a kernel finds its rows: all of them, touched rows of a dense gradient, or rows of a packed gradient.
RANGE, TOUCHED, PACKED = (tl.constexpr(i) for i in range(3))
# Streams of rounding noise.
PLAIN, TABLE1, TABLE2 = tl.constexpr(0), tl.constexpr(hashing.TABLE1), tl.constexpr(hashing.TABLE2)


@triton.jit
def find(table, count, pid):
    """The tensor that program ``pid`` works on: the last one whose first program is not after it."""
    low = 0
    high = count
    while high - low > 1:
        middle = (low + high) // 2
        behind = tl.load(table + middle * FIELDS + BEGIN) > pid
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle)
    return low


@triton.jit
def address(t, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer of the table. With ``ALIGN`` the launcher has checked that it is a multiple of 16 bytes.

    Loads may then be 128 bits wide. The hint belongs to the operation that makes the value; if it were given to a
    function's argument, it would be lost.
    """
    pointer = tl.load(t + FIELD).to(tl.pointer_type(TYPE))
    if ALIGN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def extent(t, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    """A number of columns or a stride. With ``ALIGN`` it is a multiple of 16."""
    n = tl.load(t + FIELD)
    if ALIGN:
        n = tl.multiple_of(n, 16)
    return n


@triton.jit
def rows_at(t, first, M: tl.constexpr, MODE: tl.constexpr):
    """The numbers of ``M`` rows from ``first`` on in parameter, gradient and touched rows, and which of them exist."""
    position = first + tl.arange(0, M).to(tl.int64)
    exists = position < tl.load(t + COUNT)
    if MODE == RANGE:
        return position, position, position, exists
    index = tl.load(t + INDEX).to(tl.pointer_type(tl.int64))
    rows = tl.load(index + position, mask=exists, other=0)
    if MODE == PACKED:
        return rows, position, position, exists
    return rows, rows, position, exists


@triton.jit
def buckets_of(t, rows, hashes):
    """The buckets of rows: `sketch_plugins.hashing.RowHash.bucket`."""
    height, own = tl.load(t + HEIGHT), tl.load(t + OWN)
    matrix = rows // height
    place = ((rows - matrix * height) * tl.load(hashes) + tl.load(hashes + 1)) % height
    return matrix * own + place % own


@triton.jit
def members(height, own, bucket, matrix, first, hashes, M: tl.constexpr):
    """``M`` rows of a bucket, from member ``first`` on, by the inverse hash, and which of them exist.

    One matrix has ``height`` rows and ``own`` buckets. In a loop they are loaded each time, because holding them
    through it would spill registers.
    """
    place = bucket - matrix * own + (first + tl.arange(0, M).to(tl.int64)) * own
    row = ((place + height - tl.load(hashes + 1)) % height) * tl.load(hashes + 2) % height
    return tl.where(place < height, matrix * height + row, 0), place < height


@triton.jit
def load_of(height, own, bucket, matrix):
    """The number of rows in a bucket; see `members`."""
    return (height - (bucket - matrix * own) + own - 1) // own


@triton.jit
def gradient(
    t, s, rows, g_rows, cols, mask, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    L2_ON: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient in float32, with the sign of the step's direction and with coupled weight decay."""
    g = tl.load(t + tl.load(t + G)).to(tl.pointer_type(G_TYPE))
    if ALIGN:
        g = tl.multiple_of(g, 16)
    stride = extent(t, G_STRIDE, ALIGN)
    x = tl.load(g + g_rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    x = x * tl.load(s + SIGN)
    if L2_ON:
        x += tl.load(s + L2) * parameter(t, rows, cols, mask, P_TYPE, C_TYPE, ALIGN)
    return x


@triton.jit
def parameter(t, rows, cols, mask, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The parameter in float32, corrected if it has corrections (``C_TYPE`` is not None)."""
    p = address(t, P, P_TYPE, ALIGN)
    stride = extent(t, P_STRIDE, ALIGN)
    x = tl.load(p + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    if C_TYPE is None:
        return x.to(tl.float32)
    else:
        c = tl.load(codes(t, rows, cols, C_TYPE, ALIGN), mask=mask, other=0)
        return weights.decode(x, c, P_TYPE, C_TYPE)


@triton.jit
def codes(t, rows, cols, C_TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """The addresses of the corrections."""
    return address(t, CODES, C_TYPE, ALIGN) + rows[:, None] * extent(t, COLUMNS, ALIGN) + cols[None, :]


@triton.jit
def sum_of_squares(x):
    """The sum of squares in float64. If float32 cannot hold it, it is computed again from scaled numbers."""
    total = tl.sum(x * x).to(tl.float64)
    if total > 3.4028234663852886e38:  # infinite, not NaN
        y = x * 8.470329472543003e-22  # 2**-70
        total = tl.sum(y * y).to(tl.float64) * 1.3937965749081639e42  # 2**140
    elif total < 8.271806125530277e-25:  # 2**-80: squares may have underflowed
        y = x * 1180591620717411303424.0  # 2**70
        total = tl.sum(y * y).to(tl.float64) * 7.174648137343064e-43  # 2**-140
    return total


@triton.jit
def factor(v, s, rate):
    """``rate`` divided by the denominator, in correctly rounded operations."""
    root = tl.sqrt_rn(v + tl.load(s + INSIDE)) * tl.load(s + SCALE) + tl.load(s + SHIFT)
    # tl.maximum would not keep a NaN.
    floor = tl.load(s + FLOOR)
    root = tl.where(root < floor, floor, root)
    return tl.div_rn(rate + tl.zeros_like(root), root)


@triton.jit
def mix32(x, seed):
    """`sketch_plugins.hashing.mix32`: uint64 in, uint32 out."""
    h = ((x ^ (x >> 32)) ^ seed).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def noise(t, s, index, STREAM: tl.constexpr):
    """32 random bits for each element: a pure function of (seed, step, index), as `hashing.uniform` uses them."""
    number = tl.load(s + NUMBER).to(tl.int64).to(tl.uint64, bitcast=True)
    x = tl.load(t + SEED).to(tl.uint64, bitcast=True) ^ STREAM ^ (number * 0x9E3779B97F4A7C15)
    x = x + 0x9E3779B97F4A7C15
    z = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    key = z ^ (z >> 31)
    return mix32(mix32(index.to(tl.uint64, bitcast=True), key & 0xFFFFFFFF).to(tl.uint64), key >> 32)


@triton.jit
def to_bf16(x, random):
    """Stochastic rounding to bfloat16: away from zero with a probability equal to the fraction that is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + (random & 0xFFFF), bits | ((bits & 0xFFFF) != 0).to(tl.uint32) << 16)
    return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def held(x, t, s, cell, STREAM: tl.constexpr, TYPE: tl.constexpr):
    """``x`` as a table of this type holds it: unchanged, or rounded to bfloat16 with the noise of its ``cell``."""
    if TYPE == tl.bfloat16:
        return to_bf16(x, noise(t, s, cell, STREAM))
    else:  # Triton needs a branch, because the types differ
        return x

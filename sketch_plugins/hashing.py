"""Seeded hashing of rows into buckets: balanced, bijective, and the same for dense and for sparse gradients.

A parameter with ``R`` rows is hashed ``depth`` times into ``width`` buckets. Every hash is a *bijection* of the rows
followed by ``mod width``, so each bucket holds ``R // width`` rows, or one more (the first ``R % width`` buckets), and
``width == R`` gives every row a bucket of its own. The module keeps no state: all constants derive from one integer.

A batch of E matrices (experts) is hashed matrix by matrix, with the same constants. The rows of one matrix follow those
of the one before, and so do its buckets, so no bucket holds rows of two matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

HASHES = ("strided", "affine")

# One seed gives several streams of rounding noise: the seed itself is used for parameters and int8 codes, and its
# exclusive or with one of these constants for the others. So two roundings of a number in one step never share noise.
TABLE1, TABLE2, CLEANING = 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3

_MASK64 = (1 << 64) - 1
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class RowHash:
    """One hash of ``rows`` rows into ``width`` buckets: ``bucket(i) = ((a * i + b) mod rows) mod width``.

    ``a == 1 and b == 0`` is the *strided* hash ``i mod width``: rows ``[q * width, (q + 1) * width)`` fall into the
    buckets in order, so a bucket's members are a plain strided view of the matrix and need no index.

    If the rows belong to several ``matrices`` that follow each other, each matrix has ``rows / matrices`` of the rows
    (`height`) and ``width / matrices`` of the buckets (`own`), and the formula holds within each matrix.
    """

    rows: int
    width: int
    a: int = 1
    b: int = 0
    sign_seed: int = 0
    matrices: int = 1

    @property
    def height(self) -> int:
        """Rows of one matrix."""
        return self.rows // self.matrices

    @property
    def own(self) -> int:
        """Buckets of one matrix."""
        return self.width // self.matrices

    @property
    def strided(self) -> bool:
        """Whether the bucket is the row number mod width."""
        return self.a == 1 and self.b == 0

    def bucket(self, index: Tensor) -> Tensor:
        """Buckets (int64) of the row numbers ``index`` (int64)."""
        matrix, row = self._split(index)
        if not self.strided:
            row = (row * self.a + self.b) % self.height
        return self._joined(matrix, row % self.own, self.own)

    def row(self, place: Tensor) -> Tensor:
        """The inverse of the hash: the row numbers (int64) of ``place`` (int64).

        Within a matrix the places ``bucket + k * width`` are the members of a bucket, in a fixed order. The places of
        one matrix follow those of the one before, as its rows do.
        """
        if self.strided:
            return place
        matrix, place = self._split(place)
        row = (place + (self.height - self.b)) * pow(self.a, -1, self.height) % self.height
        return self._joined(matrix, row, self.height)

    def bucket_of_place(self, place: int) -> int:
        """The bucket that the row at this place belongs to."""
        matrix, place = divmod(place, self.height)
        return matrix * self.own + place % self.own

    def load(self, bucket: Tensor) -> Tensor:
        """How many of the parameter's rows share each of ``bucket`` (int64, same shape)."""
        return self.height // self.own + (bucket % self.own < self.height % self.own).long()

    def sign(self, index: Tensor) -> Tensor:
        """+1 or -1 (int64) for each row number: the sign of the count-sketch."""
        return 1 - 2 * (mix32(self._split(index)[1], self.sign_seed) & 1)

    def _split(self, index: Tensor) -> tuple[Tensor | int, Tensor]:
        """The number of the matrix that each row belongs to, and the row's number within it."""
        return (0, index) if self.matrices == 1 else (index // self.height, index % self.height)

    def _joined(self, matrix: Tensor | int, number: Tensor, each: int) -> Tensor:
        return number if self.matrices == 1 else number + matrix * each


@lru_cache(maxsize=4096)
def row_hashes(rows: int, width: int, depth: int, hash: str, seed: int, matrices: int = 1) -> tuple[RowHash, ...]:
    """The ``depth`` hashes of a parameter with ``rows`` rows.

    Args:
        rows: number of rows of all matrices, >= 1.
        width: number of buckets of each hash, for all matrices, 1 <= width <= rows.
        depth: number of hashes.
        hash: with ``"strided"`` the first hash is ``i mod width`` and only the others are drawn from the seed; this
            was measured to train as well as a random bijection. With ``"affine"`` all hashes are drawn.
        seed: any integer; equal seeds give equal hashes on every machine.
        matrices: number of matrices that the rows and the buckets belong to. It divides both.
    """
    stream = _splitmix64(seed ^ 0x5EED_5EED)
    hashes, height = [], rows // matrices
    for j in range(depth):
        a, b, sign_seed = next(stream), next(stream), next(stream) & _MASK32
        if (j == 0 and hash == "strided") or height == 1:
            a, b = 1, 0
        else:
            # Any a that is coprime to R makes i -> a * i + b a bijection mod R. a = 1 would repeat the strided hash.
            a, b = 1 + a % max(1, height - 1), b % height
            while math.gcd(a, height) != 1 or (a == 1 and height > 3):
                a = a % height + 1
        hashes.append(RowHash(rows, width, a, b, sign_seed, matrices))
    return tuple(hashes)


def mix32(index: Tensor, seed: int) -> Tensor:
    """A 32-bit integer hash of each element of ``index`` (int64 in, int64 values in [0, 2**32) out).

    This is the finaliser of MurmurHash3, applied to ``index ^ seed``. It is good enough for signs and for rounding
    noise, and it is the same few 32-bit multiplications on every device. int64 products wrap, but their low 32 bits
    are exact.
    """
    h = (index >> 32).bitwise_xor_(index).bitwise_xor_(seed & _MASK32).bitwise_and_(_MASK32)
    h.bitwise_xor_(h >> 16).mul_(0x85EBCA6B).bitwise_and_(_MASK32)
    h.bitwise_xor_(h >> 13).mul_(0xC2B2AE35).bitwise_and_(_MASK32)
    return h.bitwise_xor_(h >> 16)


def uniform(index: Tensor, seed: int, step: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in [0, 1): a pure function of (seed, step, index), independent of chunks and of the device."""
    # With 24 bits every value is exact in float32, and none is rounded up to 1.
    return (random32(index, seed, step) >> 8).to(dtype) * (1.0 / (1 << 24))


def random32(index: Tensor, seed: int, step: int) -> Tensor:
    """32 random bits for each element of ``index`` (int64 in [0, 2**32)), from a generator without state."""
    key = key_of(seed, step)
    return mix32(mix32(index, key & _MASK32), key >> 32)


def key_of(seed: int, step: int) -> int:
    """The 64 bits that `random32` mixes with its elements."""
    return next(_splitmix64((seed & _MASK64) ^ (step * 0x9E37_79B9_7F4A_7C15 & _MASK64)))


def derive(*numbers: int) -> int:
    """A 64-bit seed made of several integers. It is equal on every machine, and differs if any of them differs."""
    seed = 0
    for n in numbers:
        seed = next(_splitmix64(seed ^ (n & _MASK64)))
    return seed


def _splitmix64(seed: int) -> Iterator[int]:
    x = seed & _MASK64
    while True:
        x = (x + 0x9E37_79B9_7F4A_7C15) & _MASK64
        z = ((x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK64
        yield z ^ (z >> 31)

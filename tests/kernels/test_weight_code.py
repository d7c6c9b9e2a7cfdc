"""Stored weights with corrections (`kernels.weight_code`), against an oracle in float64, for every bfloat16 number."""

import math

import numpy as np
import pytest
import torch

from sketch_plugins.kernels.weight_code import CODES, UNKNOWN, Corrected, decode, encode, fingerprint
from sketch_plugins.sharding.blocks import Matrix, Rows, tiles

ALL = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
# All corrections of 8 bits; of 16 bits the ends, powers of two and some in between.
GRID = {
    24: list(range(-128, 128)),
    32: sorted({-32768, 32767, 0, *(s * 2**k for k in range(15) for s in (-1, 1)), *range(-32768, 32768, 1999)}),
}
# For the arithmetic below: significand bits of a stored number and least exponent, of float16 and bfloat16.
SHAPE = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}


def spelled_out(weight, code, dtype, bits):
    """The number that a pair represents, in float64: the stored number plus fractions of the distance to the
    representable number on the side that the correction points to."""
    fraction = 8 if bits == 24 else 16
    number = weight.double()
    magnitude = number.abs()
    significand, least = SHAPE[dtype]
    exponent = torch.where(magnitude > 0, torch.frexp(magnitude)[1].double() - 1, float(least))
    above = 2.0 ** (exponent.clamp(min=least) - significand)
    # Below a power of two the next number is half as far away, but not below the least normal one.
    power = (torch.frexp(magnitude)[0] == 0.5) & (exponent > least)
    below = torch.where(power, above / 2, above)
    distance = torch.where(code.double() < 0, below, above)
    out = (magnitude + code.double() * distance / 2**fraction).clamp(min=0)
    return torch.where(weight.signbit(), -out, out)


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight_with_a_grid_of_corrections(dtype, bits):
    weight = ALL.view(dtype)
    finite = weight.isfinite()
    for value in GRID[bits]:
        code = torch.full(weight.shape, value, dtype=CODES[bits])
        got = decode(weight, code)
        assert torch.equal(got[~finite].isnan(), weight[~finite].isnan())
        assert torch.equal(got[~finite].nan_to_num(7), weight[~finite].float().nan_to_num(7))
        wanted = spelled_out(weight, code, dtype, bits)
        # float16 with 16 more bits has more bits than float32.
        wide = dtype == torch.float16 and bits == 32
        error = (got.double() - wanted)[finite].abs()
        assert bool((error <= (wanted[finite].abs() * 2.0**-22 if wide else torch.zeros(()))).all())
        assert not bool(got[finite].isnan().any())
        # Encoding gives the same weight and the same correction, if a step can have written them.
        if wide:
            continue
        back, again = encode(got, dtype, bits)
        ours = finite & ~((weight.abs() == 0) & (code < 0))
        assert torch.equal(back.view(torch.int16)[ours], weight.view(torch.int16)[ours])
        assert torch.equal(again[ours], code[ours])


@pytest.mark.parametrize("noise", [None, 0, 128, 255])
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_bound(dtype, bits, noise):
    generator = torch.Generator().manual_seed(0)
    # Every exponent of float32, subnormal numbers included, with powers of two, their neighbours and random bits.
    tops = torch.arange(255, dtype=torch.int32) << 23
    lows = torch.cat(
        [torch.tensor([0, 1, 2**23 - 1, 2**22, 2**15, 2**7]), torch.randint(2**23, (300,), generator=generator)]
    )
    x = (tops.unsqueeze(1) | lows.to(torch.int32)).reshape(-1).view(torch.float32)
    x = torch.cat([x, -x])
    weight, code = encode(x, dtype, bits, None if noise is None else torch.full(x.shape, noise, dtype=torch.int32))
    got = decode(weight, code)
    within = weight.isfinite()
    assert torch.equal(got[~within], x.sign()[~within] * math.inf) and bool((code[~within] == 0).all())
    largest = torch.finfo(dtype).max
    assert bool((x.abs()[~within] > largest).all()), "what is representable became infinite"
    error, size = (got.double() - x.double())[within].abs(), x.double()[within].abs()
    nearest = 1.0 if noise is not None else 0.5
    if dtype == torch.bfloat16:
        bound = (
            torch.zeros_like(size)
            if bits == 32
            else nearest * torch.maximum(size * 2.0**-15, torch.full((), 2.0**-141))
        )
    elif bits == 32:
        bound = torch.where(size < 2.0**-14, 2.0**-41 * (1 + 2.0**-20), 0.0)  # one number of a tie
    else:
        bound = nearest * torch.where(size < 2.0**-14, 2.0**-32 * (1 + 2.0**-4), size * 2.0**-18)
    assert bool((error <= bound).all())
    # The weight is the nearest one to the number that the pair represents, and has its sign.
    plain = got.to(dtype).float()
    assert bool(((weight.float() - got).abs() <= (plain - got).abs())[within].all())
    assert torch.equal(weight.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite(dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan]).view(3)
    odd = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # NaN in the bits cut off
    for bits in (24, 32):
        weight, code = encode(torch.cat([x, odd]), dtype, bits, torch.full((5,), 255, dtype=torch.int32))
        assert weight[0] == math.inf and weight[1] == -math.inf and bool(weight[2:].isnan().all())
        assert code.tolist() == [0] * 5


@pytest.mark.parametrize("noise", [None, 0, 255])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_the_largest_number(dtype, noise):
    """Numbers that are finite in the dtype stay finite with any noise, with a correction; others become infinite."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float32)
    tie = (largest.double() * (1 + 2.0 ** -(SHAPE[dtype][0] + 2))).float()  # near it; the exact one is found below
    x = (tie.view(torch.int32) + torch.arange(-70_000, 70_000, dtype=torch.int32)).view(torch.float32)
    x = torch.cat([x, -x])
    weight, code = encode(x, dtype, 24, None if noise is None else torch.full(x.shape, noise, dtype=torch.int32))
    finite = x.to(dtype).isfinite()
    assert bool(finite.any()) and not bool(finite.all())
    assert torch.equal(weight.isfinite(), finite) and not bool(code[~finite].any())
    got = decode(weight, code)
    error = (got.double() - x.double())[finite].abs()
    assert bool((error < largest.double() * 2.0 ** -(SHAPE[dtype][0] + 8)).all())


def test_rounding_by_chance_is_unbiased():
    x = torch.full((256,), 1.0) + 77 * 2.0**-23
    weight, code = encode(x, torch.bfloat16, 24, torch.arange(256, dtype=torch.int32))
    assert float((decode(weight, code).double() - x.double()).sum()) == 0.0


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("rows", [False, True])
def test_tiles_and_rows_do_not_change_a_bit(bits, rows):
    torch.manual_seed(0)
    x = torch.randn(37, 50)
    out = []
    for chunk in (10_000, 7 * 50, 20):
        p, codes = torch.zeros(37, 50, dtype=torch.bfloat16), torch.zeros(37, 50, dtype=CODES[bits])
        whole = Corrected(Matrix(p), codes, seed=3, step=5)
        at_all = [Rows(37, torch.arange(37), 0, 50)] if rows else tiles(37, 50, chunk)
        for at in at_all:
            whole.put(at, at.get(x).clone())
        read = torch.cat([whole.get(at).reshape(-1, at.hi - at.lo).clone() for at in [next(tiles(37, 50, 10_000))]])
        out.append((p, codes, read))
        assert float((read - x).abs().max()) <= (0 if bits == 32 else 4 * 2.0**-15)
    for p, codes, read in out[1:]:
        assert torch.equal(p, out[0][0]) and torch.equal(codes, out[0][1]) and torch.equal(read, out[0][2])


def test_a_fingerprint_knows_every_bit_and_every_place():
    torch.manual_seed(0)
    p = torch.randn(130, 260).to(torch.bfloat16)
    one = fingerprint(p)
    assert one == fingerprint(p.clone()) == fingerprint(p.t().contiguous().t()) != UNKNOWN
    assert fingerprint(torch.zeros(3, dtype=torch.bfloat16)) != UNKNOWN
    for place in (0, 129 * 260 + 259):
        for bit in range(16):
            other = p.clone()
            other.view(-1).view(torch.int16)[place] ^= np.int16(1 << bit) if bit < 15 else np.int16(-(1 << 15))
            assert fingerprint(other) != one
    swapped = p.clone()
    swapped[[0, 1]] = p[[1, 0]]
    assert fingerprint(swapped) != one

"""Vectors in Numba: lanes that count, rounding, NaN, and whether they are vectors."""

import math
import os
import platform
import subprocess
import sys

import pytest
import torch

np = pytest.importorskip("numpy", reason="numpy is not installed")
numba = pytest.importorskip("numba", reason="Numba is not installed")

from sketch_plugins.kernels import vector  # noqa: E402
from sketch_plugins.kernels.vector import LANES, largest, least, load, magnitude, root, splat, store, top, total  # noqa: E402

U = np.uint64


@numba.njit
def copied(source, target, at, n):
    store(target, at, load(source, at, n), n)


@numba.njit
def combined(x, y, out):
    a, b = load(x, U(0), LANES), load(y, U(0), LANES)
    store(out, U(0), a + b, LANES)
    store(out, U(16), a - np.float32(2) * b, LANES)
    store(out, U(32), a / b, LANES)
    store(out, U(48), root(magnitude(a)), LANES)
    store(out, U(64), least(a, b), LANES)
    store(out, U(80), top(magnitude(a), magnitude(b)), LANES)
    return total(a), largest(magnitude(a)), total(splat(np.float32(0.5)))


@numba.njit
def maxima(x, y, out):
    a, b = load(x, U(0), LANES), load(y, U(0), LANES)
    store(out, U(0), top(a, b), LANES)
    store(out, U(16), top(b, a), LANES)
    return largest(a)


@pytest.mark.parametrize("n", [1, 7, 15, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint16])
def test_only_the_lanes_that_count_are_touched(n, dtype):
    source = np.arange(1, 41).astype(np.float32).astype(dtype)
    if dtype == np.uint16:
        source = torch.arange(1.0, 41.0).bfloat16().view(torch.int16).numpy().view(np.uint16)
    target = np.zeros_like(source)
    copied(source, target, U(3), U(n))
    assert (target[3 : 3 + n] == source[3 : 3 + n]).all()
    assert not target[:3].any() and not target[3 + n :].any()
    wide = np.full(40, -1.0, np.float32)
    copied(source, wide, U(3), U(n))
    assert (wide[3 : 3 + n] == np.arange(4, 4 + n)).all() and (wide[3 + n :] == -1).all()


def test_arithmetic():
    generator = np.random.default_rng(0)
    x, y = (generator.standard_normal(16).astype(np.float32) for _ in range(2))
    out = np.zeros(96, np.float32)
    sums = combined(x, y, out)
    wanted = [
        x + y, x - 2 * y, x / y, np.sqrt(np.abs(x)), np.minimum(x, y), np.maximum(np.abs(x), np.abs(y)),
    ]  # fmt: skip
    # A multiplication and a subtraction may be fused: one rounding less.
    np.testing.assert_allclose(out, np.concatenate(wanted), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sums, [x.sum(), np.abs(x).max(), 8.0], rtol=1e-5)


def test_nan_and_infinity():
    x, y = np.ones(16, np.float32), np.ones(16, np.float32)
    x[3], x[5], y[7] = math.nan, -math.inf, math.nan
    out = np.zeros(96, np.float32)
    sums = combined(x, y, out)
    assert math.isnan(sums[0]) and math.isnan(sums[1])
    assert np.isnan(out[80 + 3]) and out[80 + 5] == math.inf and np.isnan(out[80 + 7])
    assert np.isnan(out[48 + 3]) and out[48 + 5] == math.inf
    # A minimum or maximum is NaN if either number is, also a NaN with a sign, which 0 * inf gives on x86.
    assert np.isnan(out[64 + 3]) and out[64 + 5] == -math.inf and np.isnan(out[64 + 7])
    signed, ones = np.array([-math.nan] + [1.0] * 15, np.float32), np.ones(16, np.float32)
    assert np.signbit(signed[0])
    tops = np.zeros(32, np.float32)
    assert math.isnan(maxima(signed, ones, tops)) and np.isnan(tops[[0, 16]]).all() and (tops[1:16] == 1).all()


def test_rounding_is_torch_s():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 60
    x[0], x[1], x[2], x[3] = 0.5, 1.5, -2.5, -126.5  # ties, to even
    codes = np.zeros(16, np.int8)
    copied(x.numpy(), codes, U(0), LANES)
    assert (torch.from_numpy(codes) == x.round().clamp(-127, 127).to(torch.int8)).all() or x.abs().max() > 127
    bits = np.zeros(16, np.uint16)
    x[4], x[5] = math.nan, -math.inf
    copied(x.numpy(), bits, U(0), LANES)
    ours = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours[torch.arange(16) != 4], x.bfloat16()[torch.arange(16) != 4]) and ours[4].isnan()


def test_they_are_the_registers_of_the_machine():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("looks for registers of x86")
    combined(*(np.ones(16, np.float32) for _ in range(2)), np.zeros(96, np.float32))
    assembly = "".join(combined.inspect_asm().values())
    from llvmlite.binding import get_host_cpu_features

    # Numba compiles for this machine, or for the features in NUMBA_CPU_FEATURES.
    said = numba.core.config.CPU_FEATURES
    features = (
        {f"+{name}" for name, there in get_host_cpu_features().items() if there}
        if said is None
        else set(said.split(","))
    )
    register = "zmm" if "+avx512f" in features else "ymm" if "+avx2" in features else "xmm"
    assert assembly.count(register) > 10 and "sqrtps" in assembly and vector.Lanes is not None


SCRIPT = """
import hashlib, torch
from sketch_plugins import CSAdam
generator = torch.Generator().manual_seed(0)
params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(200, 100)]]
optimizer = CSAdam(params, 1e-3, fused=True)
for _ in range(4):
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest())
"""


def test_code_from_the_cache_has_the_bits_of_code_just_compiled(tmp_path):
    """The first run on a machine, which compiles, computes the same bits as every later one."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))
    assert runs[0] == runs[1]

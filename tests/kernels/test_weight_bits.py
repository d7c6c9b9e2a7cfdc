"""``weight_bits`` in the kernels: every bfloat16 and float16 weight, bit for bit what the eager step writes.

If the arithmetic of a step is exact except for one rounding (SGD at a rate that is a power of two), all backends have
to write the same weights and the same corrections, including noise. `tests/compare` compares everything else.
"""

import pytest
import torch

from sketch_plugins import CSAdam, CSMomentum, NumericsProbe
from sketch_plugins.kernels.interpretation import interpreted
from sketch_plugins.kernels.weight_code import CODES

SHAPE = (256, 256)  # every weight once


def stepped(device, dtype, bits, shape, fused):
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(SHAPE)
    p = torch.nn.Parameter(every[: shape[0], : shape[1]].to(device, copy=True))
    own = {"momentum": 0.0, "weight_decay": 0.0, "first_moment": "none", "fused": fused}
    optimizer = CSMomentum([p], lr=2.0**-9, weight_bits=bits, seed=7, **own)
    p.grad = torch.zeros_like(p)
    optimizer.step()  # the state exists now, and nothing has moved
    before = p.detach().cpu().clone()
    assert torch.equal(before.nan_to_num(1), every[: shape[0], : shape[1]].nan_to_num(1))
    codes = optimizer.state[p]["weight_correction.codes"]
    assert not bool(codes.any())
    info = torch.iinfo(codes.dtype)
    codes.copy_(torch.randint(info.min, info.max + 1, codes.shape, generator=generator).to(codes))
    # Gradients of the size of the weights, of infinities and NaN some others.
    size = torch.where(before.isfinite(), before, torch.ones_like(before)).float()
    # Triton's interpreter reads subnormal numbers of bfloat16 wrongly: such weights get a gradient of 0.
    if dtype == torch.bfloat16 and interpreted():
        size = torch.where(size.abs() < 2.0**-120, 0.0, size)
    p.grad = (torch.randn(shape, generator=generator) * size).to(p)
    optimizer.step()
    return p.detach().cpu(), codes.cpu()


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_weight(kernels, dtype, bits):
    if dtype == torch.float16 and kernels.type == "cpu" and not interpreted():
        pytest.skip("Numba's loops do not take float16")
    # NaN and infinities lie in the rows 127 and 255. With 33 columns, a vector of the CPU's loops is not full.
    for shape in [(256, 5), (256, 33)] if interpreted() else [SHAPE, (256, 33)]:
        ours, wanted = (stepped(kernels, dtype, bits, shape, fused) for fused in (True, False))
        assert ours[1].dtype == CODES[bits]
        same = ours[0].view(torch.int16) == wanted[0].view(torch.int16)
        assert bool((same | (ours[0].isnan() & wanted[0].isnan())).all())
        assert torch.equal(ours[1], wanted[1])
        assert not bool(ours[1][~ours[0].isfinite()].any())
        assert float((ours[0] != 0).sum()) > 0.9 * ours[0].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_weight(kernels, dtype):
    """Half-way to the number that would follow, weights become infinite; noise must not carry a weight there."""
    if dtype == torch.float16 and kernels.type == "cpu" and not interpreted():
        pytest.skip("Numba's loops do not take float16")
    largest = torch.finfo(dtype).max
    unit = largest - float(torch.tensor(largest, dtype=dtype).view(torch.int16).sub(1).view(dtype))  # to the one before
    out = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.full((256, 33), largest, dtype=dtype, device=kernels))
        own = {"momentum": 0.0, "weight_decay": 0.0, "first_moment": "none", "fused": fused}
        optimizer = CSMomentum([p], lr=2.0**-9, weight_bits=24, seed=7, **own)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        codes = optimizer.state[p]["weight_correction.codes"]
        codes.fill_(127)  # the last code; a step adds 0 to 1 of the distance between two codes
        p.grad = torch.arange(33, device=kernels).mul(-unit * 2.0 ** (9 - 8 - 5)).expand(256, 33).to(dtype)
        optimizer.step()
        out.append((p.detach().cpu(), codes.cpu()))
    (p, codes), wanted = out
    assert torch.equal(p, wanted[0]) and torch.equal(codes, wanted[1])
    assert bool((p[:, :32] == largest).all()) and bool((codes[:, :32] == 127).all())
    assert bool((p[:, 32] == float("inf")).all()) and not bool(codes[:, 32].any())


@pytest.mark.parametrize("bits", [None, 24, 32])
def test_the_probe_sees_what_kernels_have_written(kernels, bits):
    """Kernels write to addresses, so the values that are read before a step must not be a view."""
    if bits is None and interpreted():
        pytest.skip("Triton's interpreter cuts numbers to bfloat16, where processors round to nearest")
    p = torch.nn.Parameter(torch.ones(64, 40, dtype=torch.bfloat16, device=kernels))
    optimizer = CSAdam([p], lr=1e-4, weight_decay=0.0, weight_bits=bits, fused=True, min_compress_size=256)
    with NumericsProbe(optimizer, every=1) as probe:
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert probe.last.total.sampled == p.numel() and probe.share == (1.0 if bits is None else 0.0)

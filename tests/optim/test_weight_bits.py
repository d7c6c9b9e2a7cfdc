"""``weight_bits``: weights of 24 and 32 bits in bfloat16 and float16 parameters, in every optimizer, on the eager path.

tests/kernels/test_weight_code.py has the code itself, tests/compare the kernels.
"""

import pytest
import torch

from sketch_plugins import CSAdam, CSMomentum, registry
from sketch_plugins.kernels.weight_code import decode

NAMES = [name for name in registry.names() if "weight_bits" in registry.get(name).options]


def made(shapes, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def whole(optimizer, p):
    state = optimizer.state[p]
    return decode(p.detach(), state["weight_correction.codes"].view(p.shape))


def give(params, step, generator=None):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


SHAPES = [(96, 64), (7,), (), (70, 33), (5, 3, 4, 4)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [24, 32])
def test_every_optimizer_moves_as_in_float32(name, bits):
    """With 32 bits bit for bit as a float32 parameter with the same gradients, with 24 within its rounding."""
    cls = registry.get(name).cls
    half = made(SHAPES)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    own = {} if name == "sadagrad" else {"fused": False}
    lr = 1e-3 if name in ("sketchy", "cs_lion") else 1e-2
    ours, reference = cls(half, lr=lr, weight_bits=bits, **own), cls(full, lr=lr, **own)
    for step in range(6):
        give(half, step)
        for p, q in zip(half, full, strict=True):
            q.grad = p.grad.float()
        ours.step()
        reference.step()
    for p, q, start in zip(half, full, made(SHAPES), strict=True):
        got, wanted = whole(ours, p), q.detach()
        if name == "sketchy" and p.ndim > 1:  # decompositions enlarge what gradients of two dtypes are summed up to
            moved = float((wanted - start.detach().float()).abs().max())
            assert float((got - wanted).abs().max()) < 0.01 * moved
        elif bits == 32:
            assert torch.equal(got, wanted)
        else:  # six roundings, by less than 2**-15 of a number each
            assert float((got - wanted).abs().max()) < 6 * 2.0**-15 * float(wanted.abs().max() + 0.1)
        # The parameter itself is the nearest weight.
        assert bool(((p.detach().float() - got).abs() <= (got.bfloat16().float() - got).abs()).all())


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_layouts_whose_rows_are_copied(batch_dims):
    """Axes in another order in memory have the same weights and corrections as a contiguous tensor."""
    out = []
    for layout in (lambda x: x, lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0)):
        (p,) = made([(20, 24, 18)])
        p = torch.nn.Parameter(layout(p.detach()))
        optimizer = CSAdam([p], weight_bits=24, min_compress_size=0, batch_dims=batch_dims, fused=False, chunk_size=500)
        for step in range(3):
            give([p], step)
            optimizer.step()
        out.append((p.detach(), optimizer.state[p]["weight_correction.codes"]))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])


def test_thousands_of_updates_of_a_millionth_arrive():
    """Each is far below half of bfloat16's last place (1/512), and below that of 24 bits (1/65536)."""
    steps, lr, copies = 10_000, 1e-6, 64
    start = torch.arange(128, 256).repeat(copies).to(torch.bfloat16) / 128  # every weight from 1 to 2
    moved = {}
    for bits in (None, 24, 32):
        p = torch.nn.Parameter(start.clone())
        own = {"momentum": 0.0, "weight_decay": 0.0, "first_moment": "none", "fused": False}
        optimizer = CSMomentum([p], lr=lr, weight_bits=bits, **own)
        p.grad = -start.clone()
        for _ in range(steps if bits else 1):  # without additional bits all steps are alike
            optimizer.step()
        if bits is None:
            assert torch.equal(p.detach(), start)  # no update has an effect
        else:
            moved[bits] = (whole(optimizer, p).double() / start.double() - 1).view(copies, 128)
    for bits, found in moved.items():
        assert float(found.mean()) == pytest.approx(steps * lr, rel=0.01), bits
    # float32 rounds each update, too: to a multiple of 2**-23. What 24 bits add is the noise of a binomial count: a
    # step goes to the next of their numbers with a probability of update / 2**-15.
    update = lr * start.double().view(copies, 128)
    noise = (steps * update * 2.0**-15).sqrt() / start.double().view(copies, 128)
    error = (moved[24] - moved[32]) / noise
    assert abs(float(error.mean())) < 4 / error.numel() ** 0.5 and 0.95 < float(error.std()) < 1.05


def test_a_norm_weight_at_one_moves():
    steps, lr = 400, 1e-5  # a fine-tune's rate
    for bits, moves in ((None, False), (24, True), (32, True)):
        norm = torch.nn.LayerNorm(64, bias=False, dtype=torch.bfloat16)
        optimizer = CSAdam(norm.parameters(), lr=lr, weight_decay=0.0, weight_bits=bits, fused=False)
        for _ in range(steps):
            norm.weight.grad = torch.ones_like(norm.weight)
            optimizer.step()
        assert bool((norm.weight < 1).all()) is moves
        if moves:
            assert float(whole(optimizer, norm.weight).mean()) == pytest.approx(1 - steps * lr, rel=2e-4)

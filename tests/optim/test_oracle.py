"""Whole trajectories with collisions, against a naive implementation that keeps Python loops over rows and buckets."""

import math
import statistics

import pytest
import torch

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum
from sketch_plugins.hashing import row_hashes

R, D, WIDTH = 23, 4, 5


class Moment:
    """One sketched moment; None as hashes: exact."""

    def __init__(self, hashes, signed, bucket):
        self.hashes, self.signed, self.bucket = hashes, signed, bucket
        self.tables = [torch.zeros(WIDTH, D, dtype=torch.float64) for _ in hashes]

    def update(self, x, rows, decay, gain):
        for h, table in zip(self.hashes, self.tables, strict=True):
            for b in range(WIDTH):
                members = [i for i in (rows if rows is not None else range(R)) if int(h.bucket(torch.tensor(i))) == b]
                if not members:
                    continue
                values = torch.stack([x[i] * (int(h.sign(torch.tensor(i))) if self.signed else 1) for i in members])
                if rows is None:
                    total = values.sum(0) if self.bucket == "sum" else values.mean(0)
                    table[b] = decay * table[b] + gain * total
                else:
                    for _ in members:
                        table[b] = decay * table[b] + gain * values.mean(0)

    def estimate(self, i):
        out = []
        for h, table in zip(self.hashes, self.tables, strict=True):
            sign = int(h.sign(torch.tensor(i))) if self.signed else 1
            out.append(sign * table[int(h.bucket(torch.tensor(i)))])
        pick = statistics.median if self.signed else min
        return torch.tensor([pick(float(o[d]) for o in out) for d in range(D)], dtype=torch.float64)


def steps(sparse, n=8):
    g = torch.Generator().manual_seed(3)
    for _ in range(n):
        grad = torch.randn(R, D, dtype=torch.float64, generator=g)
        rows = None
        if sparse:
            rows = torch.randperm(R, generator=g)[:14].sort().values.tolist()
            mask = torch.zeros(R, 1, dtype=torch.float64)
            mask[rows] = 1
            grad = grad * mask
        yield grad, rows


def as_gradient(grad, rows):
    if rows is None:
        return grad
    return torch.sparse_coo_tensor(torch.tensor([rows]), grad[rows], grad.shape)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("first_moment", ["fp32", "count_sketch", "none"])
@pytest.mark.parametrize("bucket", ["mean", "sum"])
def test_adam_with_collisions_and_cleaning(first_moment, depth, bucket, sparse):
    lr, b1, b2, eps, decay = 0.02, 0.8, 0.9, 1e-6, 0.1
    options = {"width": WIDTH, "depth": depth, "hash": "affine", "seed": 9, "min_compress_size": 0}
    p = torch.nn.Parameter(torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    expected = p.detach().clone()
    optimizer = CSAdam(
        [p], lr, (b1, b2), eps, decay, first_moment=first_moment, bucket=bucket, clean_every=3, clean_factor=0.25,
        allow_dense_count_sketch=True, chunk_size=9, **options,
    )  # fmt: skip
    hashes = row_hashes(R, WIDTH, depth, "affine", 9)
    v, m = Moment(hashes, False, bucket), Moment(hashes, True, "sum")
    exact_m = torch.zeros(R, D, dtype=torch.float64)
    for t, (grad, rows) in enumerate(steps(sparse), 1):
        touched = range(R) if rows is None else rows
        if t % 3 == 0:
            v.tables = [table * 0.25 for table in v.tables]
        m.update(grad, rows, b1, 1 - b1)
        v.update(grad * grad, rows, b2, 1 - b2)
        for i in touched:
            exact_m[i] = b1 * exact_m[i] + (1 - b1) * grad[i]
            first = {"fp32": exact_m[i], "count_sketch": m.estimate(i), "none": grad[i]}[first_moment]
            correction = 1.0 if first_moment == "none" else 1 - b1**t
            root = math.sqrt(1 - b2**t)
            if rows is None:
                direction = first / correction / (v.estimate(i).sqrt() / root + eps)
            else:
                direction = first / correction * root / (v.estimate(i).sqrt() + eps)
            expected[i] = (1 - lr * decay) * expected[i] - lr * direction
        p.grad = as_gradient(grad, rows)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_adagrad_with_collisions(sparse):
    p = torch.nn.Parameter(torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    expected = p.detach().clone()
    optimizer = CSAdagrad([p], 0.1, width=WIDTH, depth=2, weight_decay=0.1, min_compress_size=0, lr_decay=0.2)
    v = Moment(row_hashes(R, WIDTH, 2, "strided", 0), False, "sum")
    exact = torch.zeros(R, D, dtype=torch.float64)
    for t, (grad, rows) in enumerate(steps(sparse)):
        touched = list(range(R)) if rows is None else rows
        l2 = grad.clone()
        l2[touched] += 0.1 * expected[touched]
        v.update(l2 * l2, rows, 1.0, 1.0)
        exact[touched] += l2[touched] ** 2
        for i in touched:
            assert (v.estimate(i) >= exact[i] * (1 - 1e-12)).all()
            expected[i] -= 0.1 / (1 + 0.2 * t) * l2[i] / (v.estimate(i).sqrt() + 1e-10)
        p.grad = as_gradient(grad, rows)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_with_collisions(nesterov, sparse):
    p = torch.nn.Parameter(torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    expected = p.detach().clone()
    optimizer = CSMomentum(
        [p], 0.1, momentum=0.8, nesterov=nesterov, first_moment="count_sketch", depth=3, width=WIDTH,
        min_compress_size=0, allow_dense_count_sketch=True,
    )  # fmt: skip
    m = Moment(row_hashes(R, WIDTH, 3, "strided", 0), True, "sum")
    for grad, rows in steps(sparse):
        m.update(grad, rows, 0.8, 1.0)
        for i in range(R) if rows is None else rows:
            expected[i] -= 0.1 * (grad[i] + 0.8 * m.estimate(i) if nesterov else m.estimate(i))
        p.grad = as_gradient(grad, rows)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("first_moment", ["none", "fp32", "int8", "bf16"])
@pytest.mark.parametrize("sparse", [False, True])
def test_update_clip_and_scale_parameter(first_moment, sparse):
    """Adafactor's two devices, against their formula on whole tensors."""
    p = torch.nn.Parameter(0.01 * torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    q = torch.nn.Parameter(p.detach().clone())
    common = {"betas": (0.8, 0.9), "weight_decay": 0.1, "first_moment": first_moment, "min_compress_size": 0}
    plain = CSAdam([q], 1.0, **common, width=WIDTH)
    devices = CSAdam([p], 0.5, **common, width=WIDTH, update_clip=0.3, scale_parameter=True, chunk_size=9)
    clipped = False
    for step, (grad, rows) in enumerate(steps(sparse)):
        touched = list(range(R)) if rows is None else rows
        grad = grad * 5**step  # growing, so that clipping has something to do
        before = p.detach().clone()
        q.data.zero_()  # the plain step from 0 is minus the update: no weight decay
        q.grad, p.grad = as_gradient(grad, rows), as_gradient(grad, rows)
        plain.step()
        devices.step()
        update = -q.detach()
        rms = update[touched].square().mean().sqrt()
        clipped |= bool(rms > 0.3)
        scale = max(1e-3, float(before[touched].square().mean().sqrt()))
        expected = before.clone()
        expected[touched] *= 1 - 0.5 * 0.1
        expected -= 0.5 * scale * update / max(1.0, float(rms) / 0.3)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)
    assert clipped


def test_scale_parameter_has_a_floor_and_a_zero_parameter_moves():
    p = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = CSAdam([p], 1.0, preset="lean", reference_rms=1.0, min_compress_size=0)
    p.grad = torch.ones(8, 8)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((8, 8), -1e-3))

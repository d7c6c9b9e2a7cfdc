"""With a bucket for every row and no cleaning, every optimizer is its torch.optim counterpart."""

import copy

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, SparseAdam

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum, CSRMSprop

from .conftest import gradients, parameters

# fp32: two roundings of 6e-8 a step over 8 steps, relative to parameters of size 1
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}

WIDE = {"compression": 1.0, "min_compress_size": 0}
SECOND = [
    {},
    {"hash": "affine"},
    {"depth": 3, "hash": "affine"},
    {"depth": 2, "bucket": "sum"},
    {"second_moment": "row_count_min"},
    {"second_moment": "row_count_min", "depth": 3, "hash": "affine"},
    {"second_moment": "dense"},
]
FIRST = [{"first_moment": "fp32"}, {"first_moment": "count_sketch", "depth": 3, "allow_dense_count_sketch": True}]


def compare(ours, reference, dtype, steps=8):
    mine, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = ours(mine), reference(theirs)
    for step in range(steps):
        for p, q, g in zip(mine, theirs, gradients(dtype=dtype, seed=step), strict=True):
            p.grad, q.grad = g, g.clone()
        a.step()
        b.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{**f, **s} for s in SECOND for f in FIRST], ids=str)
def test_cs_adam_is_adamw(options, dtype):
    kwargs = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    compare(
        lambda p: CSAdam(p, **kwargs, **WIDE, **options),
        lambda p: AdamW(p, **kwargs, foreach=False),
        dtype,
    )


@pytest.mark.parametrize("options", [{**FIRST[0], **SECOND[0]}, {**FIRST[1], **SECOND[5]}], ids=str)
def test_cs_adam_is_adamw_in_tiny_tiles(options):
    compare(lambda p: CSAdam(p, **WIDE, **options, chunk_size=7), AdamW, torch.float64, steps=3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_exact_preset_is_adamw_at_any_compression(dtype):
    compare(lambda p: CSAdam(p, lr=0.01, preset="exact", min_compress_size=0), lambda p: AdamW(p, lr=0.01), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", SECOND, ids=str)
def test_cs_rmsprop_is_adam_without_a_first_moment(options, dtype):
    compare(
        lambda p: CSRMSprop(p, lr=0.01, weight_decay=0.1, **WIDE, **options),
        lambda p: AdamW(p, lr=0.01, betas=(0.0, 0.999), weight_decay=0.1),
        dtype,
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", SECOND, ids=str)
def test_cs_adagrad_is_adagrad(options, dtype):
    kwargs = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}
    compare(lambda p: CSAdagrad(p, **kwargs, **WIDE, **options), lambda p: Adagrad(p, **kwargs), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("options", FIRST, ids=str)
def test_cs_momentum_is_sgd(options, nesterov, dtype):
    kwargs = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.8, "nesterov": nesterov}
    compare(lambda p: CSMomentum(p, **kwargs, **WIDE, **options), lambda p: SGD(p, **kwargs), dtype)


def test_maximize_and_decoupled_weight_decay():
    compare(
        lambda p: CSAdam(p, first_moment="fp32", maximize=True, **WIDE),
        lambda p: AdamW(p, maximize=True),
        torch.float64,
    )
    compare(
        lambda p: CSMomentum(p, lr=0.1, first_moment="none", weight_decay=0.1, decoupled_weight_decay=True, **WIDE),
        # SGD without momentum on a decayed parameter, written as AdamW's decay and SGD's step
        lambda p: _DecayedSGD(p, lr=0.1, weight_decay=0.1),
        torch.float64,
    )


class _DecayedSGD(SGD):
    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr)
        self.keep = 1 - lr * weight_decay

    def step(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(self.keep)
        super().step()


# -- row-sparse gradients --------------------------------------------------------------------------------------------


def embeddings(dtype, sparse=True):
    torch.manual_seed(0)
    a = torch.nn.Embedding(50, 7, sparse=sparse, dtype=dtype)
    return a, copy.deepcopy(a)


def looked_up(module, step, rows=9):
    g = torch.Generator().manual_seed(step)
    index = torch.randint(0, 50, (rows,), generator=g)  # with repetitions: one row each
    return (module(index) * torch.randn(rows, 7, generator=g, dtype=torch.float64).to(module.weight.dtype)).sum()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{**f, **s} for s in SECOND for f in FIRST], ids=str)
@pytest.mark.parametrize("form", ["sparse", "auto", True])
def test_cs_adam_is_sparse_adam_on_row_sparse_gradients(options, dtype, form):
    mine, theirs = embeddings(dtype)
    if form != "sparse":
        mine = torch.nn.Embedding(50, 7, dtype=dtype).from_pretrained(mine.weight.detach().clone(), freeze=False)
        options = {**options, "row_sparse": form}
    a = CSAdam(mine.parameters(), lr=0.01, weight_decay=0.0, chunk_size=20, **WIDE, **options)
    b = SparseAdam(theirs.parameters(), lr=0.01)
    for step in range(15):
        for module, optimizer in ((mine, a), (theirs, b)):
            optimizer.zero_grad()
            looked_up(module, step).backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight, **TOLERANCE[dtype])


@pytest.mark.parametrize("options", [{}, {"second_moment": "row_count_min"}, {"depth": 3}], ids=str)
def test_cs_adagrad_is_adagrad_on_sparse_gradients(options):
    mine, theirs = embeddings(torch.float64)
    a = CSAdagrad(mine.parameters(), lr=0.1, **WIDE, **options)
    b = Adagrad(theirs.parameters(), lr=0.1)
    for step in range(15):
        for module, optimizer in ((mine, a), (theirs, b)):
            optimizer.zero_grad()
            looked_up(module, step).backward()
            optimizer.step()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-12, atol=1e-12)

"""Sketchy in stacks: the same numbers as one by one, in hundreds of operations, within a stated memory."""

import collections
import contextlib
import gc
import math
import sys
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sketch_plugins import Sketchy
from sketch_plugins.linalg import kronecker
from sketch_plugins.memory.meter import AllocatorMeter
from sketch_plugins.optim.sketchy import optimizer as sketchy
from sketch_plugins.optim.sketchy.stack import Stack

WIDTH = 192  # of BERT-base a quarter: operations are the same
BERT_LAYER = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)] + [(WIDTH,)] * 9 + [(4 * WIDTH,)]
BERT = [(7630, WIDTH), (128, WIDTH), (2, WIDTH), (WIDTH,), (WIDTH,), *BERT_LAYER * 12, (WIDTH, WIDTH), (WIDTH,)]
# 24 layers of four shapes, with grouped queries.
DECODER_LAYER = [(96, 96), (24, 96), (24, 96), (96, 96), (256, 96), (256, 96), (96, 256), (96,), (96,)]
DECODER = [(2000, 96), *DECODER_LAYER * 24, (96,), (2000, 96)]


class Operations(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func.overloadpacket] += 1
        return func(*args, **(kwargs or {}))


def parameters(shapes, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(0.1 * torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def give_gradients(params, step):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def counted(shapes, steps, **options):
    """Operations of a step after so many others."""
    params = parameters(shapes)
    optimizer = Sketchy(params, chunk_size=1 << 24, stack_bytes=1 << 28, **options)  # as on an accelerator
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    give_gradients(params, steps)
    with Operations() as operations:
        optimizer.step()
    return operations.counts


@pytest.mark.parametrize("solver", ["eigh", "power"])
def test_a_step_of_bert_base_takes_hundreds_of_operations(solver):
    pytest.importorskip("numba", reason="without kernels each elementwise part is operations of its own")
    ordinary, solved = (counted(BERT, steps, solver=solver, refresh_every=0) for steps in (5, 9))
    assert ordinary.total() <= 300 and solved.total() <= 600
    # The host waits for one number, which says whether gradients are finite; decompositions have a flag for each shape.
    assert ordinary[torch.ops.aten._local_scalar_dense] == solved[torch.ops.aten._local_scalar_dense] == 1
    assert not ordinary[torch.ops.aten._linalg_eigh] and 0 < solved[torch.ops.aten._linalg_eigh] <= 8
    decoder, decoder_solved = (counted(DECODER, steps, solver=solver, refresh_every=0) for steps in (5, 9))
    assert decoder.total() <= 1.2 * 300 and decoder_solved.total() <= 1.2 * 600


def test_operations_do_not_grow_with_the_layers():
    pytest.importorskip("numba", reason="without kernels each elementwise part is operations of its own")
    few, many = (counted([(64, 64), (128, 64), (64, 128)] * layers, 5, fused=True) for layers in (2, 20))
    assert few == many


SHAPES = [(24, 16)] * 5 + [(16, 40)] * 3 + [(12, 6, 3, 3)] * 3 + [(20,), (900, 12)] + [(24, 16)]
VARIANTS = [
    {},
    {"preset": "paper", "rank": 6},
    {"graft": "none", "exponent": 0.5},
    {"graft": "sm3", "input": "gradient"},
    {"momentum_placement": "after", "solver": "power"},
    {"first_moment": "none", "update_clip": 0.0, "scale_parameter": False},
    {"max_block_dim": 10, "weight_decay": 0.1},
    {"input": "gradient", "start_preconditioning_step": 3, "merge_dims": 1},
    {"statistics": "sample", "tail": "sqrt", "stagger_solves": True},
    {"stagger_solves": True, "statistics_freq": 2, "update_freq": 4},
]


def trained(dtype, steps=9, **options):
    params = parameters(SHAPES, dtype)
    optimizer = Sketchy(params, 0.02, **{"rank": 5, "update_freq": 3, "min_compress_size": 100, **options})
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_stacks_of_any_size_take_the_same_step(options, dtype):
    """Products of a batch are those of its members up to rounding, whose order a library may choose by the number.

    In float32 directions that have nearly equal weights turn by more than that: over nine steps 1e-4 of the weights.
    """
    alone = trained(dtype, stack_bytes=0, fused=False, **options)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    size = 24 * 16 * dtype.itemsize
    for bytes_ in (2 * size, 3 * size + 1, -1):
        for p, q in zip(trained(dtype, stack_bytes=bytes_, fused=False, **options)[0], alone, strict=True):
            assert (p - q).norm() <= tolerance * q.norm(), bytes_


def in_groups(params, **options):
    """Groups of one stack, with rates and weight decays of their own."""
    return [
        {"params": params[i::3], "lr": lr, "weight_decay": decay, **options}
        for i, (lr, decay) in enumerate([(0.02, 0.1), (0.02, 0.0), (0.05, 0.3)])
    ]


def transposed(g):
    return g.transpose(0, -1).contiguous().transpose(0, -1)


KERNELS = [
    ({}, {}),
    ({"weight_decay": 0.1, "maximize": True}, {}),
    ({"momentum_placement": "after", "nesterov": False}, {}),
    ({"graft": "rmsprop", "update_clip": 0.0, "scale_parameter": False}, {}),
    ({"input": "gradient", "start_preconditioning_step": 3}, {}),
    ({"lr": torch.tensor(0.02)}, {}),
    ({}, {"groups": in_groups}),
    ({}, {"layout": transposed}),
    ({}, {"dtype": torch.bfloat16}),
    ({"first_moment": "none"}, {"gradients": torch.bfloat16}),
    ({"merge_dims": 1, "batch_dims": 1}, {"shapes": [(4, 18, 16)] * 3 + [(16, 24)] * 2}),
]


@pytest.mark.parametrize(
    ("options", "given"),
    KERNELS,
    ids=["default", "maximize", "after", "rmsprop", "of_gradient", "rate_tensor", "groups", "transposed", "bf16",
         "bf16_gradients", "experts"],
)  # fmt: skip
def test_a_stack_in_kernels_is_the_definition_s_up_to_rounding(options, given):
    pytest.importorskip("numba", reason="needs Numba's kernels")
    dtype = given.get("dtype", torch.float32)
    # Exact moments: codes of int8 are rounded to the other neighbour once in a while.
    options = {"lr": 0.02, "rank": 5, "update_freq": 3, "min_compress_size": 100, "first_moment": "fp32", **options}
    results = []
    for fused, size in ((True, -1), (False, 0)):
        params = parameters(given.get("shapes", SHAPES), dtype)
        optimizer = Sketchy(given.get("groups", list)(params), fused=fused, stack_bytes=size, **options)
        for step in range(7):
            give_gradients(params, step)
            for p in params:
                if "layout" in given:
                    p.grad = given["layout"](p.grad)
                if "gradients" in given and hasattr(p, "grad_dtype"):
                    grad, p.grad, p.grad_dtype = p.grad, None, None
                    p.grad = grad.to(given["gradients"])
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert (p - q).norm() <= (3e-3 if dtype == torch.bfloat16 else 1e-4) * q.norm()


def test_a_plan_of_the_same_shapes_leaves_nothing_behind(monkeypatch):
    """Nothing of fake tensors may be kept, because their numbers would be used in a step."""
    monkeypatch.setattr(kronecker, "_CONSTANTS", {})
    with FakeTensorMode():
        params = parameters([(24, 16)] * 2 + [(16, 40)])
        optimizer = Sketchy(params, rank=4)
        optimizer._numbers_are_answered = True
        for p in params:
            p.grad = torch.zeros_like(p)
        with contextlib.suppress(Exception):  # nobody answers for the numbers here
            optimizer.step()
    assert not any(
        type(value) is not torch.Tensor
        for of in kronecker._CONSTANTS.values()
        for value in of
        if not isinstance(value, float)
    )


def test_stacks_that_come_and_go_are_forgotten():
    params = parameters([(12, 8)] * 12)
    optimizer = Sketchy(params, rank=2)
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        give_gradients(params, step)
        for p in params:
            if torch.rand((), generator=g) < 0.5:
                p.grad = None
        optimizer.step()
    assert len(optimizer._step_cache.stacks) < 100


def sizes_of_stacks(monkeypatch, params, optimizer):
    seen = []
    prepare = Stack.prepare
    monkeypatch.setattr(Stack, "prepare", lambda self: seen.append((len(self.members), self.parts)) or prepare(self))
    give_gradients(params, 0)
    optimizer.step()
    monkeypatch.undo()
    return seen


def test_what_is_stacked(monkeypatch):
    """Equal shapes, dtypes and options: rates and weight decays may differ, and so may groups."""
    shapes = [(24, 16)] * 4
    params, others = parameters(shapes), parameters(shapes)
    groups = [{"params": [p], "lr": 0.01 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(params)]
    one = Sketchy(groups, rank=4, fused=False)
    assert sizes_of_stacks(monkeypatch, params, one) == [(4, ())]
    for i, p in enumerate(others):
        by_itself = Sketchy([p], 0.01 * (i + 1), weight_decay=0.1 * i, rank=4, fused=False)
        give_gradients(others, 0)
        by_itself.step()
        torch.testing.assert_close(p, params[i], rtol=1e-6, atol=1e-7)
    other_options = Sketchy([{"params": params[:2]}, {"params": params[2:], "nesterov": False}], rank=4)
    assert [count for count, _ in sizes_of_stacks(monkeypatch, params, other_options)] == [2, 2]
    params = parameters([(130, 128)] * 4)  # not so small that an error in their step is undone by copies
    size = 130 * 128 * 4
    for bytes_, expected in ((0, [1] * 4), (size, [1] * 4), (3 * size, [3, 1]), (4 * size, [4])):
        bounded = Sketchy(params, rank=4, stack_bytes=bytes_)
        assert [count for count, _ in sizes_of_stacks(monkeypatch, params, bounded)] == expected


def test_the_elementwise_parts_are_the_kernels(monkeypatch):
    pytest.importorskip("numba", reason="needs Numba's kernels")
    params = parameters([(24, 16)] * 2)
    assert sizes_of_stacks(monkeypatch, params, Sketchy(params, fused=True)) == [
        (2, ("graft", "momentum", "write_back"))
    ]
    # Of gradients that are preconditioned themselves the graft's update is measured only.
    of_gradient = Sketchy(params, fused=True, input="gradient", start_preconditioning_step=0)
    assert sizes_of_stacks(monkeypatch, params, of_gradient) == [(2, ("momentum", "write_back"))]
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    rounded = Sketchy(halves, fused=True, stochastic_rounding=True)
    assert sizes_of_stacks(monkeypatch, halves, rounded) == [(2, ("graft", "momentum"))]


@pytest.mark.parametrize("fused", [None, False])
def test_a_stack_has_a_stated_memory(fused):
    """Beyond the stack itself: directions and products, the share of the rank, and the elementwise temporaries."""
    params = parameters([(256, 256)] * 16)
    peaks = {}
    one = 256 * 256 * 4
    for count in (1, 4, 16):
        optimizer = Sketchy(params, rank=8, fused=fused, stack_bytes=count * one, chunk_size=1 << 12)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        give_gradients(params, 4)  # no step with a solve
        gc.collect()
        meter = AllocatorMeter()
        meter.start()
        optimizer.step()
        peaks[count] = (meter.read() - meter.live) / (count * one)
    # V and its product with the statistics of two axes, and twice the product with x: 6 * 8 / 256 of it, and some.
    assert all(1 <= peak <= 1.6 for count, peak in peaks.items() if count > 1), peaks
    assert peaks[1] <= 2.0, peaks  # the norm of all gradients and the like, and the tiles of eager parts, weigh more


def test_a_step_leaves_no_gradient_alive():
    params = parameters([(24, 16)] * 3)
    optimizer = Sketchy(params, rank=4)
    gc.disable()  # a circle of references would be found by it, later
    try:
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
            grads = [weakref.ref(p.grad) for p in params]
            optimizer.zero_grad()
            assert [ref() for ref in grads] == [None] * 3
    finally:
        gc.enable()


def test_a_remembered_step_describes_nothing():
    """Number of Python calls for each preconditioned tensor."""
    pytest.importorskip("numba", reason="needs Numba's kernels")

    def calls(layers):
        params = parameters([(64, 300), (128, 200)] * layers)
        optimizer = Sketchy(params, rank=8, fused=True, stack_bytes=1 << 28)
        for step in range(6):
            give_gradients(params, step)
            optimizer.step()
        give_gradients(params, 6)
        count = 0

        def see(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(see)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return count

    few, many = calls(5), calls(25)
    assert (many - few) / 40 <= 160  # 147 were counted


@pytest.mark.parametrize("statistics", ["accumulate", "sample"])
def test_staggered_solves_are_spread_over_the_steps(statistics, monkeypatch):
    when, solve = collections.defaultdict(list), sketchy.solve

    def solving(sides, *args):
        tensors = [state["vectors_0_0"] for _, state, _ in sides]
        when[step] += [t.data_ptr() for t in tensors if not t.is_meta]  # rehearsals solve, too
        return solve(sides, *args)

    monkeypatch.setattr(sketchy, "solve", solving)
    params = parameters([(12, 8)] * 10)
    optimizer = Sketchy(params, rank=3, update_freq=4, statistics=statistics, stagger_solves=True)
    for step in range(1, 21):
        give_gradients(params, step)
        optimizer.step()
    number = {step: len(set(states)) for step, states in when.items()}
    # All at 1 and 2; from 4 on two or three of ten in each step, each tensor once in four steps.
    assert number[1] == number[2] == 10 and 3 not in number
    assert all(number[step] == math.ceil(10 / 4) - (step % 4 > 1) for step in range(4, 21))
    for first in range(4, 17):
        assert sum(number[step] for step in range(first, first + 4)) == 10
        assert len(set().union(*(when[step] for step in range(first, first + 4)))) == 10


def test_a_staggered_run_resumes_bit_for_bit():
    params, optimizer = trained(torch.float32, steps=6, stagger_solves=True, update_freq=4)
    saved, copies = optimizer.state_dict(), [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Sketchy(copies, 0.02, rank=5, update_freq=4, min_compress_size=100, stagger_solves=True)
    other.load_state_dict(saved)
    for step in range(6, 15):
        for ps, one in ((params, optimizer), (copies, other)):
            give_gradients(ps, step)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))

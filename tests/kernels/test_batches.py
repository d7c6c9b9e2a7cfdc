"""Kernels on a batch of matrices (experts): each matrix has its own buckets, as in the eager step."""

import warnings

import pytest
import torch

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSMomentum, CSRMSprop, Sketchy
from sketch_plugins.kernels.interpretation import interpreted

SHAPE = (3, 18, 20)
MEASURED = {"update_clip": 0.3, "scale_parameter": True, "reference_rms": 1.0}
CASES = [
    (CSAdam, {}),
    (CSAdam, {"preset": "lean", "compression": 0.3}),
    (CSAdam, {"depth": 2, "hash": "affine", "first_moment": "none"}),
    (CSAdam, {"hash": "affine", "width": 4, "first_moment": "fp32", "bucket": "sum"}),
    (CSAdam, {"second_moment": "row_count_min", "depth": 2}),
    (CSAdam, {"preset": "paper_cs_mv", "allow_dense_count_sketch": True}),
    # Momentum after the denominator.
    (Sketchy, {"precondition": "none", "momentum_of": "all", "update_clip": 0.0, "scale_parameter": False, "lr": 1e-3}),
    (CSRMSprop, {"preset": "lean", "lagged_rms": True, "table_dtype": "bf16"}),
    # Each matrix is measured by itself, whatever its moments are kept in.
    (CSAdam, {"preset": "lean", "compression": 0.3, "hash": "affine", "depth": 2, "lagged_rms": True}),
    (CSAdam, {"update_clip": 0.3, "block_size": 8, "lagged_rms": True}),
    (CSAdam, {"second_moment": "dense", "first_moment": "fp32", **MEASURED}),
    (CSAdam, {"second_moment": "dense", "block_size": 16, **MEASURED}),
    (CSAdam, {"second_moment": "dense", "block_size": 7, **MEASURED, "lagged_rms": True}),
    (CSMomentum, {"update_clip": 0.3, "nesterov": True, "first_moment": "fp32", "lagged_rms": True}),
    (SM3, {"reference_rms": 1.0}),
    (SM3, {"preset": "ema", "reference_rms": 1.0, "lagged_rms": True}),
    (SM3, {"preset": "ema", "update_clip": 0.0, "scale_parameter": False, "lr": 1e-3}),
    (CSAdagrad, {"second_moment": "cover"}),
    (SM3, {"variant": "I", "reference_rms": 1.0}),
    (SM3, {"preset": "exact", "reference_rms": 1.0, "lagged_rms": True}),
    (Sketchy, {"precondition": "none", "momentum_of": "all", "reference_rms": 1.0}),
    (Sketchy, {"start_preconditioning_step": 1000, "reference_rms": 1.0}),
    (Sketchy, {"start_preconditioning_step": 1000, "graft": "rmsprop", "momentum_placement": "after", **MEASURED}),
]
IDS = {"ids": lambda v: v.__name__ if isinstance(v, type) else str(v)}


def train(cls, device, fused, tensors, gradients, **options):
    """Two steps."""
    params = [torch.nn.Parameter(t.clone().to(device)) for t in tensors]
    optimizer = cls(params, fused=fused, **{"min_compress_size": 0, **options})
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone().to(device)
        with warnings.catch_warnings():
            # Triton's kernels support all of these; Numba's leave some to the eager path.
            triton = device.type == "cuda" or interpreted()
            warnings.filterwarnings("error" if triton else "ignore", message="fused=True: a parameter of shape")
            warnings.filterwarnings("ignore", message="parameter group 0: lr=0.001 is 59 times smaller")
            optimizer.step()
    return params, [dict(moments(optimizer, p)) for p in params]


def moments(optimizer, p):
    for name, tensor in optimizer.state[p].items():
        # No kernel writes covariances, and the sign of an eigenvector is anyone's choice.
        if name != "step" and not name.startswith("preconditioner"):
            yield name, tensor


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(ours, eager):
    for p, one, q, other in zip(*ours, *eager, strict=True):
        # Kernels and eager torch round products and sums in another order; a step is 1e-3 of numbers around 1.
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        for name, a in one.items():
            b = other[name]
            if name.endswith("codes"):
                # If the number lies half-way between two codes, either is right.
                assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.02, name
            elif a.dtype == torch.bfloat16:
                # The noise is equal; a cell is rounded differently only if the unrounded numbers differ.
                assert (a != b).float().mean() < 0.02, name
            else:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def unlike(step):
    """Gradients of the matrices that differ in size; the third matrix is first used in the second step."""
    return random(*SHAPE, seed=step) * torch.tensor([3.0, 0.02, float(step > 1)]).view(3, 1, 1)


@pytest.mark.parametrize(("cls", "options"), CASES, **IDS)
def test_is_the_eager_definition(kernels, cls, options):
    steps = 3 if "lagged_rms" in options else 2
    given = [random(*SHAPE) * torch.tensor([1.0, 0.1, 2.0]).view(3, 1, 1)], [[unlike(s)] for s in range(1, steps + 1)]
    compare(*(train(cls, kernels, fused, *given, **options) for fused in (True, False)))


# Not: bfloat16 tables, whose noise is numbered through all matrices; products
# of stacks; int8 blocks of a store without buckets, which run through a matrix.
ALONE = [
    (cls, options)
    for cls, options in CASES
    if "table_dtype" not in options
    and "start_preconditioning_step" not in options
    and (options.get("second_moment") != "dense" or options.get("first_moment") == "fp32")
]


@pytest.mark.parametrize(("cls", "options"), ALONE, **IDS)
def test_trains_as_its_matrices_do_bit_for_bit(kernels, cls, options):
    """Each matrix has its own buckets and its own RMS, so its step does not depend on the others."""
    whole, steps = random(*SHAPE), [unlike(s) for s in (1, 2, 3)]
    (p,), (state,) = train(cls, kernels, True, [whole], [[g] for g in steps], **options)
    matrices, states = train(cls, kernels, True, list(whole), [list(g) for g in steps], **options)
    assert torch.equal(p, torch.stack(list(matrices)))
    for name, tensor in state.items():
        apart = [one[name] for one in states]
        # A number, or a cover of each column, for each matrix; rows of a store without buckets.
        if name in ("rms.last", "second_moment.axis_1") or tensor.shape == (3, 360):
            apart = [one.reshape(1, -1) for one in apart]
        assert torch.equal(tensor, torch.cat(apart, 1 if name.endswith("table") else 0)), name


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CSAdam, {}),
        (CSAdam, {"depth": 2, "hash": "affine"}),
        (CSMomentum, {"first_moment": "count_sketch", "depth": 2}),
    ],
    **IDS,
)
def test_row_sparse_gradients(kernels, cls, options):
    whole, steps = random(*SHAPE), [random(*SHAPE, seed=s) for s in (1, 2)]
    for step, g in enumerate(steps):
        g[0] = 0
        g[2, step::2] = 0
    options = {"row_sparse": True, "weight_decay": 0.0, **options}
    ours, eager = (train(cls, kernels, f, [whole], [[g] for g in steps], **options) for f in (True, False))
    compare(ours, eager)
    assert torch.equal(ours[0][0][0].cpu(), whole[0]) and (ours[0][0][1].cpu() != whole[1]).all()


def test_the_touched_rows_of_each_matrix_are_measured_by_themselves(kernels):
    """On a GPU this is left to the eager path. Numba takes no row-sparse step at all."""
    options = {"row_sparse": True, "weight_decay": 0.0, "preset": "lean"}
    p = torch.nn.Parameter(random(*SHAPE).to(kernels))
    optimizer = CSAdam([p], fused=True, min_compress_size=0, **options)
    g = unlike(1)
    g[0, ::3] = 0
    p.grad = g.to(kernels)
    with pytest.warns(UserWarning, match="row-sparse gradients|touched rows of matrices .experts. that are measured"):
        optimizer.step()
    (q,), _ = train(CSAdam, kernels, False, [random(*SHAPE)], [[g]], **options)
    assert torch.equal(p, q)


def test_many_bands_of_many_matrices():
    """Numba cuts matrices into bands and distributes them over threads: no band may reach into the next matrix."""
    pytest.importorskip("numba")
    shapes = [(5, 130, 300), (40, 70)]
    given = [random(*s) for s in shapes], [[random(*s, seed=n) for s in shapes] for n in (1, 2, 3)]
    threads = torch.get_num_threads()
    try:
        for cls, options in (
            (CSAdam, {"compression": 0.3}),
            (CSAdam, {"compression": 0.3, "preset": "lean"}),
            (CSAdam, {"compression": 0.3, "preset": "lean", "lagged_rms": True}),
            (CSAdam, {"second_moment": "dense", "first_moment": "fp32", **MEASURED}),
            (SM3, {"reference_rms": 1.0}),
        ):
            runs = []
            for n in (1, 3):
                torch.set_num_threads(n)
                runs.append(train(cls, torch.device("cpu"), True, *given, **options))
            assert all(map(torch.equal, runs[0][0], runs[1][0]))
            compare(runs[0], train(cls, torch.device("cpu"), False, *given, **options))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("preset", ["default", "ema"])
def test_covers_of_matrices_that_several_threads_share(preset):
    """Each matrix is cut into pieces, whose maxima are collected for this matrix alone."""
    pytest.importorskip("numba")
    shape = (3, 300, 331)
    whole = random(*shape)
    steps = [random(*shape, seed=s) * torch.tensor([3.0, 0.02, 1.0]).view(3, 1, 1) for s in (1, 2, 3)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        options = {"preset": preset, "reference_rms": 1.0}
        (p,), (state,) = train(SM3, torch.device("cpu"), True, [whole], [[g] for g in steps], **options)
        torch.set_num_threads(1)
        matrices, states = train(SM3, torch.device("cpu"), True, list(whole), [list(g) for g in steps], **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(p, torch.stack(list(matrices)))
    assert torch.equal(state["second_moment.axis_0"], torch.cat([one["second_moment.axis_0"] for one in states]))
    assert torch.equal(state["second_moment.axis_1"], torch.stack([one["second_moment.axis_1"] for one in states]))

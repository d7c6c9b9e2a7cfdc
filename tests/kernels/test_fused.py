"""Every fused kernel against the eager definition: stores x rules x dtypes on odd shapes."""

import math
import warnings

import pytest
import torch

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSMomentum
from sketch_plugins.check.cases import DENSE, HALF, SPARSE
from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.agreement import is_rounded, moments, parameter_difference, state_difference
from sketch_plugins.kernels.interpretation import interpreted
from sketch_plugins.kernels.work import Work

SHAPES = [(24, 48), (37, 33), (70, 7), (1, 40), (40, 1), (3, 1025), (5,), (), (4, 3, 2, 2), (6, 5, 7), (0, 3)]
# Sign hashes in several rows are slow to interpret: only a matrix, a ragged batch, vectors and empty tensors.
FEW = [(37, 33), (1, 40), (40, 1), (5,), (), (6, 5, 7), (0, 3)]
LAGGED = [
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"update_clip": 0.3}),
    (CSMomentum, {"update_clip": 0.3}),
    (SM3, {"preset": "ema"}),
    (SM3, {"update_clip": 0.3}),
]


def train(cls, device, fused, shapes=SHAPES, dtype=torch.float32, steps=2, gradients=None, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]
    optimizer = cls(params, fused=fused, **{"min_compress_size": 0, **options})
    for step in range(steps):
        generator.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
            if gradients is not None:
                p.grad = gradients(p.grad, step)
        with warnings.catch_warnings():
            # Triton's kernels support all of these; Numba's leave some to the eager path.
            triton = device.type == "cuda" or interpreted()
            warnings.filterwarnings("error" if triton else "ignore", message="fused=True: a parameter of shape")
            optimizer.step()
    return params, optimizer


def compare(ours, eager):
    for p, q in zip(ours[0], eager[0], strict=True):
        state, definition = ours[1].state[p], eager[1].state[q]
        rounded = any(is_rounded(ours[1].state[other]) for other in ours[0])
        assert not parameter_difference(p.detach(), q.detach(), rounded)
        assert not state_difference(state, definition, q.dtype)


@pytest.mark.parametrize(("cls", "options"), DENSE, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_is_the_eager_definition(kernels, cls, options):
    shapes = FEW if options.get("first_moment") == "count_sketch" and options.get("depth") == 3 else SHAPES
    compare(*(train(cls, kernels, fused, shapes, **options) for fused in (True, False)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("cls", "options"), HALF)
def test_half_precision(kernels, cls, options, dtype):
    shapes = [(24, 48), (37, 33), (5,)]
    ours, eager = (train(cls, kernels, f, shapes, dtype, steps=2, **options) for f in (True, False))
    for p, q in zip(ours[0], eager[0], strict=True):
        # A step or two of rounding apart; the step itself is 1e-3 of numbers around 1.
        torch.testing.assert_close(p, q, rtol=2**-6 if dtype == torch.bfloat16 else 2**-9, atol=2e-3)


@pytest.mark.parametrize(("cls", "options"), LAGGED, ids=str)
def test_lagged_rms_lags_from_the_second_step_on(kernels, cls, options):
    """The first step is the one without the option; three more equal the eager ones, with and without gradients."""
    options = {"shapes": [(24, 48), (37, 33), (5,), ()], **options}
    once = [train(cls, kernels, True, steps=1, **options, lagged_rms=lagged)[0] for lagged in (False, True)]
    assert all(map(torch.equal, *once))

    def uneven(grad, step):
        return grad * (1.0, 20.0, 0.0, 0.1)[step]

    options = {"steps": 4, "gradients": uneven, **options}
    ours, eager = (train(cls, kernels, f, **options, lagged_rms=True) for f in (True, False))
    compare(ours, eager)
    for p in ours[0]:
        # The value of the last step, before it.
        assert ours[1].state[p]["rms.last"].isfinite().all() and (ours[1].state[p]["rms.last"] > 0).all()
    other, _ = train(cls, kernels, True, **options)
    assert not torch.allclose(ours[0][0], other[0], rtol=1e-5, atol=1e-6)


def test_lagged_rms_takes_one_sweep(kernels, request, monkeypatch):
    """One launch for each step except the first, which measures before it steps."""
    if "numba" in request.node.name:
        pytest.skip("launches are Triton's")
    from sketch_plugins.kernels.gpu import launch

    phases = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            # A launch without programs only compiles the kernel, and is not counted.
            return lambda *args, **kwargs: (
                (phases.append(kwargs["PHASE"]) if all(grid) else None) or self.kernel[grid](*args, **kwargs)
            )

    monkeypatch.setattr(launch.step, "buckets", Counted(launch.step.buckets))
    train(CSAdam, kernels, True, [(64, 32)], steps=3, preset="lean", lagged_rms=True)
    fold, measure, apply = places.FOLD, places.MEASURE, places.APPLY
    assert phases == [fold | measure, apply, *[fold | measure | apply] * 2]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(CSAdam, {}), (CSAdam, {"preset": "lean"}), (CSAdam, {"preset": "lean", "lagged_rms": True}), (SM3, {})],
)
def test_bits_repeat_and_resume(kernels, cls, options):
    options = {"shapes": [(24, 48), (37, 33), (5,)], **options}
    whole, _ = train(cls, kernels, True, steps=4, **options)
    again, optimizer = train(cls, kernels, True, steps=2, **options)
    del options["shapes"]
    fresh = cls(again, fused=True, **{"min_compress_size": 0, **options})
    fresh.load_state_dict(optimizer.state_dict())
    generator = torch.Generator()
    for step in (2, 3):
        generator.manual_seed(100 + step)
        for p in again:
            p.grad = torch.randn(p.shape, generator=generator).to(kernels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fresh.step()
    for p, q in zip(whole, again, strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("cls", "options"), [(CSAdam, {}), (CSAdam, {"preset": "lean"}), (SM3, {}), (CSMomentum, {})])
def test_nan_and_infinity_come_out_as_they_do_eagerly(kernels, cls, options, bad):
    def spoil(grad, step):
        if step == 0 and grad.numel():
            grad.view(-1)[grad.numel() // 2] = bad
        return grad

    options = {**options, "shapes": [(24, 48), (37, 33), (5,)], "gradients": spoil}
    ours, eager = (train(cls, kernels, f, **options)[0] for f in (True, False))
    for p, q in zip(ours, eager, strict=True):
        assert torch.equal(p.isfinite(), q.isfinite()) and not p.isfinite().all()


def touch(packed):
    """Gradients of 12 rows, then of 3; packed: sparse tensors."""

    def touched(grad, step):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randperm(grad.shape[0], generator=generator)[: (12, 3)[step]].to(grad.device)
        if packed:
            index = torch.cat([rows, rows[:2]])  # repeated: coalescing is part of the step
            return torch.sparse_coo_tensor(index.unsqueeze(0), grad[index], grad.shape, check_invariants=True)
        mask = torch.zeros(grad.shape[0], *[1] * (grad.ndim - 1), device=grad.device)
        mask[rows] = 1
        return grad * mask

    return touched


# (whether tensors are sparse, columns). Tiles of every width for one optimizer with each kind of state; the generated
# cases of tests/compare draw widths, options and packing together.
EVERYWHERE = [(True, 33), (False, 33)]
WIDTHS = [*((True, n) for n in (1, 31, 768, 1025)), (False, 1)]
WIDE = [SPARSE[0], SPARSE[2], SPARSE[7], SPARSE[11]]


@pytest.mark.parametrize(
    ("cls", "options", "packed", "columns"),
    [
        *((*case, *width) for case in SPARSE for width in EVERYWHERE),
        *((*case, *width) for case in WIDE for width in WIDTHS),
        (*SPARSE[0], True, 4096),
        (*SPARSE[7], True, 4096),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_row_sparse(kernels, cls, columns, options, packed, request):
    """Only touched rows change, and in the same way as on the eager path; buckets have one or many touched rows."""
    if "numba" in request.node.name and (columns > 33 or len(options) > 1):
        pytest.skip("the eager path takes these steps; two widths show that")
    options = {
        "shapes": [(50, columns)],
        "gradients": touch(packed),
        "row_sparse": "auto" if packed else True,
        **options,
    }
    ours, eager = (train(cls, kernels, f, **options) for f in (True, False))
    compare(ours, eager)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))[12:]
    rows = rows[~torch.isin(rows, torch.randperm(50, generator=torch.Generator().manual_seed(1))[:3])]
    start = torch.randn(50, columns, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours[0][0].cpu()[rows], start[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"second_moment": "row_count_min"}, {"second_moment": "cover", "update_clip": 0.3}], ids=str
)
def test_row_sparse_half_precision(kernels, options, dtype):
    options = {"shapes": [(50, 40)], "gradients": touch(True), "dtype": dtype, **options}
    ours, eager = (train(CSAdam, kernels, f, **options)[0][0] for f in (True, False))
    torch.testing.assert_close(ours, eager, rtol=2**-6 if dtype == torch.bfloat16 else 2**-9, atol=2e-3)


@pytest.mark.parametrize("variant", ["II", "I"])
def test_covers_of_any_number_of_axes_in_dense_and_sparse_steps(kernels, variant):
    """Two to six axes; a sparse step between two dense ones, which read the covers that it leaves."""

    def mixed(grad, step):
        return touch(True)(grad, 0) if step == 1 else grad

    shapes = [(20, 7), (20, 5, 3), (20, 2, 3, 2), (20, 1, 3, 2, 2), (20, 2, 1, 3, 2, 2)]
    for options in ({"betas": (0.9, 0.95)}, {"preset": "lean", "update_clip": 0.3}):
        options = {"variant": variant, "shapes": shapes, "gradients": mixed, "steps": 3, **options}
        compare(*(train(SM3, kernels, f, **options) for f in (True, False)))


def test_views_that_are_misaligned_or_have_gaps_between_rows(kernels):
    results = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        buffer = torch.randn(4000, generator=generator).to(kernels)
        params = [
            torch.nn.Parameter(buffer[1:1025].view(32, 32)),
            torch.nn.Parameter(buffer[1100:2900].view(30, 60)[:, 3:50]),
            torch.nn.Parameter(buffer[3000:3512].view(16, 32).t()),
        ]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(kernels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CSAdam(params, fused=fused, min_compress_size=0, lr=0.1).step()
        results.append(buffer)
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)
    untouched = torch.randn(4000, generator=torch.Generator().manual_seed(0))[2900:3000]
    assert torch.equal(results[0].cpu()[2900:3000], untouched)


@pytest.mark.parametrize("options", [{}, {"preset": "exact"}, {"second_moment": "cover"}], ids=str)
def test_offsets_beyond_2_to_the_31(kernels, monkeypatch, options):
    """Two rows that are 2**31 numbers apart; the memory between them is never touched, and so never allocated."""
    if kernels.type == "cuda" and torch.cuda.mem_get_info()[0] < 6e9:
        pytest.skip("needs 6 GB of GPU memory")
    big = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=kernels)
    far = big.as_strided((2, 64), (2**31, 1))
    near = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(kernels, torch.bfloat16)
    grad = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(kernels, torch.bfloat16)
    far.copy_(near)
    out = []
    for tensor in (far, near):
        p = torch.nn.Parameter(tensor)
        p.grad = grad.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Numba supports contiguous parameters only
            CSAdam([p], fused=True, min_compress_size=0, lr=0.5, **options).step()
        out.append(p.detach().clone())
    torch.testing.assert_close(*out, rtol=2**-7, atol=0)
    assert not torch.equal(out[0], torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(out[0]))


def test_threads_do_not_change_bits():
    pytest.importorskip("numba", reason="Numba is not installed")
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            shapes = [(300, 128), (700, 33), (5,), (1, 5000)]
            results.append([
                p.detach().clone()
                for cls, options in [
                    (CSAdam, {}), (CSAdam, {"preset": "lean"}), (SM3, {"update_clip": 0.3}),
                    (CSAdam, {"preset": "lean", "lagged_rms": True}), (SM3, {"preset": "ema", "lagged_rms": True}),
                ]
                for p in train(cls, torch.device("cpu"), True, shapes, steps=3, **options)[0]
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_stochastic_rounding_is_unbiased_and_repeats(kernels):
    """Steps of a sixteenth of a unit in the last place: lost when rounded to nearest, kept on average otherwise."""
    size, lr, steps = (64, 256), 2**-12, 16
    moved = {}
    for stochastic in (False, True):
        for attempt in range(1 + stochastic):
            p = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=kernels))
            options = {"stochastic_rounding": stochastic, "first_moment": "none", "weight_decay": 0.0, "eps": 0.0}
            optimizer = CSAdam([p], lr, fused=None if kernels.type == "cpu" else True, min_compress_size=0, **options)
            for _ in range(steps):
                p.grad = torch.full_like(p, -1.0)
                optimizer.step()
            if attempt:
                assert torch.equal(p, moved[stochastic])
            moved[stochastic] = p.detach().clone()
    assert (moved[False] == 1).all()
    # 16384 independent walks of 16 steps, each a unit (2**-7 above 1) with a chance of 2**-5: the mean lies within 4
    # standard errors of its expectation.
    mean = (moved[True].float() - 1).mean().item()
    expected = steps * lr
    error = 2**-7 * math.sqrt(steps / 32 / p.numel())
    assert abs(mean - expected) < 4 * error
    assert set(((moved[True].float() - 1) * 2**7).unique().tolist()) <= set(map(float, range(steps + 1)))


def test_stochastic_rounding_is_the_same_in_kernel_and_eagerly(kernels):
    """The noise is one function of (seed, step, element); rounding differs where the unrounded numbers do."""
    options = {
        "stochastic_rounding": True,
        "seed": -5,
        "shapes": [(64, 128), (33, 31)],
        "dtype": torch.bfloat16,
        "steps": 1,
    }
    if kernels.type == "cpu":
        options["first_moment_rounding"] = "stochastic"
    ours, eager = (train(CSAdam, kernels, f, **options)[0] for f in (True, False))
    other, _ = train(CSAdam, kernels, True, **{**options, "seed": 6})
    for p, q, r in zip(ours, eager, other, strict=True):
        assert (p != q).float().mean() < 0.001
        assert (p != r).float().mean() > 0.01


def test_stochastic_rounding_keeps_nan_and_infinity(kernels):
    p = torch.nn.Parameter(
        torch.tensor([[1.0, math.nan, math.inf, -math.inf, 3.3e38]] * 2, dtype=torch.bfloat16).to(kernels)
    )
    p.grad = torch.zeros_like(p)
    CSMomentum([p], 0.1, fused=True if kernels.type == "cuda" else None, stochastic_rounding=True).step()
    assert p[0, 1].isnan() and p[0, 2] == math.inf and p[0, 3] == -math.inf and p[0, 4].isfinite()


def test_capturable_keeps_the_step_on_the_device(kernels, request):
    if "numba" in request.node.name:
        with pytest.raises(ValueError, match="capturable=True needs the Triton kernels"):
            CSAdam([torch.nn.Parameter(torch.zeros(3, 3))], capturable=True)
        return
    for cls, options in [
        (CSAdam, {}), (CSAdam, {"table_dtype": "bf16"}), (CSAdam, {"second_moment": "row_count_min"}),
        (CSAdam, {"preset": "lean", "lagged_rms": True}), (SM3, {"preset": "ema", "lagged_rms": True}),
        (CSAdagrad, {"lr_decay": 0.1, "update_clip": 0.1}), (SM3, {"preset": "paper", "variant": "I"}),
        (SM3, {"preset": "paper"}), (SM3, {}),
    ]:  # fmt: skip
        options["shapes"] = [(24, 48), (37, 33), (5,), ()]
        ours = train(cls, kernels, True, capturable=True, **options)
        compare(ours, train(cls, kernels, True, **options))
        assert all(ours[1].state[p]["step"].device.type == kernels.type for p in ours[0] if p.numel())
    fresh = SM3(ours[0], fused=True, capturable=True, min_compress_size=0)
    fresh.load_state_dict(ours[1].state_dict())
    assert fresh.state[ours[0][0]]["step"] == 2
    p = torch.nn.Parameter(torch.zeros(8, 4, device=kernels))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), (8, 4), check_invariants=True).to(kernels)
    before = p.detach().clone()
    with pytest.raises(ValueError, match="row-sparse"):
        CSAdam([p], fused=True, capturable=True).step()
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="clean_every=3"):
        CSAdam([p], fused=True, capturable=True, clean_every=3)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_training():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    grads = [torch.randn(5, 64, 128, device=device) for _ in range(16)]
    results = []
    # Cached steps come before the capture, or only between the replays.
    for warm in (3, 1):
        for graphed in (True, False):
            params = [torch.nn.Parameter(torch.ones(64, 128, device=device)) for _ in range(5)]
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer = CSAdam(params, fused=True, capturable=True, min_compress_size=0)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for given in grads[:warm]:
                    torch._foreach_copy_([p.grad for p in params], list(given))
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if graphed:
                with torch.cuda.graph(graph):
                    optimizer.step()
            for number, given in enumerate(grads[3:]):
                torch._foreach_copy_([p.grad for p in params], list(given))
                graph.replay() if graphed and number % 4 == 0 else optimizer.step()
            assert {float(optimizer.state[p]["step"]) for p in params} == {warm + 13.0}
            results.append(torch.stack([p.detach() for p in params]))
    for ours, right in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(ours, right)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["switched on", "beside others"])
def test_counters_of_capturable_groups_may_be_on_another_device_than_others(how):
    """Those that were made before the option was set stay on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    results = []
    for capturable in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(64, 128, device="cuda")) for _ in range(10)]
        groups = [{"params": params[:5]}, {"params": params[5:]}]
        if how == "beside others":
            groups[0]["capturable"] = capturable
        optimizer = CSAdam(groups, fused=True, min_compress_size=0)
        for step in range(8):
            if step == 3 and how == "switched on":
                optimizer.param_groups[0]["capturable"] = capturable
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_capture_needs_capturable():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    p = torch.nn.Parameter(torch.ones(64, 128, device="cuda"))
    p.grad = torch.zeros_like(p)
    optimizer = CSAdam([p], fused=True, min_compress_size=0)
    optimizer.step()
    with pytest.raises(ValueError, match="group 0 has capturable=False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


def test_many_small_tensors_are_one_launch(kernels, request, monkeypatch):
    if "numba" in request.node.name:
        pytest.skip("launches are Triton's")
    from sketch_plugins.kernels.gpu import launch

    grids = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            if all(grid):  # a launch without programs only compiles the kernel
                grids.append(grid)
            return self.kernel[grid]

    monkeypatch.setattr(launch.step, "tiles", Counted(launch.step.tiles))
    monkeypatch.setattr(launch.step, "buckets", Counted(launch.step.buckets))
    shapes = [(n,) for n in range(16, 16 * 51, 16)] + [(64, 32)] * 6
    train(CSAdam, kernels, True, shapes, steps=1)
    # The vectors, whose lengths are multiples of 16, and the matrices.
    assert len(grids) == 2


def test_gradients_of_another_layout_than_the_parameter(kernels):
    results = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(kernels))
        grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(kernels)
        p.grad = grad.to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CSAdam([p], 0.1, fused=fused, min_compress_size=0).step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


def test_fused_on_a_device_without_kernels_is_an_error(monkeypatch):
    from sketch_plugins.optim import fused

    with pytest.raises(ValueError, match="fused=True is not possible on meta"):
        CSAdam([torch.nn.Parameter(torch.zeros(3, 3, device="meta"))], fused=True)
    with pytest.raises(ValueError, match="fused=True and compile=True"):
        CSAdam([torch.nn.Parameter(torch.zeros(3, 3))], fused=True, compile=True)
    with pytest.raises(ValueError, match=r"fused='yes' is not one of None, True, False"):
        CSAdam([torch.nn.Parameter(torch.zeros(3, 3))], fused="yes")
    fused._numba.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "numba", None)  # as if it were not installed
    p = torch.nn.Parameter(torch.zeros(300, 300))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"Numba cannot be imported.*sketch-plugins\[cpu\]"):
        CSAdam([p], fused=True)
    CSAdam([p]).step()
    assert (p < 0).all()
    fused._numba.cache_clear()


def test_what_kernels_cannot_take_goes_the_eager_way_with_a_warning():
    pytest.importorskip("numba", reason="Numba is not installed")
    p = torch.nn.Parameter(torch.zeros(300, 300, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"shape \(300, 300\) takes eager steps"):
        CSAdam([p], fused=True).step()
    assert (p < 0).all()


class Unread(torch.Tensor):
    """Numbers on a device; reading one would wait for it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "cpu", "numpy", "__array__", "__float__", "__int__", "__bool__", "__index__"):
            raise AssertionError(f"{name} of a number that is on the device")
        return super().__torch_function__(func, types, args, kwargs or {})


ON_DEVICE = [
    (CSAdam, {"update_clip": 0.3, "scale_parameter": True}),
    (CSAdam, {"update_clip": 0.3, "scale_parameter": True, "lagged_rms": True}),
    (CSAdam, {"preset": "paper_cs_mv", "clean_every": 0, "allow_dense_count_sketch": True}),
    (CSAdam, {"second_moment": "row_count_min", "table_dtype": "bf16"}),
    (CSAdam, {"second_moment": "cover", "maximize": True}),
    (CSAdagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    (SM3, {"preset": "paper", "variant": "I"}),
]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("cls", "options"), ON_DEVICE, ids=str)
def test_numbers_that_live_on_a_device_are_not_looked_at(kernels, cls, options, sparse, monkeypatch, request):
    """Such as a learning rate on a GPU: the launcher must not read it, and the bits are the same."""
    if "numba" in request.node.name:
        pytest.skip("on a CPU there is nothing to wait for")
    from sketch_plugins.kernels.gpu import launch
    from sketch_plugins.optim import taking

    plain = taking.vector
    options = {"shapes": [(24, 33), (50, 4, 3)], "gradients": touch(True) if sparse else None, **options}
    expected, _ = train(cls, kernels, True, **options)

    def placed(kind):
        def vector(values, device, rows=0):
            numbers, flags = plain(values, device, rows)
            return torch.as_tensor(numbers, device=device).as_subclass(kind), flags

        return vector

    monkeypatch.setattr(taking, "vector", placed(torch.Tensor))
    ours, _ = train(cls, kernels, True, **options)
    assert all(map(torch.equal, ours, expected))

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(kwargs)

    # Interpreted kernels read their arguments on the host, so only the launcher is watched.
    launched = []
    for module, name in [
        (launch.step, "tiles"), (launch.step, "buckets"), (launch.fold, "dense"), (launch.fold, "touched"),
        (launch.fold, "row_means"), (launch.fold, "row_means_of"), (launch.norms, "step_sizes"),
        (launch.norms, "recall"), (launch.norms, "record"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, Nothing())
    monkeypatch.setattr(taking, "vector", placed(Unread))
    with pytest.raises(AssertionError, match="tolist of a number"):
        placed(Unread)({}, kernels)[0].tolist()
    train(cls, kernels, True, **options)
    assert launched


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rate", ["number", "tensor"])
@pytest.mark.parametrize(("cls", "options"), ON_DEVICE, ids=str)
def test_a_step_does_not_wait_for_the_gpu(cls, options, rate, sparse):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    params = [torch.nn.Parameter(torch.randn(s, device=device)) for s in [(256, 128), (64, 33), (9,)]]
    rate = torch.tensor(0.01, device=device) if rate == "tensor" else 0.01
    optimizer = cls(params, rate, fused=True, min_compress_size=0, **options)
    for p in params:
        p.grad = torch.randn_like(p)
        if sparse:
            index = torch.arange(0, len(p), 3, device=device)
            p.grad = torch.sparse_coo_tensor(index.unsqueeze(0), p.grad[index], p.shape, is_coalesced=True)
    for _ in range(3):
        optimizer.step()  # compiles, and caches the step
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in params)


def test_bf16_tables_hold_the_eager_bits(kernels, request):
    """If every sum is exact in any order, kernel and definition round the same numbers with the same noise."""
    if "numba" in request.node.name:
        pytest.skip("the eager path takes these steps")

    def integers(grad, step):
        return (grad * 3).round() if step != 1 else touch(True)((grad * 3).round(), step)

    for cls, options in [
        (CSAdam, {"betas": (0.5, 0.5), "bucket": "sum", "seed": -3}),
        (CSAdam, {"betas": (0.5, 0.5), "bucket": "sum", "depth": 2, "hash": "affine", "first_moment": "count_sketch",
                  "allow_dense_count_sketch": True}),
        (CSAdagrad, {"compression": 0.2, "initial_accumulator_value": 0.3}),
    ]:  # fmt: skip
        options = {"shapes": [(40, 33), (24, 200)], "gradients": integers, "table_dtype": "bf16", **options}
        ours, eager = (train(cls, kernels, f, steps=2, **options)[1] for f in (True, False))
        for p, q in zip(ours.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
            for (name, a), (_, b) in zip(moments(ours.state[p]), moments(eager.state[q]), strict=True):
                if name.endswith("table"):
                    assert a.dtype == torch.bfloat16 and torch.equal(a, b), (cls, name)


def test_work_knows_which_numbers_are_zero():
    numbers = [0.0] * places.NUMBERS
    numbers[places.L2] = 0.1
    p = torch.zeros(2, 2)
    assert Work(p, p, None, False, None, None, numbers).flags == 1 << places.L2

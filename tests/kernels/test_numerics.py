"""Limits of numbers: overflow, underflow, NaN, denominators of 0; and kernels use all of their arguments."""

import math
import warnings
from dataclasses import fields, replace

import pytest
import torch

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSMomentum, CSRMSprop, Sketchy, registry
from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.interpretation import interpreted
from sketch_plugins.kernels.work import Work
from sketch_plugins.optim import fused as fused_steps
from sketch_plugins.sharding.state_names import nested
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Int8, RowCountMin
from sketch_plugins.stores.sketch import Sketch

SHAPE = (24, 40)


def moved(cls, device, fused, gradients, shape=SHAPE, group=None, dtype=torch.float32, **options):
    """The change of a parameter of standard normal numbers, and the optimizer."""
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, dtype))
    before = p.detach().clone()
    options = {"min_compress_size": 0, **options} if "min_compress_size" in cls.OPTIONS else options
    optimizer = cls([{"params": [p], **(group or {})}], fused=fused, **options)
    for g in gradients:
        p.grad = g.to(device, dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
            # numpy's warnings, in Triton's interpreter: overflow is what these tests are about.
            warnings.filterwarnings("ignore", category=RuntimeWarning)
            optimizer.step()
    return p.detach() - before, optimizer


def normal(*seeds, shape=SHAPE):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


# -- momentum after the denominator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(37, 33), (1, 300)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_clip": 0.01},
        {"first_moment": "fp32", "nesterov": False, "maximize": True},
        {"block_size": 16, "compression": 0.01, "update_clip": 0.01},
        {"first_moment": "fp32", "graft": "sm3", "update_clip": 0.01},
        {"graft": "rmsprop", "update_clip": 0.01},
        {"depth": 2, "update_clip": 0.01},
    ],
    ids=str,
)
def test_sketchy_without_covariances_averages_what_is_preconditioned(kernels, options, shape):
    gradients = [g * 0.1 for g in normal(1, 2, 3, shape=shape)]
    options = {"momentum_of": "all", "group": {"precondition": "none"}, "shape": shape, "lr": 2e-3, **options}
    ours, right = (moved(Sketchy, kernels, fused, gradients, **options)[0] for fused in (True, False))
    # Only differences of rounding are allowed: a wrong order of momentum and denominator is at least 4 % of the step.
    assert (ours - right).norm() <= 1e-5 * right.norm()


# -- clipping ---------------------------------------------------------------------------------------------------------

RELATIVE = {"reference_rms": 1.0}
CLIPPED = [
    (CSAdam, {"preset": "lean", **RELATIVE}),
    (CSAdam, {"update_clip": 1.0}),
    (CSRMSprop, {"preset": "lean", **RELATIVE}),
    (CSAdam, {"update_clip": 1.0, "second_moment": "cover"}),
    (CSAdam, {"update_clip": 1.0, "preset": "exact"}),
    (SM3, {"update_clip": 1.0, "preset": "lean"}),
    (CSAdagrad, {"update_clip": 1.0}),
]


@pytest.mark.parametrize("eps", [1e-30, 0.0])
@pytest.mark.parametrize("size", [1e-25, 1e-21, 1e-15])
@pytest.mark.parametrize(("cls", "options"), CLIPPED, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_an_update_is_clipped_where_squares_of_gradients_underflow(kernels, cls, options, size, eps):
    """The second moment is 0 (below 1e-23), or has few bits left (1e-21): the update may be as large as 1 / eps."""
    options = {"lr": 1e-2, "eps": eps, "weight_decay": 0.0, **options}
    gradients = [g * size for g in normal(1, 2)]
    ours, right = (moved(cls, kernels, fused, gradients, **options)[0] for fused in (True, False))
    for change in (ours, right):
        # Two steps of at most lr * update_clip * RMS(p), which is 1 to a few percent.
        assert change.square().mean().sqrt() <= 2.1e-2
    # Squares that have few bits left are rounded in another order.
    torch.testing.assert_close(ours, right, rtol=1e-4 if size > 1e-20 else 2e-2, atol=1e-6)


@pytest.mark.parametrize("size", [1e18, 1e20, 5e37])
@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"first_moment": "none", "update_clip": 1.0}], ids=str)
def test_profiles_of_rows_hold_where_squares_overflow(kernels, size, options):
    gradients = normal(1, 2, 3)
    gradients[1][5] *= size
    gradients[1][9, 3] = size
    options = {"second_moment": "row_count_min", "compression": 0.25, **options}
    ours, right = (moved(CSAdam, kernels, fused, gradients, **options) for fused in (True, False))
    assert ours[0].isfinite().all() and right[0].isfinite().all()
    assert torch.allclose(ours[0], right[0], rtol=1e-4, atol=1e-7)
    for _, value in nested(right[1].state[right[1].param_groups[0]["params"][0]])["second_moment"].items():
        assert value.isfinite().all()


@pytest.mark.parametrize("size", [1e18, 1e25, 3e37])
@pytest.mark.parametrize(
    "options", [{}, {"first_moment": "none"}, {"first_moment": "fp32"}, {"first_moment": "none", "chunk_size": 100}]
)
def test_an_update_is_clipped_where_its_squares_overflow(kernels, size, options):
    gradients = [g.clamp(-3, 3) * size for g in normal(1, 2)]
    options = {"lr": 1e-2, "update_clip": 1.0, "weight_decay": 0.0, **options}
    ours, right = (moved(CSMomentum, kernels, fused, gradients[:1], **options)[0] for fused in (True, False))
    expected = -1e-2 * gradients[0] / gradients[0].double().square().mean().sqrt()
    for change in (ours, right):
        # Differences of numbers around 1: half a unit in the last place of a 4, 2**-22.
        torch.testing.assert_close(change.cpu(), expected.float(), rtol=1e-5, atol=2.5e-7)


@pytest.mark.parametrize("options", [{}, {"preset": "lean"}, {"preset": "lean", "lagged_rms": True}], ids=str)
def test_the_size_of_a_parameter_is_measured_where_its_squares_overflow(kernels, options):
    """``scale_parameter``: the step is lr * RMS(p) times an update of size 1, also from 1e20 on."""
    if kernels.type == "cuda" or interpreted() or not options:
        shape = SHAPE
    else:
        shape = (400, 100)
    for fused in (True, False):
        p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(kernels) * 1e25)
        before = p.detach().clone()
        options = {
            "scale_parameter": True,
            **RELATIVE,
            "weight_decay": 0.0,
            "width": shape[0],
            "min_compress_size": 0,
            **options,
        }
        optimizer = CSAdam([p], 0.1, fused=fused, **options)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=RuntimeWarning)
                optimizer.step()
        change = (before - p.detach()) / before.double().square().mean().sqrt()
        # Two steps of 0.1 RMS(p), the second of the already smaller parameter: the mean moves, and the spread hardly
        # does.
        assert change.min() > 0.19 and change.max() < 0.21


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_sketchy_measures_updates_whose_squares_overflow(preset):
    """Gradients below 1e-23 have a second moment of 0; without a clip their update is as large as 1 / eps allows."""
    gradients = [g * 1e-24 for g in normal(1, 2)]
    change, optimizer = moved(Sketchy, torch.device("cpu"), None, gradients, eps=0.0, preset=preset, update_clip=1.0)
    assert change.isfinite().all() and change.norm() > 0
    for name, tensor in nested(optimizer.state[optimizer.param_groups[0]["params"][0]])["preconditioner"].items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([3e38, 4e38 / 2, 0.0], math.sqrt((9e76 + 4e76) / 3)),
        ([1e-3, 2e-3, 2e-3], math.sqrt(3e-6)),
        ([1e-30, 2e-30, 2e-30], math.sqrt(3e-60)),
        ([0.0, 0.0, 0.0], 0.0),
        ([1e-30, 3e30, math.inf], math.inf),
        ([3e30, math.nan, math.inf], math.nan),
        ([1.0, 2.0, math.nan], math.nan),
    ],
    ids=str,
)
def test_root_mean_square_of_all_that_float32_holds(numbers, expected):
    from sketch_plugins.kernels.tile import joined, root_mean_square, scaled_squares

    x = torch.tensor(numbers)
    whole = root_mean_square(x, None, 3).item()
    parts = joined([root_mean_square(part, None, 3) for part in x.split(1)]).item()
    total, largest = scaled_squares(x, None)  # what an accelerator takes
    for found in (whole, parts, ((total / 3).sqrt() * largest).item()):
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


# -- denominators of 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-45, 1e-38, 1e-30])
@pytest.mark.parametrize("name", sorted(set(registry.names()) - {"cs_momentum"}))
def test_no_gradient_is_no_step_whatever_epsilon_is(kernels, name, eps):
    """Nor is it a step beside numbers that have a gradient, or after them."""
    cls = registry.get(name).cls
    zero, some = torch.zeros(SHAPE), normal(1)[0]
    some[:, ::2] = 0
    some[::2] = 0
    for preset in cls.PRESETS:
        if "cs_mv" in preset:
            continue  # its count-sketch is refused for dense gradients
        for fused in (True, False):
            options = {"eps": eps, "lr": 3.0, "weight_decay": 0.0, "preset": preset, "fused": fused}
            if cls is Sketchy:
                options["group"] = {"precondition": "none"}
            first, _ = moved(cls, kernels, gradients=[zero], **options)
            assert not first.any(), (preset, fused)
            later, _ = moved(cls, kernels, gradients=[zero, some, zero], **options)
            assert later.isfinite().all() and later.any(), (preset, fused)


def test_a_denominator_has_a_floor_in_its_own_precision():
    for dtype, least in ((torch.float32, 1e-30), (torch.float64, 1e-300)):
        p = torch.nn.Parameter(torch.ones(8, 4, dtype=dtype))
        optimizer = CSAdam([p], 1e-3, preset="exact", eps=0.0, weight_decay=0.0, fused=False)
        p.grad = torch.full_like(p, least)  # its square is 0
        optimizer.step()
        assert 0.99e-3 > (1 - p).max() > 1e-4


# -- NaN and infinity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SM3, {}),
        (SM3, {"preset": "lean"}),
        (SM3, {"preset": "ema", "first_moment": "fp32", "update_clip": 0.5}),
        (CSAdam, {"second_moment": "cover"}),
        (CSAdam, {"second_moment": "cover", "first_moment": "none", "update_clip": 0.5}),
        (CSAdam, {"preset": "lean"}),
        (CSAdam, {"block_size": 16}),
        (CSAdam, {"preset": "exact", "update_clip": 0.5}),
        (CSMomentum, {"nesterov": True, "update_clip": 0.5}),
        (Sketchy, {"group": {"precondition": "none"}, "momentum_of": "all", "nonfinite": "error"}),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v),
)
def test_nan_and_infinity_stay_where_the_definition_has_them(kernels, cls, options, bad):
    """In one step, and in two steps that find them in the state: parameters and all numbers of the state."""
    spoilt, *others = normal(1, 2, 3)
    spoilt[5, 7] = bad
    if cls is Sketchy:  # it refuses such gradients, so their squares are not finite instead
        spoilt[5, 7] = 9e17
        others = [g * 1e-20 for g in others]
    for n in (0, 2):
        found = []
        for fused in (True, False):
            change, optimizer = moved(cls, kernels, fused, [spoilt, *others[:n]], **options)
            state = next(iter(optimizer.state.values()))
            tensors = {
                name: tensor
                for name, tensor in state.items()
                # Codes whose scale is not finite have no meaning.
                if name != "step" and not name.endswith(".codes")
            }
            found.append({"p": change, **tensors})
        for name in found[0]:
            ours, right = (one[name].float() for one in found)
            assert torch.equal(ours.isfinite(), right.isfinite()), (name, n)
            # torch's lerp makes NaN of infinity, where decay * m + gain * g is still infinite; p is NaN by then.
            if name != "first_moment.dense":
                assert torch.equal(ours.isnan(), right.isnan()), (name, n)


# -- what a kernel does not see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["gradient", "parameter"])
def test_a_negative_bit_is_not_overlooked(kernels, whose):
    """The imaginary part of a conjugate: the numbers in memory have the opposite sign."""
    start, gradient = normal(1, 2, shape=(256, 160))

    def negative(x):
        out = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert out.is_neg() and torch.equal(out, x)
        return out

    found = []
    for tensors in (
        (start, gradient),
        (negative(start), gradient) if whose == "parameter" else (start, negative(gradient)),
    ):
        data, grad = (x.to(kernels) if kernels.type == "cuda" else x for x in tensors)
        p = torch.nn.Parameter(data.clone() if whose == "gradient" else data)
        p.grad = grad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
            CSMomentum([p], 0.1, fused=True).step()
        found.append(p.detach().resolve_neg())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


# All arguments of a kernel beside tensors: settings in which an argument has an effect, and two values of it. A kernel
# that takes both values must compute different results.
CLIPS = {places.CLIP: 0.01}
NOISY = {"dtype": torch.bfloat16, "stochastic": True}
TOLD = {
    "rows": ({}, None, torch.tensor([0, 3, 4])),
    "packed": ({"rows": torch.tensor([0, 3, 4])}, False, True),
    "after": ({"needs": "both"}, False, True),
    "measure": ({"numbers": CLIPS}, False, True),
    "stochastic": ({"dtype": torch.bfloat16}, False, True),
    "seed": (NOISY, 0, 1),
    "emas": (
        {"rows": torch.tensor([0, 3, 4]), "needs": "sketch"},
        (Ema(0.9, 0.1), Ema(0.9, 0.1)),
        (Ema(0.5, 0.5), Ema(0.5, 0.5)),
    ),
    "last": ({"numbers": CLIPS}, None, (3.0, 2.0)),
    "matrices": ({"numbers": CLIPS, "measure": True, "of": 5}, 1, 5),
    places.DECAY1: ({"needs": "first"}, 0.9, 0.5),
    places.GAIN1: ({"needs": "first"}, 0.1, 0.5),
    places.DECAY2: ({"needs": "second"}, 0.9, 0.5),
    places.GAIN2: ({"needs": "second"}, 0.1, 0.5),
    places.MEAN: ({"needs": "count_min"}, 1.0, 0.0),
    places.SCALE: ({"needs": "second"}, 1.0, 2.0),
    places.SHIFT: ({"needs": "second"}, 0.1, 0.2),
    places.INSIDE: ({"needs": "second"}, 0.0, 0.3),
    places.FLOOR: ({"needs": "second"}, 0.0, 100.0),
    places.STEP: ({}, 0.1, 0.2),
    places.SHRINK: ({}, 1.0, 0.9),
    places.LOOKAHEAD: ({"needs": "first"}, 0.0, 0.9),
    places.SIGN: ({}, 1.0, -1.0),
    places.L2: ({}, 0.0, 0.3),
    places.CORRECTION: ({"measure": True, "numbers": CLIPS}, 1.0, 3.0),
    places.INNER: ({"after": True, "needs": "both"}, 1.0, 0.5),
    places.CLIP: ({"measure": True}, 0.02, 0.01),
    places.RELATIVE: ({"measure": True}, 0.0, 100.0),
    places.NUMBER: (NOISY, 1.0, 2.0),
    places.UNIT: ({}, 0.0, 1.0),
}
STORES = [
    (None, None),
    (Dense(order=1), Dense(order=2)),
    (None, CountMin(width=3)),
    (Int8(block_size=4), CountMin(width=2)),
    (Dense(order=1, bf16=True), CountMin(width=1)),
    (Int8(block_size=4), Cover(dims=(5, 6), variant="II")),
    (None, Cover(dims=(5, 6), variant="II")),
    (Dense(order=1), Cover(dims=(5, 6), variant="I")),
    (Int8(block_size=4, stochastic=True), CountMin(width=2, depth=2, hash="affine")),
    (CountSketch(width=2, depth=2), RowCountMin(width=2, depth=2)),  # kernels read the hashes of one of the two
    (Int8(block_size=16), None),
]

INTERPRETED = [STORES[i] for i in (3, 5, 9)]


def described(first, second, device, name, value, setting):
    """A step of a 5 x 6 matrix with the argument ``value``."""
    setting = {**setting}
    numbers = dict.fromkeys(range(places.NUMBERS), 0.0) | {
        places.DECAY1: 0.9, places.GAIN1: 0.1, places.DECAY2: 0.9, places.GAIN2: 0.1, places.MEAN: 1.0,
        places.SCALE: 1.0, places.SHIFT: 0.1, places.STEP: 0.1, places.SHRINK: 1.0, places.SIGN: 1.0,
        places.CORRECTION: 1.0, places.INNER: 1.0, places.NUMBER: 1.0,
    }  # fmt: skip
    setting.pop("needs", None)
    if "of" in setting:  # stores of a batch of matrices
        of = setting.pop("of")
        first, second = (replace(s, matrices=of) if isinstance(s, Sketch | Cover) else s for s in (first, second))
    numbers |= setting.pop("numbers", {})
    dtype = setting.pop("dtype", torch.float32)
    if isinstance(name, int):
        numbers[name] = value
    else:
        setting[name] = torch.tensor(value, device=device) if name == "last" and value else value
    p, g, *old = (x.to(device) for x in normal(1, 2, 3, 4, shape=(5, 6)))
    pairs = []
    for store, values in zip((first, second), old, strict=True):
        state = store and store.allocate((5, 6), device, torch.float32)
        if store:
            store.assign(state, values if store is first else values.square())
        pairs.append(store and (store, state))
    emas = (
        Ema(numbers[places.DECAY1], numbers[places.GAIN1], 1),
        Ema(numbers[places.DECAY2], numbers[places.GAIN2], 1),
    )
    return replace(
        Work(p.to(dtype), g.to(dtype), None, False, *pairs, list(numbers.values()), emas=emas),
        **{key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in setting.items()},
    )


def taken(backend, w):
    """All results of the step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        if backend.prepare is not None:
            for _, run in backend.prepare([w]):
                run()
        else:
            _, takes = backend.prepare_tasks([backend.task(w)], [w.numbers], [0], [w.g.data_ptr()], None)
            for _, run in takes:
                run()
    return [w.p, *(t for pair in (w.first, w.second) if pair for t in pair[1].values())]


def test_the_table_names_all_that_a_kernel_may_be_told():
    tensors = {"p", "g", "first", "second"}  # all kernels read these
    # Each by its place in the table; the last one in tests/kernels/test_weight_bits.py.
    derived = {"numbers", "flags", "correction"}
    assert {f.name for f in fields(Work)} == tensors | derived | {name for name in TOLD if isinstance(name, str)}
    assert {name for name in TOLD if isinstance(name, int)} == set(range(places.NUMBERS))


@pytest.mark.parametrize(("first", "second"), STORES, ids=lambda v: str(v).replace(", ", ","))
def test_a_kernel_reads_all_that_it_is_told_or_refuses_the_step(kernels, first, second):
    if interpreted() and (first, second) not in INTERPRETED:
        pytest.skip("interpreted kernels are slow: each of them is run with one or two stores")
    backend = fused_steps.backend(kernels, True)
    present = {
        "first": first, "second": second, "both": first and second,
        "count_min": type(second) is CountMin, "sketch": isinstance(second, CountMin),
    }  # fmt: skip
    took, plain = 0, None
    for name, (setting, *values) in TOLD.items():
        if not present.get(setting.get("needs"), True):
            continue
        works = [described(first, second, kernels, name, value, setting) for value in values]
        if any(backend.unsupported(w) for w in works):
            continue
        took += 1
        # Without a setting, the first value is also the value in all other steps.
        if setting.keys() <= {"needs"}:
            plain = plain or taken(backend, works[0])
        results = [plain if setting.keys() <= {"needs"} else taken(backend, works[0]), taken(backend, works[1])]
        assert not all(map(torch.equal, *results)), f"{name!r}: {values} make no difference"
    # Numba's kernels do not support some of these stores, and then no step with them.
    assert took == 0 if backend.unsupported(described(first, second, kernels, "seed", 0, {})) else took >= 8

"""A step happens whole or not at all: an error in anything that can fail leaves everything as it was."""

import contextlib
import copy
import functools
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map, tree_map_only

from sketch_plugins import InBackward, MemSGD, SAdagrad, Sketchy, registry, scratch
from sketch_plugins.comm.randk import RandK
from sketch_plugins.comm.topk import TopK
from sketch_plugins.linalg import kronecker
from sketch_plugins.optim import eager, fused, gradients, rehearsal, resolved, step_cache, taking
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.sketchy import momentum, write_back
from sketch_plugins.sharding import parts
from sketch_plugins.stores import CountMin, Int8
from sketch_plugins.stores import base as stores

try:
    from sketch_plugins.kernels import cpu
except ImportError:  # Numba is not installed
    cpu = None


@pytest.fixture(autouse=True)
def two_threads():
    """A pool of threads is one of the things that can fail."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_is_known_from_other_steps(monkeypatch):
    """Each step rehearses, because its calls are counted in one optimizer and fail in another."""

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(rehearsal, "REHEARSED", Forgetful())


NAMES = [*registry.names(), "sadagrad"]


def build(name, fused=None, large=True, **options):
    """An optimizer of tensors that use all paths of a step: matrices, a vector, an embedding with few rows."""
    if fused is None and cpu is None and name != "sadagrad":
        pytest.skip("Numba is not installed: no kernel takes a step here, and eager steps have cases of their own")
    torch.manual_seed(0)
    shapes = [(40, 24), (24,), (30, 8), (256, 160)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in (shapes if large else shapes[:3])]
    if name == "sadagrad":
        return SAdagrad(params, lr=0.01), params
    if name == "sketchy":  # small preconditioners, and none for the large matrix: any rank uses the same path
        options = {"rank": 4, "max_axis": 64, **options}
    return registry.get(name).cls(params, lr=0.01, fused=fused, min_compress_size=0, **options), params


def give_gradients(params, seed, sparse):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    if sparse:
        params[2].grad[4:] = 0
        params[2].grad = params[2].grad.to_sparse(1).coalesce()


def snapshot(optimizer, params):
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


def present(optimizer, params):
    """Like a snapshot that stores nothing, for a comparison."""
    return [p.detach() for p in params], optimizer.state_dict()


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Injected(Exception):
    pass


#: (module, name) of calls of a step before its first write: resolution, memory, compilation, threads, checks.
BEFORE = [
    (resolved, "choose"),
    (taking, "numbers"),
    (taking, "vector"),
    (gradients, "check_writable"),
    (fused, "describe"),
    (fused, "backend"),
    (stores.Store, "allocate"),
    (SketchOptimizer, "_gradient"),
    (SketchOptimizer, "_check_state"),
    (SketchOptimizer, "_check_options"),
    (SketchOptimizer, "_beside"),
    (SketchOptimizer, "_allocate"),
    (SketchOptimizer, "_resolve"),
    (SketchOptimizer, "_reserve"),
    (SketchOptimizer, "_prepare"),
    (SketchOptimizer, "_prepare_tasks"),
    (step_cache.StepCache, "marks"),
    (step_cache.StepCache, "recall"),
    (step_cache.StepCache, "recall_group"),
    (step_cache.Counters, "holds"),
    *([] if cpu is None else [(cpu, "misread"), (cpu, "_pool")]),
    *([] if cpu is None else [(cpu.Program, name) for name in ("__init__", "prepare", "_compile")]),
    (parts.Parts, "of"),
    (scratch, "reserve"),
    (torch, "empty"),
]
#: And calls in the middle of a step, when each parameter has either taken its step or not.
WITHIN = [
    (eager, "numerator_of"),
    (eager, "update"),
    (eager, "number"),
    (eager, "write_tile"),
    (SketchOptimizer, "_eager"),
    (SketchOptimizer, "_clean"),
    (Sketchy, "_gather"),
    (CountMin, "write"),
    (Int8, "blend"),
    (stores.Store, "write_back"),
    (write_back, "take"),
    (momentum, "average"),
    (kronecker.Stack, "turn"),
    (kronecker.Stack, "gather"),
    (scratch, "empty"),
    (torch, "zeros"),
    (torch, "full"),
    (torch, "sum"),
]


@contextlib.contextmanager
def failing(where, name, call):
    """The call with this number (from 1) raises; yields the counts."""
    original = getattr(where, name)
    counted = []

    def wrapped(*args, **kwargs):
        counted.append(name)
        if len(counted) == call:
            raise Injected(f"call {call} of {name}")
        return original(*args, **kwargs)

    with mock.patch.object(where, name, wrapped):
        yield counted


def injections(name, fused, first, calls, sparse, **options):
    """For each call that can fail: an optimizer before its step, the call that fails, and the expected result."""

    def about_to_step(counting=()):
        optimizer, params = build(name, fused, **options)
        for step in range(0 if first else 3):  # the third one is cached, and makes the calls of the fourth one
            give_gradients(params, step, sparse)
            with contextlib.ExitStack() as stack:
                counts = [stack.enter_context(failing(*point, 0)) for point in counting]
                optimizer.step()
        give_gradients(params, 3, sparse)
        return optimizer, params, [] if first else [len(counted) for counted in counts]

    origin, started, totals = about_to_step(() if first else calls)
    twin, others = duplicate(origin, started)
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(failing(*point, 0)) for point in calls] if first else []
        twin.step()
    for (where, attribute), total in zip(calls, totals or map(len, counts), strict=True):
        if not total:
            continue
        optimizer, params = (None, None) if first else about_to_step()[:2]
        for call in sorted({1, (total + 1) // 2, total} if name in ("cs_adam", "sketchy") else {1, total}):
            own, of = duplicate(origin, started) if first else (optimizer, params)
            with failing(where, attribute, call):
                yield own, of, (twin, others), f"call {call} of the {total} of {attribute}"
        # The same optimizer, or the next one, still works.
        own, of = duplicate(origin, started) if first else (optimizer, params)
        own.step()
        assert equal(of, others)
        assert equal(own.state_dict()["state"], twin.state_dict()["state"])


def duplicate(optimizer, params):
    other, others = copy.deepcopy((optimizer, params))
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad
    return other, others


WAYS = pytest.mark.parametrize(
    ("fused", "first"),
    [(None, True), (None, False), (False, True), (False, False)],
    ids=["kernels-first", "kernels-later", "eager-first", "eager-later"],
)


# Touched rows are left out, because their number, and so their memory, is known only in the step.
@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_an_error_before_the_first_write_leaves_everything_as_it_was(name, fused, first):
    tried = 0
    if name == "sadagrad" and fused is None:
        pytest.skip("it has no kernels: its eager steps are the other case")
    # Only kernels need the large matrix.
    large = fused is None
    for optimizer, params, _, what in injections(name, fused, first, BEFORE, sparse=False, large=large):
        before = snapshot(optimizer, params)
        with pytest.raises(Injected):
            optimizer.step()
        assert equal(before, present(optimizer, params)), f"{what}: a step half taken"
        tried += 1
    assert tried >= 8


@pytest.mark.parametrize("name", ["cs_adam", "sketchy"])
def test_an_error_before_the_first_write_where_the_temporaries_are_known(name, monkeypatch):
    """The layers of a model have equal shapes, so the temporaries of one are known from another."""
    monkeypatch.setattr(rehearsal, "REHEARSED", {})
    other, others = build(name, False, large=False)
    give_gradients(others, 3, False)
    other.step()
    known = len(rehearsal.REHEARSED)
    for where, attribute in [(scratch, "reserve"), (SketchOptimizer, "_reserve"), (stores.Store, "allocate")]:
        optimizer, params = build(name, False, large=False)
        give_gradients(params, 3, False)
        before = snapshot(optimizer, params)
        with failing(where, attribute, 1), pytest.raises(Injected):
            optimizer.step()
        assert equal(before, present(optimizer, params)), attribute
        optimizer.step()
        assert equal([p.detach() for p in params], [p.detach() for p in others])
    assert len(rehearsal.REHEARSED) == known > 0


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", NAMES)
def test_an_error_within_a_step_leaves_each_parameter_stepped_or_not(name, first):
    tried = 0
    calls = injections(name, False, first, WITHIN, sparse=True, large=False)
    for optimizer, params, (twin, others), what in calls:
        before = snapshot(optimizer, params)
        with pytest.raises(Injected):
            optimizer.step()
        after, state = present(twin, others), optimizer.state_dict()["state"]
        for i, p in enumerate(params):
            now = [p.detach(), dict(state[i]) if i in state else None]
            old, new = ([values[i], saved["state"].get(i)] for values, saved in (before, after))
            assert equal(now, old) or equal(now, new), f"{what}: parameter {i} has taken half a step"
        if not first:  # restore the state for the next call that fails
            optimizer.load_state_dict(before[1])
            with torch.no_grad():
                for p, value in zip(params, before[0], strict=True):
                    p.copy_(value)
        tried += 1
    assert tried >= 8


def test_every_point_is_reached():
    """Every call in the lists is still made by some step."""
    reached = set()
    for name, way, options in [
        ("cs_adam", None, {}),
        ("cs_adam", True, {}),
        ("cs_adam", False, {"clean_every": 1, "preset": "paper_cs_v"}),
        ("cs_adam", False, {"stochastic_rounding": True}),
        ("sketchy", False, {}),
    ]:
        optimizer, params = build(name, way, **options)
        if "stochastic_rounding" in options:
            params[0].data = params[0].data.to(torch.bfloat16)
        give_gradients(params, 1, sparse=way is False)
        with contextlib.ExitStack() as stack:
            counted = {point: stack.enter_context(failing(*point, 0)) for point in {*BEFORE, *WITHIN} - reached}
            for _ in range(4):  # a step that has been cached for a while
                optimizer.step()
            params[3].grad = params[3].grad.t().contiguous().t()  # another layout, so the step is described again
            optimizer.step()
        reached |= {point for point, calls in counted.items() if calls}
    assert {(where.__name__, name) for where, name in {*BEFORE, *WITHIN} - reached} == set()


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "eager"])
def test_ctrl_c_takes_effect_when_the_step_is_whole(fused, monkeypatch):
    optimizer, params = build("cs_adam", fused)
    give_gradients(params, 0, sparse=False)
    twin, others = duplicate(optimizer, params)
    twin.step()
    where, name = (cpu._Batch, "run") if fused is None else (SketchOptimizer, "_clean")
    original = getattr(where, name)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert equal(params, others) and equal(optimizer.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("compressor", ["topk", "randk"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_mem_sgd_leaves_each_parameter_stepped_or_not(compressor, averaging, first):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(20, 30)), torch.nn.Parameter(torch.randn(40).to(torch.bfloat16))]
    optimizer = MemSGD(params, density=0.1, compressor=compressor, averaging=averaging)
    for p in params:
        p.grad = torch.randn_like(p)
    if not first:
        optimizer.step()
    calls = [(TopK if compressor == "topk" else RandK, name) for name in ("compress", "positions", "count")]
    for where, name in [*calls, (torch, "add"), (torch, "zeros"), (torch.Tensor, "to"), (torch.Tensor, "lerp")]:
        twin, others = duplicate(optimizer, params)
        with failing(where, name, 0) as counted:
            twin.step()
        for call in range(1, len(counted) + 1):
            own, of = duplicate(optimizer, params)
            with failing(where, name, call), pytest.raises(Injected):
                own.step()
            for old, now, new in zip(params, of, others, strict=True):
                values = [
                    (p.detach(), dict(o.state.get(p, {}))) for p, o in ((now, own), (old, optimizer), (new, twin))
                ]
                assert equal(values[0], values[1]) or equal(values[0], values[2]), (name, call)


LAUNCHES = [
    "_fold", "_specialise", "_launch", "_ready", "_table", "_numbers", "_describe", "_task", "_laid_out", "_actions",
    "_compile", "_pinned", "_Covers", "_CoverLayout", "_Device", "Program",
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {"depth": 2}, {"second_moment": "row_count_min"}, {"second_moment": "cover"}, {"update_clip": 1.0}],
    ids=str,
)
def test_an_error_before_the_first_launch_leaves_everything_as_it_was(options, monkeypatch):
    launch = pytest.importorskip("sketch_plugins.kernels.gpu.launch", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    calls = [(launch, name) for name in LAUNCHES]
    tried = 0
    for optimizer, params, _, what in injections("cs_adam", True, True, calls, sparse=False, large=False, **options):
        before = snapshot(optimizer, params)
        with pytest.raises(Injected):
            optimizer.step()
        assert equal(before, present(optimizer, params)), f"{what}: a step half taken"
        tried += 1
    assert tried >= 8


def test_after_a_launch_that_fails_each_parameter_has_stepped_or_not(monkeypatch):
    launch = pytest.importorskip("sketch_plugins.kernels.gpu.launch", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    optimizer, params = build("cs_adam", True, large=False)
    give_gradients(params, 0, sparse=False)
    before = [p.detach().clone() for p in params]
    with failing(launch, "_run", 2), pytest.raises(Injected):
        optimizer.step()
    stepped = [not torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True)]
    assert 0 < sum(stepped) < len(params)
    assert [bool(optimizer.state.get(p)) for p in params] == stepped
    assert all(optimizer.state[p]["step"] == 1 for p, moved in zip(params, stepped, strict=True) if moved)


# -- modes and tensors around a step ----------------------------------------------------------------------------------


#: Each optimizer with kernels, and eagerly; SAdagrad has none.
KINDS = pytest.mark.parametrize(
    ("name", "fused"),
    [(name, fused) for name in NAMES for fused in (None, False) if fused is False or name != "sadagrad"],
    ids=lambda v: v if isinstance(v, str) else "kernels" if v is None else "eager",
)


def trained(name, around=contextlib.nullcontext, steps=4, fused=None):
    optimizer, params = build(name, fused, large=fused is None)
    for step in range(steps):
        give_gradients(params, step, sparse=False)
        with around():
            optimizer.step()
    return [p.detach() for p in params], optimizer


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}


@pytest.fixture(scope="module")
def right():
    """Trained without anything around, once for all modes."""
    return functools.cache(lambda name, fused: trained(name, fused=fused))


@KINDS
@pytest.mark.parametrize("around", AROUND)
def test_modes_around_a_step_change_no_bit(name, around, fused, right):
    expected, reference = right(name, fused)
    got, optimizer = trained(name, AROUND[around], fused=fused)
    assert equal(expected, got)
    assert equal(reference.state_dict()["state"], optimizer.state_dict()["state"])
    # State that was made there can be changed outside.
    give_gradients([p for group in optimizer.param_groups for p in group["params"]], 9, sparse=False)
    optimizer.step()


@KINDS
def test_a_backward_that_needs_the_weights_from_before_a_step_raises(name, fused):
    optimizer, params = build(name, fused, large=fused is None)
    weight = params[-1]
    for step in range(3):  # described, then remembered
        x = torch.ones(4, weight.shape[1], requires_grad=True)
        loss = (x @ weight.t()).square().sum()
        give_gradients(params, step, sparse=False)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_can_be_swapped_moved_and_cast(name):
    # Weak references to a parameter would make torch refuse this.
    torch.manual_seed(0)
    model = torch.nn.Linear(48, 32)
    options = {} if name == "sadagrad" else {"min_compress_size": 0}
    optimizer = (SAdagrad if name == "sadagrad" else registry.get(name).cls)(model.parameters(), lr=0.01, **options)
    steps = InBackward(optimizer) if name == "cs_adam" else contextlib.nullcontext()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with steps:
            for dtype in (torch.float32, torch.float64, torch.float32):
                model.to(dtype)
                optimizer.state.clear()  # the user has to convert it
                model(torch.randn(4, 48, dtype=dtype)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.utils.swap_tensors(model.weight, torch.nn.Parameter(torch.zeros(32, 48)))
    assert not model.weight.any() and optimizer.param_groups[0]["params"][0] is model.weight


# -- tensors without memory of their own ------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """Like quantized weights: no memory of its own, but operations of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.overloadpacket not in cls.allowed():
            raise NotImplementedError(f"{cls.__name__} has no {function}")
        args, kwargs = tree_map(lambda t: t.held if isinstance(t, cls) else t, (args, kwargs or {}))
        out = function(*args, **kwargs)
        return args[0] if function.overloadpacket is torch.ops.aten.copy_ else tree_map_only(torch.Tensor, cls, out)

    @staticmethod
    def allowed():
        aten = torch.ops.aten
        return {aten.detach, aten.clone, aten.copy_, aten.alias}


class Unreadable(Wrapped):
    @staticmethod
    def allowed():
        return {torch.ops.aten.detach, torch.ops.aten.alias}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_subclasses_without_memory_take_the_same_step(name, which):
    ends = []
    for wrapped in (False, True):
        large = name != "sadagrad"  # which has no kernels
        optimizer, params = build(name, fused=False, large=large)
        if wrapped and which == "parameter":
            params = [torch.nn.Parameter(Wrapped(p.detach().clone()), requires_grad=False) for p in params]
            optimizer, _ = build(name, large=large)
            optimizer.param_groups[0]["params"][:] = params
        for step in range(3):
            give_gradients(params, step, sparse=False)
            if wrapped and which == "gradient":
                for p in params:
                    p.grad = Wrapped(p.grad)
            optimizer.step()
        ends.append([getattr(p.detach(), "held", p.detach()) for p in params])
    assert equal(*ends)


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_a_subclass_that_cannot_be_read_is_refused_by_its_type(name, which):
    optimizer, params = build(name)
    give_gradients(params, 0, sparse=False)
    before = [p.detach().clone() for p in params]
    if which == "gradient":
        params[3].grad = Unreadable(params[3].grad)
    else:
        odd = torch.nn.Parameter(Unreadable(torch.zeros(8, 8)), requires_grad=False)
        odd.grad = torch.ones(8, 8)
        optimizer.param_groups[0]["params"].append(odd)
    with pytest.raises(ValueError, match="Unreadable"):
        optimizer.step()
    assert equal(before, [p.detach() for p in params]) and not optimizer.state


def test_tensors_that_lost_their_memory_are_refused_by_name(name):
    for which in ("gradient", "parameter"):
        optimizer, params = build(name)
        for step in range(2):
            give_gradients(params, step, sparse=False)
            if step:
                (params[3].grad if which == "gradient" else params[3]).untyped_storage().resize_(0)
                before = [p.detach().clone() for p in params[:3]]
                with pytest.raises(ValueError, match="memory"):
                    optimizer.step()
                assert equal(before, [p.detach() for p in params[:3]])
            else:
                optimizer.step()


def test_zero_tensors_and_wrapped_state_do_not_reach_the_kernels(name):
    ends = []
    for odd in (False, True):
        optimizer, params = build(name)
        for _ in range(3):
            for p in params:
                p.grad = torch._efficientzerotensor(p.shape) if odd else torch.zeros(p.shape)
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert equal(*ends)


def test_training_in_a_thread_outlives_the_main_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import threading, time, torch\n"
        "from sketch_plugins import CSAdam\n"
        "def train():\n"
        "    p = torch.nn.Parameter(torch.ones(512, 512))\n"
        "    optimizer = CSAdam([p], lr=0.1)\n"
        "    while True:\n"
        "        p.grad = torch.ones(512, 512)\n"
        "        optimizer.step()\n"
        "        if not threading.main_thread().is_alive() and optimizer.state[p]['step'] > 20:\n"
        "            break\n"
        "    print('trained', bool((p < 0).all()))\n"
        "torch.set_num_threads(2)\n"
        "threading.Thread(target=train).start()\n"
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert out.stdout == "trained True\n", out.stderr

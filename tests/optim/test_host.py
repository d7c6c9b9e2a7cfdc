"""Host costs of a cached step: calls for each tensor, launches, and changes that the cache must notice."""

import gc
import sys
import warnings
import weakref

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sketch_plugins import SM3, CSAdam
from sketch_plugins.optim import alike
from sketch_plugins.optim.alike import Alike
from sketch_plugins.optim.remembered_group import COMPARED, RememberedGroup, RememberedShards
from sketch_plugins.optim.step_cache import StepCache
from sketch_plugins.sharding.parts import Parts

# BERT's kinds of tensors, small.
LAYER = [(96, 64), (64,), (96,), (64, 96)]


class Free:
    """Replaces a kernel: counts its launches and computes nothing."""

    def __init__(self):
        self.count = 0

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **constants):
        self.count += 1


@pytest.fixture
def free(monkeypatch):
    """Triton's path on a CPU, its kernels replaced."""
    launch = pytest.importorskip("sketch_plugins.kernels.gpu.launch", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernel = Free()
    for module in (launch.step, launch.fold, launch.norms):
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and getattr(getattr(value, "fn", None), "__module__", "") == module.__name__:
                monkeypatch.setattr(module, name, kernel)
    return kernel


def build(cls, layers, fused, **options):
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(layers) for shape in LAYER]
    return params, cls(params, lr=1e-3, fused=fused, min_compress_size=0, **options)


def give(params):
    old = [p.grad for p in params]  # alive until the new ones have their addresses
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    del old


def calls(optimizer, params):
    """Calls of Python and of C functions, as the interpreter reports them."""
    give(params)
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return count


def calls_by_layers(cls, options, kernel=None):
    """Calls of a cached step with 10 and with 30 layers, and their difference for each tensor."""
    counts = []
    for layers in (10, 30):
        params, optimizer = build(cls, layers, True, **options)
        for _ in range(5):
            give(params)
            optimizer.step()
        if kernel is not None:
            kernel.count = 0
        counts.append(calls(optimizer, params))
        assert kernel is None or 1 <= kernel.count <= 11  # two widths that are less than a block
    return counts[0], (counts[1] - counts[0]) / (20 * len(LAYER))


KINDS = pytest.mark.parametrize(
    ("cls", "options"),
    [(CSAdam, {}), (CSAdam, {"preset": "lean", "lagged_rms": True}), (SM3, {})],
    ids=["cs_adam", "lean", "sm3"],
)


@KINDS
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_calls_for_each_tensor_and_launches(cls, options, capturable, free):
    few, each = calls_by_layers(cls, {**options, "capturable": capturable}, free)
    # Measured: 2. A step that describes its tensors makes about 600 calls for each.
    assert each <= 3 and few <= 1200


@KINDS
def test_launches_of_bert_base(cls, options, free):
    """Its 199 tensors at a quarter of the width: rows are blocks of int8 codes, as at full width."""
    d = 192
    layer = [*[(d, d), (d,)] * 4, (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,)]
    shapes = [(1000, d), (512, d), (2, d), (d,), (d,), *layer * 12, (d, d), (d,)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = cls(params, lr=1e-3, fused=True, **options)
    for _ in range(4):
        give(params)
        free.count = 0
        optimizer.step()
    assert len(shapes) == 199 and 1 <= free.count <= 10


@KINDS
def test_calls_for_each_tensor_on_a_cpu(cls, options):
    pytest.importorskip("numba")
    _, each = calls_by_layers(cls, options)
    assert each <= 40


def changed_rate(optimizer, params):
    optimizer.param_groups[0]["weight_decay"] = 0.3


def replaced_state(optimizer, params):
    state = optimizer.state[params[0]]
    state["second_moment.table"] = state["second_moment.table"] * 3


def freed_state(optimizer, params):
    """The new tensor may get the old one's identity and address."""
    for p in params:
        state = optimizer.state[p]
        for name in [name for name in state if name.startswith("second_moment.")]:
            value = state[name].tolist()
            del state[name]
            state[name] = torch.tensor(value) * 2


def moved_parameter(optimizer, params):
    params[0].data = params[0].data.clone()


def transposed_parameter(optimizer, params):
    square = torch.nn.Parameter(torch.arange(16.0).view(4, 4))
    optimizer.add_param_group({"params": [square]})
    square.grad = torch.ones(4, 4)


def changed_counter(optimizer, params):
    optimizer.state[params[1]]["step"].fill_(100.0)


def replaced_counter(optimizer, params):
    optimizer.state[params[2]]["step"] = torch.tensor(7.0)


def no_gradient(optimizer, params):
    params[3].grad = None


def transposed_gradient(optimizer, params):
    params[0].grad = params[0].grad.t().contiguous().t()


def negative_gradient(optimizer, params):
    params[0].grad = torch._neg_view(params[0].grad)


def wider_gradient(optimizer, params):
    params[0].grad.data = params[0].grad.data.clone()[:, :64].contiguous()


CHANGES = [
    changed_rate, replaced_state, freed_state, moved_parameter, transposed_parameter, changed_counter,
    replaced_counter, no_gradient, transposed_gradient, negative_gradient, wider_gradient,
]  # fmt: skip


def rate_in_a_tensor(optimizer, params):
    optimizer.param_groups[0]["lr"] = torch.tensor(3e-2)


def not_capturable(optimizer, params):
    optimizer.param_groups[0]["capturable"] = False


# A capturable step refuses what no kernel takes.
CAPTURABLE = [one for one in CHANGES if one not in (transposed_gradient, negative_gradient, wider_gradient)]


@pytest.mark.parametrize(
    ("change", "fused", "capturable"),
    [
        *[pytest.param(one, None, False, id=f"{one.__name__}-numba") for one in CHANGES],
        *[pytest.param(one, True, False, id=f"{one.__name__}-triton_interpreter") for one in CHANGES],
        *[
            pytest.param(one, True, True, id=f"{one.__name__}-capturable")
            for one in [*CAPTURABLE, rate_in_a_tensor, not_capturable]
        ],
    ],
)
def test_what_is_remembered_is_not_trusted(change, fused, capturable, monkeypatch):
    """After any change the step equals that of an optimizer without a cache."""
    pytest.importorskip("triton" if fused else "numba")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if fused else "0")
    results = []
    shapes = [(24, 16), (16,), (24,), (16, 24), (70, 32)] if fused else [*LAYER, (300, 128)]
    for forgets in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = CSAdam(params, lr=1e-2, fused=fused, capturable=capturable, min_compress_size=0)
        given = []
        for step in range(8):
            for p in params:
                p.grad = torch.randn(p.shape)
            given.append([p.grad for p in params])  # every gradient has an address of its own
            if step == 5:
                change(optimizer, params)
            if forgets:
                optimizer._step_cache = None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
                optimizer.step()
        every = [p for group in optimizer.param_groups for p in group["params"]]
        steps = [float(optimizer.state[p]["step"]) for p in every]
        results.append(([p.detach().clone() for p in every], steps))
    (ours, steps), (right, expected) = results
    assert steps == expected
    for a, b in zip(ours, right, strict=True):
        assert torch.equal(a, b)


def test_counters_stay_where_they_were_when_a_graph_was_captured(free):
    """Replays count there. (tests/kernels has a real capture, which needs a GPU.)"""
    params, optimizer = build(CSAdam, 4, True, capturable=True)
    places = []
    for _ in range(6):
        give(params)
        optimizer.step()
        optimizer._step_cache.captured = True
        places.append([optimizer.state[p]["step"].data_ptr() for p in params])
    assert places == places[:1] * 6 and len(optimizer._step_cache._groups) == 1
    assert {float(optimizer.state[p]["step"]) for p in params} == {6.0}


def test_groups_are_recalled_whole_and_no_tensor_is_kept(free):
    params, optimizer = build(CSAdam, 4, True)
    for _ in range(4):
        give(params)
        optimizer.step()
    assert isinstance(optimizer._step_cache, StepCache)
    (group,) = optimizer._step_cache._groups.values()
    assert isinstance(group, RememberedGroup) and len(group.tasks) == len(params)
    state = optimizer.state[params[0]].pop("second_moment.table")
    alive = [reference() is state for reference in group.alive]
    assert sum(alive) == 1
    del state
    assert any(reference() is None for reference in group.alive)


def test_torch_has_what_looks_at_all_tensors_in_one_call():
    """They are private: without them a step takes longer, and this test says why (`optim/alike.py`)."""
    assert alike.TensorGuards is not None, "torch._C._dynamo.guards.TensorGuards has moved"
    assert Alike([torch.ones(2)])._check is not None, "TensorGuards takes other arguments"


LIKE = {
    "itself": (lambda t: t, True),
    "other numbers": (lambda t: torch.zeros(4, 6), True),
    "a shape": (lambda t: torch.ones(6, 4), False),
    "strides": (lambda t: torch.ones(6, 4).t(), False),
    "a dtype": (lambda t: torch.ones(4, 6, dtype=torch.float64), False),
    "a negative flag": (lambda t: torch._neg_view(torch.ones(4, 6)), False),
    "a sparse layout": (lambda t: torch.ones(4, 6).to_sparse(), False),
    "another device": (lambda t: torch.ones(4, 6, device="meta"), False),
    "a parameter": (lambda t: torch.nn.Parameter(torch.ones(4, 6)), False),
    "a subclass": (lambda t: torch.ones(4, 6).as_subclass(type("Sub", (torch.Tensor,), {})), False),
    "no tensor": (lambda t: None, False),
}


@pytest.mark.parametrize("other", LIKE)
def test_what_looks_alike(other):
    tensor = torch.ones(4, 6)
    make, expected = LIKE[other]
    looks = Alike([torch.ones(3), tensor])
    assert looks.holds([torch.ones(3), make(tensor)]) is expected
    assert not looks.holds([torch.ones(3)]) and not looks.holds([make(tensor), torch.ones(3)])


def test_looking_keeps_no_tensor_alive():
    tensors = [torch.ones(4), torch.nn.Parameter(torch.ones(5))]
    looks, kept = Alike(tensors), [weakref.ref(t) for t in tensors]
    del tensors
    gc.collect()
    assert not any(reference() is not None for reference in kept) and looks.holds([torch.ones(4)]) is False


@pytest.mark.parametrize("there", [True, False])
def test_without_it_groups_are_recalled_all_the_same(there, free, monkeypatch):
    """Every step is then compared in Python, and only a few things are made again."""
    made = []
    if not there:
        monkeypatch.setattr(alike, "TensorGuards", None)
    monkeypatch.setattr(
        Alike, "__init__", lambda self, tensors, init=Alike.__init__: (made.append(1), init(self, tensors))[0]
    )
    params, optimizer = build(CSAdam, 4, True)
    for _ in range(12):
        give(params)
        optimizer.step()
    (group,) = optimizer._step_cache._groups.values()
    assert group.times >= 8 and len(made) == (1 if there else COMPARED)
    assert {float(optimizer.state[p]["step"]) for p in params} == {12.0}


@pytest.mark.parametrize("cls", [CSAdam, SM3])
def test_groups_that_share_a_launch_keep_their_own_numbers(cls):
    """Several groups with their own rates and step numbers, and with parameters that sometimes have no gradient."""
    pytest.importorskip("numba")
    ends = []
    for remembers in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3) for shape in [(300, 130), *LAYER]]
        groups = [
            {"params": params[i::3], "lr": rate, "weight_decay": decay}
            for i, (rate, decay) in enumerate([(1e-2, 0.1), (3e-2, 0.0), (1e-3, 0.5)])
        ]
        optimizer = cls(groups, min_compress_size=0)
        for step in range(9):
            if not remembers:
                optimizer.__dict__.pop("_step_cache", None)
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            if step < 2:
                params[4].grad = None  # it is a few steps behind from here on
            for number, group in enumerate(optimizer.param_groups):
                group["lr"] *= 1 - 0.1 * number
            optimizer.step()
        ends.append((params, optimizer))
    (ours, one), (theirs, other) = ends
    assert any(group.times for group in one._step_cache._groups.values())
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, other.state[q][name]) for name, t in one.state[p].items())


@pytest.mark.parametrize("fused", [True, None], ids=["triton_interpreter", "numba"])
def test_sparse_gradients_leave_the_others_remembered(fused, monkeypatch):
    """An embedding with sparse gradients among dense parameters; now and then it has a dense one, or none."""
    pytest.importorskip("triton" if fused else "numba")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if fused else "0")
    ends = []
    for forgets in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in [(40, 16), (24, 16), (16,), (24,), (300, 128)]]
        optimizer = CSAdam([{"params": params}, {"params": []}], lr=1e-2, fused=fused, min_compress_size=0)
        for step in range(9):
            for p in params:
                p.grad = torch.randn(p.shape)
            rows = torch.tensor([[step, step + 7]])
            if step == 6:
                params[0].grad = None
            elif step != 4:
                params[0].grad = torch.sparse_coo_tensor(rows, torch.randn(2, 16), (40, 16), check_invariants=True)
            if forgets:
                optimizer._step_cache = None
            optimizer.step()
        ends.append((params, optimizer))
    (ours, one), (theirs, other) = ends
    (group,) = one._step_cache._groups.values()
    assert len(group.tasks) == 4 and group.times >= 3
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, other.state[q][name]) for name, t in one.state[p].items())


def test_a_group_that_changes_all_the_time_is_given_up(free):
    params, optimizer = build(CSAdam, 4, True)
    for step in range(200):
        give(params)
        if step % 3 == 0:
            params[step % len(params)].grad = None
        optimizer.step()
    assert optimizer._step_cache._failed == {(id(optimizer.param_groups[0]), id(params[0])): 20}
    assert all(float(optimizer.state[p]["step"]) < 200 for p in params)


def test_changes_of_long_ago_are_forgotten(free):
    """An evaluation that sometimes moves everything does not end the caching."""
    params, optimizer = build(CSAdam, 4, True)
    for step in range(300):
        give(params)
        if step in (10, 20):
            params[0].grad = None
        if step == 30:
            assert list(optimizer._step_cache._failed.values()) == [4]  # gone, and back again
        optimizer.step()
    assert optimizer._step_cache._failed == {} and len(optimizer._step_cache._groups) == 1


def test_a_group_that_cannot_be_remembered_is_tried_once(free, monkeypatch):
    """Its parts are not made again in every step."""
    params = [torch.nn.Parameter(torch.ones(96, 64)) for _ in range(3)]  # too few
    optimizer = CSAdam(params, fused=True, min_compress_size=0)
    made = []
    of = Parts.of
    monkeypatch.setattr(Parts, "of", lambda self, index, p: made.append(index) or of(self, index, p))
    for _ in range(6):
        give(params)
        made.clear()
        optimizer.step()
    assert made == []


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def placed_otherwise(optimizer, params, mesh):
    params[1].grad = params[1].grad.redistribute(mesh, [Replicate()])


def moved_shard(optimizer, params, mesh):
    params[0].to_local().data = params[0].to_local().clone()


def plain_gradient(optimizer, params, mesh):
    """DTensor refuses to be given one; through `.data` nothing does."""
    params[2].grad._local_tensor = params[2].grad.to_local().double()


def damaged_state(optimizer, params, mesh):
    state = optimizer.state[params[0]]
    state["second_moment.table"] = state["second_moment.table"] * 3


@pytest.mark.parametrize("change", [placed_otherwise, moved_shard, plain_gradient, damaged_state])
def test_what_is_remembered_of_shards_is_not_trusted(change, mesh, monkeypatch):
    """After any change the step equals that of an optimizer without a cache (Triton's interpreter, one rank)."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    results = []
    for forgets in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(distribute_tensor(torch.randn(shape, generator=generator), mesh, [Shard(0)]))
            for shape in LAYER
        ]
        optimizer = CSAdam(params, lr=1e-2, fused=True, min_compress_size=0)
        for step in range(6):
            for p in params:
                p.grad = distribute_tensor(torch.randn(p.shape, generator=generator), mesh, [Shard(0)])
            if step == 4:
                change(optimizer, params, mesh)
            if forgets:
                optimizer._step_cache = None
            elif step == 3:
                assert {type(group) for group in optimizer._step_cache._groups.values()} == {RememberedShards}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
                optimizer.step()
        results.append([p.to_local().clone() for p in params])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("options", "dtype", "most"),
    [
        ({}, torch.float32, 14.7),
        ({"preset": "lean", "lagged_rms": True}, torch.float32, 12.6),
        ({}, torch.bfloat16, 8.7),
        ({"preset": "lean", "lagged_rms": True}, torch.bfloat16, 6.6),
        # The corrections of 24-bit weights: a byte read, a byte written.
        ({"weight_bits": 24}, torch.bfloat16, 10.8),
        ({"preset": "lean", "lagged_rms": True, "weight_bits": 24}, torch.bfloat16, 8.7),
    ],
    ids=["cs_adam", "lean", "cs_adam bf16", "lean bf16", "cs_adam 24 bits", "lean 24 bits"],
)
def test_bytes_that_a_kernel_moves(options, dtype, most, monkeypatch):
    """Read and written for each parameter, by the elements of loads and stores. AdamW moves 28 (float32)."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    p = torch.nn.Parameter(torch.ones(320, 768, dtype=dtype))
    optimizer = CSAdam([p], lr=1e-3, fused=True, **options)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = 0
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def loads(self, ptrs, mask, *rest):
        nonlocal moved
        out = load(self, ptrs, mask, *rest)
        moved += int(mask.data.sum()) * out.data.dtype.itemsize
        return out

    def stores(self, ptrs, value, mask, *rest):
        nonlocal moved
        moved += int(mask.data.sum()) * value.data.dtype.itemsize
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", loads)
    monkeypatch.setattr(builder, "create_masked_store", stores)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert most - 1 < moved / p.numel() <= most

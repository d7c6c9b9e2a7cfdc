"""Steps in backward: the same numbers as steps after it, the memory of one gradient, and clear errors."""

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sketch_plugins import CSAdam, InBackward, MemSGD, SAdagrad, Sketchy, registry, state_report
from sketch_plugins.kernels.rounding import round_stochastically, round_to_bf16
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.memory.meter import AllocatorMeter
from sketch_plugins.sharding.blocks import Rows, Tile


class Net(torch.nn.Module):
    """Tied weights, one that is used twice, equal shapes, a frozen one, one without gradient, one for the kernels."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 32, sparse=sparse)
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.wide, self.narrow = torch.nn.Linear(32, 1100), torch.nn.Linear(1100, 32)
        self.frozen, self.unused = torch.nn.Linear(32, 32), torch.nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.embedding(x)
        for layer in (self.first, self.second, self.first):
            x = x + torch.tanh(layer(x))
        x = self.frozen(self.narrow(torch.relu(self.wide(x))))
        return x if self.embedding.sparse else x @ self.embedding.weight.t()


USED = 9  # parameters with a gradient: embedding, and four layers with weight and bias


def make(name, sparse=False, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    net = Net(sparse).to(dtype)
    cls = SAdagrad if name == "s_adagrad" else registry.get(name).cls
    if "min_compress_size" in cls.OPTIONS:
        options = {"min_compress_size": 256, **options}
    named = list(net.named_parameters())
    groups = [{"params": named[::2], "weight_decay": 0.1}, {"params": named[1::2]}]
    optimizer = cls(groups, lr=1e-2, **options)
    return net, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=8)


def loss_of(net, step, part=0):
    x = torch.randint(0, 100, (4, 8), generator=torch.Generator().manual_seed(100 * step + part))
    return net(x).float().square().mean()


def train(net, optimizer, schedule, steps, accumulation=1, last=None):
    """``steps``: a range; with an `InBackward` nothing may be left for ``optimizer.step()``."""
    back = in_backward(optimizer)
    for step in steps:
        for part in range(accumulation):
            if back is not None:
                back.last = lambda part=part: part == accumulation - 1
            (loss_of(net, step, part) / accumulation).backward()
        gradients = [p for p in net.parameters() if p.grad is not None]
        assert (len(gradients), back.taken) == (0, USED) if back is not None else len(gradients) == USED
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_same(one, other):
    for (label, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), label


def same_state(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    return one == other


NAMES = registry.names()
OPTIONS = [
    *((name, {}) for name in (*NAMES, "s_adagrad")),
    *((name, {"fused": False}) for name in NAMES),
    *((name, {"sparse": True}) for name in NAMES),
    *((name, {"dtype": torch.bfloat16, "stochastic_rounding": True}) for name in NAMES),
    *((name, {"dtype": torch.bfloat16, "weight_bits": 24}) for name in (*NAMES, "s_adagrad")),
    ("cs_adam", {"dtype": torch.bfloat16, "weight_bits": 32, "sparse": True}),
    *((name, {"lagged_rms": True, "update_clip": 1.0}) for name in ("cs_adam", "cs_momentum")),
    ("cs_adam", {"row_sparse": "auto", "preset": "lean"}),
    ("cs_adam", {"clean_every": 3, "depth": 2, "first_moment_rounding": "stochastic", "table_dtype": "bf16"}),
    ("cs_adagrad", {"decoupled_weight_decay": False}),
    ("sketchy", {"preset": "paper", "rank": 8}),
    ("sketchy", {"update_freq": 3, "solver": "power", "refresh_every": 2, "statistics_freq": 3}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_the_weights_are_those_of_the_ordinary_run(name, options):
    if name == "sketchy":  # stacks of several tensors have the same numbers up to rounding
        options = {"stack_bytes": 0, **options}
    ordinary, other = make(name, **options), make(name, **options)
    InBackward(other[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Detected call of `lr_scheduler.step")
        for accumulation, steps in ((1, range(6)), (4, range(6, 10))):
            train(*ordinary, steps, accumulation)
            train(*other, steps, accumulation)
    assert_same(ordinary[0], other[0])
    assert same_state(ordinary[1].state_dict()["state"], other[1].state_dict()["state"])
    start, moved = make(name, **options)[0], 0
    for p, q in zip(start.parameters(), other[0].parameters(), strict=True):
        moved += not torch.equal(p, q)
    assert moved == USED


@pytest.mark.parametrize("name", NAMES)
def test_resume_from_an_ordinary_run_and_back(name):
    whole = make(name)
    train(*whole, range(6))
    for first, second in ((True, False), (False, True), (True, True)):
        begun = make(name)
        back = InBackward(begun[1]) if first else None
        train(*begun, range(3))
        saved = copy.deepcopy([one.state_dict() for one in begun])
        resumed = make(name, seed=7)
        back = InBackward(resumed[1]) if second else None
        for one, state in zip(resumed, saved, strict=True):
            one.load_state_dict(state)
        train(*resumed, range(3, 6))
        assert_same(whole[0], resumed[0])
        assert (back is not None) == second


def test_a_context_ends():
    ordinary, other = make("sketchy"), make("sketchy")
    train(*ordinary, range(4))
    with InBackward(other[1]) as back:
        assert in_backward(other[1]) is back
        train(*other, range(2))
    assert in_backward(other[1]) is None and not hasattr(other[1], "_step_supports_amp_scaling")
    train(*other, range(2, 4))  # also checks that gradients exist
    assert_same(ordinary[0], other[0])


def test_removed_in_the_middle_of_a_cycle_what_waits_is_done():
    ordinary, other = make("sketchy"), make("sketchy")
    train(*ordinary, range(1))
    with InBackward(other[1]):
        loss_of(other[0], 0).backward()
    assert same_state(ordinary[1].state_dict()["state"], other[1].state_dict()["state"])


def test_accumulate_says_which_backwards_are_not_the_last():
    ordinary, other = make("cs_adam"), make("cs_adam")
    train(*ordinary, range(3), 3)
    back = InBackward(other[1])
    for step in range(3):
        for part in range(3):
            with back.accumulate() if part < 2 else contextlib.nullcontext():
                (loss_of(other[0], step, part) / 3).backward()
            assert back.taken == (USED if part == 2 else 0)
        other[1].step()
        other[2].step()
    assert_same(ordinary[0], other[0])


def test_what_is_left_is_taken_by_step():
    """Gradients that are set by hand, and those of parameters without one in the last backward."""
    ordinary, other = make("sketchy"), make("sketchy")
    back = InBackward(other[1])
    for net, optimizer, _ in (ordinary, other):
        for step in range(3):
            with back.accumulate():
                loss_of(net, step).backward()
            net.unused.weight.grad = torch.full_like(net.unused.weight, 0.5)
            net.first(torch.ones(1, 32)).sum().backward()  # of `first` only
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer is ordinary[1] or back.taken == 0
    assert_same(ordinary[0], other[0])


def test_a_closure():
    ordinary, other = make("cs_adam"), make("cs_adam")
    train(*ordinary, range(3))
    back = InBackward(other[1])
    for step in range(3):

        def closure(step=step):
            assert back.stepping
            other[1].zero_grad()
            loss = loss_of(other[0], step)
            loss.backward()
            assert back.taken == USED
            return loss

        loss = other[1].step(closure) if step % 2 else other[1].step(closure=closure)
        assert loss.item() > 0
        assert back.taken == 0 and not back.stepping
        other[2].step()
    assert_same(ordinary[0], other[0])


def test_parameters_that_come_later_join_in():
    ordinary, other = make("cs_adam"), make("cs_adam")
    back = InBackward(other[1])
    for net, optimizer, _ in (ordinary, other):
        late = torch.nn.Linear(32, 32)
        torch.nn.init.eye_(late.weight)
        torch.nn.init.zeros_(late.bias)
        taken = []
        for step in range(5):
            if step == 1:
                net.frozen.requires_grad_(True)
                optimizer.add_param_group(
                    {"params": [(f"late.{n}", p) for n, p in late.named_parameters()], "lr": 1e-3}
                )
            if step == 3:  # as frameworks do it: another tensor replaces it
                old = net.second.weight
                net.second.weight = torch.nn.Parameter(old.detach().clone())
                for group in optimizer.param_groups:
                    group["params"] = [net.second.weight if p is old else p for p in group["params"]]
                optimizer.state[net.second.weight] = optimizer.state.pop(old)
            if step == 4:
                back.install()
            late(net.embedding(torch.arange(10))).square().mean().add(loss_of(net, step)).backward()
            taken.append(back.taken)
            optimizer.step()
            optimizer.zero_grad()
    # Frozen and late parameters take their step after backward once, the replaced one in backward once it has a hook.
    assert taken == [USED, USED, USED + 4, USED + 3, USED + 4]
    assert_same(ordinary[0], other[0])


def test_no_cost_of_a_step_grows_with_the_number_of_parameters():
    """Counts how often a parameter's step reads the lists of the groups."""

    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

        def __iter__(self):
            for one in super().__iter__():
                Counted.reads += 1
                yield one

    def reads(number, cls):
        params = [torch.nn.Parameter(torch.randn(4, 4)) for _ in range(number)]
        optimizer = cls(params, lr=1e-3)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.param_groups[0]["params"] = Counted(params)
        Counted.reads = 0
        optimizer.step_parameter(0, number // 2)
        return Counted.reads

    for name in NAMES:
        cls = registry.get(name).cls
        assert reads(4, cls) == reads(64, cls) < 8, name


def test_copies_are_ordinary_and_nothing_is_kept_alive():
    net, optimizer, _ = make("cs_adam")
    InBackward(optimizer)
    with pytest.raises(ValueError, match="already takes its steps in backward"):
        InBackward(optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert in_backward(copied) is None and not hasattr(copied, "_step_supports_amp_scaling")
    copied_net = copy.deepcopy(net)
    loss_of(copied_net, 0).backward()
    assert sum(p.grad is not None for p in copied_net.parameters()) == USED
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, _
        assert gone() is None
    finally:
        gc.enable()
    loss_of(net, 0).backward()  # the hooks find no object
    assert sum(p.grad is not None for p in net.parameters()) == USED


# -- memory ----------------------------------------------------------------------------------------------------------

WIDTH, DEPTH, TILE = 384, 12, 1 << 12


def deep(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(DEPTH)))


def peak(optimizer_of, dtype, in_back=False):
    """Bytes at the peak of a training step, beyond weights and state, in units of a layer's gradient.

    Without an optimizer gradients are freed one by one, which gives the memory of backward itself.
    """
    net = deep(dtype)
    optimizer = None if optimizer_of is None else optimizer_of(net.parameters())
    if optimizer is None:
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    elif in_back:
        InBackward(optimizer)
    x = torch.randn(2, WIDTH, dtype=dtype)

    def step():
        net(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(4):  # allocates the state, compiles kernels, and caches the step
        step()
    before = [p.detach().clone() for p in net.parameters()]
    meter = AllocatorMeter()
    meter.start()
    step()
    most = meter.read()
    assert meter.left == meter.live
    assert all(torch.equal(p, q) == (optimizer is None) for p, q in zip(net.parameters(), before, strict=True))
    return (most - meter.live) / (WIDTH * WIDTH * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_peak_is_one_gradient_not_all_of_them(dtype):
    """Measured by torch's allocator, without the memory that lives between two steps."""
    options = {"stochastic_rounding": True} if dtype == torch.bfloat16 else {}
    adam = partial(CSAdam, lr=1e-3, chunk_size=TILE, **options)
    alone, ordinary, early = peak(None, dtype), peak(adam, dtype), peak(adam, dtype, True)
    tiles = 64 * TILE / (WIDTH * WIDTH * dtype.itemsize)  # bytes of a step's temporaries, for each number of a tile
    assert DEPTH < ordinary < DEPTH + 1 + tiles
    # A CPU's matmul may copy a bfloat16 weight, so backward alone takes two gradients then.
    assert 1 < alone < 2.2 and alone <= early < alone + 0.1 + tiles


@pytest.mark.parametrize("name", NAMES)
def test_no_optimizer_holds_gradients(name):
    cls = registry.get(name).cls
    optimizer_of = partial(cls, lr=1e-3, chunk_size=TILE, **({"rank": 4} if name == "sketchy" else {}))
    ordinary, early = peak(optimizer_of, torch.float32), peak(optimizer_of, torch.float32, True)
    assert early < 2.5 and ordinary > DEPTH  # Sketchy also has a buffer of the tensor's size


def test_two_bytes_a_parameter_and_the_state():
    """bfloat16 weights without a float32 copy: the first two steps, with everything counted."""
    meter = AllocatorMeter()
    meter.start()
    net = deep(torch.bfloat16)
    optimizer = CSAdam(net.parameters(), lr=1e-3, stochastic_rounding=True, preset="lean", chunk_size=TILE)
    InBackward(optimizer)
    x = torch.randn(2, WIDTH, dtype=torch.bfloat16)
    for _ in range(2):
        net(x).square().mean().backward()
        optimizer.step()
    params = sum(p.numel() for p in net.parameters())
    measured = (meter.read() - meter.live) / params
    state = state_report(optimizer).bytes_per_param
    assert 0.1 < state < 0.25
    # One gradient of twelve, a copy of one weight by a CPU's matmul, activations, tiles.
    assert measured < 2 + state + 2 * 2 / DEPTH + 0.3, measured
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_noise_of_stochastic_rounding_is_drawn_in_blocks():
    """It would take 40 bytes for each number of a tile, ten times the weights that it saves; the bits are the same."""
    generator = torch.Generator().manual_seed(0)
    size = 2**20
    for at, shape in (
        (Tile(256, 0, 4, 64, 0, 4096), (4, 64, 4096)),
        (Tile(300_000, 7, 1, 262_144, 2, 6), (1, 262_144, 4)),
        (Tile(2, 1, 1, 1, 5, 5 + size), (1, 1, size)),
        (Rows(5000, torch.randperm(5000, generator=generator)[:1024], 3, 1027), (1024, 1024)),
    ):
        values = torch.randn(shape, generator=generator)
        values.view(-1)[::4099] = torch.tensor(float("inf"))
        columns = at.hi + 9
        index = at.from_rows(at.index(values.device).unsqueeze(-1) * columns) + torch.arange(at.lo, at.hi)
        expected = round_stochastically(values.clone(), index, 5, 3)
        del index
        meter = AllocatorMeter()
        meter.start()
        rounded = round_to_bf16(values, at, columns, 5, 3)
        taken = meter.read() - meter.live
        assert torch.equal(rounded, expected) and rounded.data_ptr() == values.data_ptr()
        assert taken < 20 * size  # it was 41; `Rows` and narrow tiles have 8 bytes for each row as well


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_second_backward_that_nobody_announced():
    net, optimizer, _ = make("cs_adam")
    back = InBackward(optimizer)
    loss_of(net, 0).backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 'narrow\.(weight|bias)'.*second gradient since the last optimizer\.step"
    ):
        loss_of(net, 1).backward()
    back.reset()
    optimizer.zero_grad()
    loss_of(net, 1).backward()
    optimizer.step()
    assert back.taken == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_parameter_that_checkpoints_share(reentrant):
    layer, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    start = layer.weight.detach().clone()
    optimizer = CSAdam([*layer.named_parameters(), *((f"other.{n}", p) for n, p in other.named_parameters())], lr=1e-2)
    back = InBackward(optimizer)
    x = torch.randn(2, 8, requires_grad=True)
    y = x
    for module in (layer, other, layer):
        y = checkpoint(module, y, use_reentrant=reentrant)
    if reentrant:
        with pytest.raises(RuntimeError, match=r"'(weight|bias)' of shape.*second gradient.*use_reentrant=False"):
            y.sum().backward()
        assert not torch.equal(layer.weight, start)  # the first of the two steps has been taken
    else:
        y.sum().backward()
        assert back.taken == 4


def test_gradients_that_are_part_of_a_graph():
    net, optimizer, _ = make("cs_adam")
    before = copy.deepcopy(net)
    InBackward(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 'narrow.*create_graph=True"):
        loss_of(net, 0).backward(create_graph=True)
    assert_same(net, before)


def test_who_kept_a_parameter_for_later_is_told():
    """Kernels write to addresses, but autograd notices this, as after any step in place."""
    weight = torch.nn.Parameter(torch.randn(200, 200))
    optimizer = CSAdam([weight], lr=1e-2)  # in the compiled sweep, if there is one
    InBackward(optimizer)
    x = torch.randn(3, 200, requires_grad=True)
    (x @ weight).sum().backward()
    optimizer.step()
    y = x @ weight
    y.square().sum().backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gan_like_use_of_moved_weights_is_told():
    net, optimizer, _ = make("cs_adam")
    InBackward(optimizer)
    one, other = loss_of(net, 0), loss_of(net, 1)
    one.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_an_error_names_the_parameter_and_says_what_has_happened():
    net, optimizer, _ = make("sketchy")
    before = {label: p.detach().clone() for label, p in net.named_parameters()}
    back = InBackward(optimizer)
    net.second.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(
        ValueError, match=r"parameter 'second\.weight'.*not finite.*of 13 parameters have already taken"
    ):
        loss_of(net, 0).backward()
    moved = {label for label, p in net.named_parameters() if not torch.equal(p, before[label])}
    assert "second.weight" not in moved and {"narrow.weight", "narrow.bias", "wide.weight"} <= moved
    assert back.taken == len(moved)


def test_an_error_keeps_its_type(monkeypatch):
    net, optimizer, _ = make("cs_adam")
    InBackward(optimizer)

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(optimizer, "_update", fails)
    with pytest.raises(torch.OutOfMemoryError, match=r"out of memory.*in the step of parameter 'narrow\.") as caught:
        loss_of(net, 0).backward()
    assert len(caught.value.args) == 1  # accelerate and transformers recognize it by this


def test_options_are_looked_at_in_each_step():
    net, optimizer, _ = make("cs_adam")
    InBackward(optimizer)
    loss_of(net, 0).backward()
    optimizer.step()
    for group in optimizer.param_groups:
        group["eps"] = -1.0
    with pytest.raises(ValueError, match=r"eps=-1\.0.*'narrow\."):
        loss_of(net, 1).backward()


def test_grad_scaler_is_refused():
    net, optimizer, _ = make("cs_adam")
    back = InBackward(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.*still scaled"):
        scaler.step(optimizer)
    back.remove()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net, 0)).backward()
    scaler.step(optimizer)  # an ordinary optimizer again


def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        net, optimizer, _ = make("cs_adam")
        for p in net.unused.parameters():
            p.requires_grad_(False)
        before = copy.deepcopy(net)
        stranger = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # of other parameters
        InBackward(optimizer)
        ddp = torch.nn.parallel.DistributedDataParallel(net)  # wrapped later: found in the first backward
        with pytest.raises(ValueError, match="DistributedDataParallel: steps would be taken before"):
            loss_of(ddp, 0).backward()
        assert_same(net, before)
        del ddp
        gc.collect()
        ddp = torch.nn.parallel.DistributedDataParallel(net)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            InBackward(make_with(net))
        del ddp, stranger
    finally:
        torch.distributed.destroy_process_group()


def make_with(net):
    return CSAdam([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def test_a_gradient_that_comes_back_is_an_error():
    net, optimizer, _ = make("cs_adam")
    InBackward(optimizer)
    loss_of(net, 0).backward()
    net.first.bias.grad = torch.ones_like(net.first.bias)
    with pytest.raises(RuntimeError, match=r"parameter 'first\.bias'.*has a gradient again"):
        optimizer.step()


def test_wrong_arguments():
    p = torch.nn.Parameter(torch.randn(4, 4))
    with pytest.raises(TypeError, match="not AdamW"):
        InBackward(torch.optim.AdamW([p]))
    with pytest.raises(TypeError, match="not MemSGD"):
        InBackward(MemSGD([p], lr=0.1))
    with pytest.raises(TypeError, match="last=True is not callable"):
        InBackward(CSAdam([p]), last=True)
    for nonfinite in ("skip", "deferred", "deferred_skip"):
        optimizer = Sketchy([p], nonfinite=nonfinite)
        with pytest.raises(ValueError, match=rf"nonfinite='{nonfinite}' would leave out.*use nonfinite='error'"):
            InBackward(optimizer)
        assert in_backward(optimizer) is None and not p._post_accumulate_grad_hooks


def test_sketchy_cannot_be_told_to_skip_later():
    net, optimizer, _ = make("sketchy")
    InBackward(optimizer)
    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    with pytest.raises(ValueError, match=r"'narrow.*nonfinite='skip'"):
        loss_of(net, 0).backward()

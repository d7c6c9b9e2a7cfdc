"""The demands of torch's own tests on any optimizer, in `test/test_optim.py` and `test/test_lrscheduler.py`.

They are written again here, for every name of the registry and a few presets, `SAdagrad` and `MemSGD`. The arguments
that must be errors come from `torch.testing._internal.common_optimizers` itself. These of torch's tests are left out:

====================================================== ===============================================================
torch's test                                           reason
====================================================== ===============================================================
foreach_*, fused_*, *cliquey_kwargs*, differentiable   about torch's own implementations of one step; ours are compared
                                                       with each other in tests/kernels
complex, complex_2d                                    complex parameters are refused, which is tested here
capturable_*, cuda_*, tensor_lr_num_dim on devices,    need a GPU: tests/kernels has those of the project (marked gpu)
grad_scaling_autocast_fused, state_dict_with_cuda_*,
cpu_load_state_dict, cast params to another device
can_load_older_state_dict                              options younger than a checkpoint: tests/optim/test_state_dict.py
rosenbrock_sparse                                      gradients of single numbers of a vector, in coordinate descent;
                                                       rows of embeddings are compared with SparseAdam in test_limits.py
lbfgs, adafactor, muon and other named optimizers      about those classes
the values of rates in test_lrscheduler.py             are about torch's schedulers; asked here is that the optimizer
                                                       steps with the rate, and the betas, that AdamW is given
====================================================== ===============================================================
"""

import copy
import gc
import importlib
import inspect
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sketch_plugins import CSAdam, CSMomentum, Sketchy, registry
from sketch_plugins.optim import MemSGD
from sketch_plugins.optim.sadagrad import SAdagrad

# Options beside lr: what torch calls the inputs of an optimizer. Small tensors are compressed, too.
SMALL = {"min_compress_size": 0}
OPTIMIZERS = {name: (registry.get(name).cls, [SMALL, {**SMALL, "maximize": True}]) for name in registry.names()}
for _cls, _inputs in OPTIMIZERS.values():
    if "weight_decay" in _cls.OPTIONS:
        _inputs.append({**SMALL, "weight_decay": 0.1})
    if "exact" in _cls.PRESETS:
        _inputs.append({"preset": "exact"})
OPTIMIZERS["cs_adam"][1].extend([{**SMALL, "preset": "lean"}, {**SMALL, "lagged_rms": True, "update_clip": 1.0}])
OPTIMIZERS["sketchy"][1].extend([{"preset": "paper"}, {"update_freq": 2, "rank": 2}])
OPTIMIZERS["s_adagrad"] = SAdagrad, [{}, {"weight_decay": 0.1}, {"maximize": True}, {"rank": 2}]
OPTIMIZERS["mem_sgd"] = MemSGD, [{"density": 0.5}, {"weight_decay": 0.1}, {"compressor": "randk"}, {"averaging": True}]
CASES = [
    pytest.param(cls, options, id=f"{name}-{', '.join(f'{k}={v}' for k, v in options.items())}")
    for name, (cls, inputs) in OPTIMIZERS.items()
    for options in inputs
]
CLASSES = [pytest.param(cls, inputs[0], id=name) for name, (cls, inputs) in OPTIMIZERS.items()]
every_case = pytest.mark.parametrize("cls, options", CASES)
every_class = pytest.mark.parametrize("cls, options", CLASSES)
RATE = 1e-2


def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))


DATA = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


def loss_of(module):
    return (module(DATA) - DATA[:, :3]).square().mean()


def train(module, optimizer, steps, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def trained(cls, options, steps=3, rate=RATE):
    module = model()
    optimizer = cls(module.parameters(), lr=rate, **options)
    train(module, optimizer, steps)
    return module, optimizer


def plain(value):
    """A value that can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# -- arguments -------------------------------------------------------------------------------------------------------


@every_class
def test_arguments_that_every_optimizer_refuses(cls, options):
    pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
    theirs = importlib.import_module("torch.testing._internal.common_optimizers")
    cases = theirs.get_error_inputs_for_all_optims("cpu", torch.float32)
    assert len(cases) >= 4
    for case in cases:
        assert case.error_on is theirs.OptimizerErrorEnum.CONSTRUCTION_ERROR
        given, params = case.optimizer_error_input.kwargs, case.optimizer_error_input.params
        error, words = case.error_type, case.error_regex
        if "Tensor lr" in words:
            words = "one element"  # our message uses these words
        elif "duplicate parameters" in words and cls is not MemSGD:
            error, words = ValueError, "more than once"  # torch.optim warns, ours refuse
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with pytest.raises(error, match=words):
                cls([torch.nn.Parameter(torch.ones(2, 2))] if params is None else params, **given)


@every_class
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", None, torch.tensor([0.1, 0.1])])
def test_rates_that_are_none(cls, options, value):
    if value is None and cls is not MemSGD:
        pytest.skip("None is an option that was not given: the default")
    with pytest.raises(ValueError, match="lr"):
        cls(model().parameters(), lr=value, **options)


@every_class
def test_complex_parameters_are_refused(cls, options):
    p = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="complex"):
        cls([p], **options).step()


@every_class
def test_an_empty_list_and_tensors_that_are_no_leaves(cls, options):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([], **options)
    with pytest.raises(ValueError, match="non-leaf"):
        cls([torch.nn.Parameter(torch.ones(2, 2)) * 2], **options)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        cls([1.0], **options)


@every_case
def test_repr_names_class_and_every_option(cls, options):
    optimizer = cls(model().parameters(), lr=RATE, **options)
    text = repr(optimizer)
    assert text.startswith(f"{cls.__name__} (") and f"lr: {RATE}" in text
    assert all(f"{name}: {value}" in text for name, value in options.items())


@every_class
def test_a_subclass_may_have_arguments_of_its_own(cls, options):
    class Mine(cls):
        def __init__(self, params, mine, **kwargs):
            super().__init__(params, **kwargs)
            self.mine = mine

    module, other = model(), model()
    one, two = Mine(module.parameters(), 7, lr=RATE, **options), cls(other.parameters(), lr=RATE, **options)
    train(module, one, 2)
    train(other, two, 2)
    assert one.mine == 7 and same(module, other)


# -- groups ----------------------------------------------------------------------------------------------------------


@every_case
def test_groups_with_rates_of_their_own(cls, options):
    """Each group moves as if it were alone with its rate; a rate of 0 moves nothing."""
    a, b = model(), model()
    one = cls([{"params": a[0].parameters()}, {"params": a[2].parameters(), "lr": 0.0}], lr=RATE, **options)
    before = [p.detach().clone() for p in a[2].parameters()]
    two = cls(b[0].parameters(), lr=RATE, **options)
    train(a, one, 3)
    train(b, two, 3)
    assert all(map(torch.equal, a[2].parameters(), before))
    assert same(a[0], b[0]) and not torch.equal(a[0].weight, model()[0].weight)
    assert one.param_groups[1]["lr"] == 0.0 and one.defaults["lr"] == RATE


@every_class
def test_groups_with_weight_decay_of_their_own(cls, options):
    a = model()
    optimizer = cls(
        [{"params": a[0].parameters(), "weight_decay": 0.5}, {"params": a[2].parameters()}],
        lr=RATE, weight_decay=0.0, **{k: v for k, v in options.items() if k != "weight_decay"},
    )  # fmt: skip
    for p in a.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in a.parameters()]
    for _ in range(3):
        optimizer.step()
    moved = [p.detach().norm() < q.norm() for p, q in zip(a.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]
    assert torch.equal(a[2].weight, before[2])


@every_case
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_that_is_a_tensor_is_the_number(cls, options, shape):
    a, _ = trained(cls, options, rate=float(torch.tensor(RATE)))
    rate = torch.full(shape, RATE)
    b, optimizer = trained(cls, options, rate=rate)
    # The product with the rate is rounded once more, or in another order. The roots of Sketchy magnify that: 9e-7 was
    # seen (MKL without AVX).
    rtol, atol = (1e-4, 2e-6) if cls is Sketchy else (1e-5, 1e-7)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)
    assert float(optimizer.param_groups[0]["lr"]) == float(rate)


@every_class
def test_added_groups_take_part(cls, options):
    a, b = model(), model()
    one = cls(a[0].parameters(), lr=RATE, **options)
    one.add_param_group({"params": list(a[2].parameters())})
    two = cls([{"params": b[0].parameters()}, {"params": b[2].parameters()}], lr=RATE, **options)
    train(a, one, 3)
    train(b, two, 3)
    assert same(a, b)
    with pytest.raises(ValueError, match="more than one parameter group"):
        one.add_param_group({"params": [a[0].weight]})
    assert len(one.param_groups) == 2


@every_class
def test_defaults_changed_by_hand_are_those_of_groups_added_later(cls, options):
    a = model()
    optimizer = cls(a[0].parameters(), lr=RATE, **options)
    optimizer.defaults["lr"] = 0.0
    optimizer.add_param_group({"params": list(a[2].parameters())})
    assert [group["lr"] for group in optimizer.param_groups] == [RATE, 0.0]


@every_class
def test_named_parameters_are_named_in_the_state_dict(cls, options):
    a, b = model(), model()
    one, two = cls(a.named_parameters(), lr=RATE, **options), cls(b.parameters(), lr=RATE, **options)
    train(a, one, 2)
    train(b, two, 2)
    assert same(a, b)
    names = [name for name, _ in a.named_parameters()]
    assert one.state_dict()["param_groups"][0]["param_names"] == names
    other = cls(model().named_parameters(), lr=RATE, **options)
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["param_names"] == names


# -- steps -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("scheduled", [None, lr_scheduler.StepLR, lr_scheduler.ReduceLROnPlateau])
def test_a_loop_goes_in_the_right_direction(cls, options, scheduled):
    """Also for parameters that are not contiguous."""
    for contiguous in (True, False):
        g = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*s, 2, generator=g) for s in ((10, 5), (10,), (5,)))
        weight, bias, x = ((t[..., 0].clone() if contiguous else t[..., 0]) for t in (weight, bias, x))
        params = [torch.nn.Parameter(weight), torch.nn.Parameter(bias)]
        assert params[0].is_contiguous() == contiguous
        optimizer = cls(params, lr=RATE, **options)
        scheduler = None if scheduled is None else scheduled(optimizer, *([10] if "Step" in scheduled.__name__ else []))

        def closure(params=params, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (params[0].mv(x) + params[1]).square().sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(15):
            loss = optimizer.step(closure)
            if scheduler is not None:
                scheduler.step(*([loss.item()] if scheduled is lr_scheduler.ReduceLROnPlateau else []))
        assert closure().item() > first if options.get("maximize") else closure().item() < first


@every_case
def test_parameters_without_a_gradient_are_left_alone(cls, options):
    module = model()
    optimizer = cls(module.parameters(), lr=RATE, **options)
    module[0].weight.requires_grad_(False)
    before = copy.deepcopy(module)
    optimizer.step()
    assert same(module, before) and not optimizer.state[module[0].weight]
    loss_of(module).backward()
    optimizer.step()
    assert torch.equal(module[0].weight, before[0].weight) and not torch.equal(module[2].weight, before[2].weight)


@every_case
def test_gradients_of_zero_move_nothing(cls, options):
    """Without weight decay. With it, only the decay moves them."""
    module = model()
    optimizer = cls(module.parameters(), lr=RATE, **{**options, "weight_decay": 0.0})
    before = copy.deepcopy(module)
    for _ in range(2):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same(module, before)


@every_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(cls, options, set_to_none):
    module, optimizer = trained(cls, options)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in module.parameters())
    # The same step whether the gradient accumulates into zeros, or is made anew.
    other, another = trained(cls, options)
    another.zero_grad()
    for m in (module, other):
        loss_of(m).backward()
    optimizer.step()
    another.step()
    assert same(module, other)


@every_class
def test_closures_run_with_gradients_enabled(cls, options):
    module, seen = model(), []
    optimizer = cls(module.parameters(), lr=RATE, **options)

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert seen == [True] and loss.item() == loss_of(model()).item()
    other, _ = trained(cls, options, 1)
    assert same(module, other) and optimizer.step() is None


@every_class
def test_the_scaler_of_float16_skips_and_unscales(cls, options):
    module, other = model(), model()
    optimizer, two = (cls(m.parameters(), lr=RATE, **options) for m in (module, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for broken in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(module)).backward()
        if broken:
            module[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if not broken:
            train(other, two, 1)
    # A power of two: scaled and unscaled without rounding.
    assert scaler.get_scale() == 2.0 and same(module, other)


# -- hooks -----------------------------------------------------------------------------------------------------------


@every_class
def test_hooks_of_steps_of_one_and_of_all_optimizers(cls, options):
    module, calls = model(), []
    optimizer = cls(module.parameters(), lr=RATE, **options)

    def note(name):
        return lambda opt, args, kwargs: calls.append((name, opt is optimizer))

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    train(module, optimizer, 1)
    # torch runs those of all optimizers around, or before, one's own, as its version has it.
    assert sorted(calls[:2]) == [("all before", True), ("before", True)]
    assert sorted(calls[2:]) == [("after", True), ("all after", True)]
    for handle in handles:
        handle.remove()
    train(module, optimizer, 1)
    assert len(calls) == 4


@every_class
def test_a_hook_before_the_step_may_change_its_arguments(cls, options):
    module = model()
    optimizer = cls(module.parameters(), lr=RATE, **options)
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 42), {}))
    assert optimizer.step(None) == 42
    handle.remove()
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    handle.remove()


@every_class
def test_steps_are_profiled_by_name(cls, options):
    _, optimizer = trained(cls, options, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.step#{cls.__name__}.step"] == [1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.zero_grad()
    assert [e.count for e in profile.key_averages() if e.key == f"Optimizer.zero_grad#{cls.__name__}.zero_grad"] == [1]


@every_class
def test_hooks_of_state_dicts(cls, options):
    _, optimizer = trained(cls, options)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda opt, saved: calls.append("post") or {**saved, "mine": 1})
    optimizer.register_state_dict_post_hook(lambda opt, saved: calls.append("first"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["pre", "first", "post"] and saved["mine"] == 1
    calls.clear()
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: calls.append("second"))

    def change(opt, state):
        calls.append("pre")
        groups = [{**group, "lr": 0.125} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(change, prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("post"))
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(len(opt.state)), prepend=True)
    optimizer.load_state_dict(saved)
    # Whoever looks afterwards finds the whole state.
    assert calls == ["pre", "second", 4, "post"]
    assert optimizer.param_groups[0]["lr"] == 0.125 and saved["param_groups"][0]["lr"] == RATE


# -- state -----------------------------------------------------------------------------------------------------------


@every_case
def test_state_is_not_empty_and_belongs_to_the_parameters(cls, options):
    module, optimizer = trained(cls, options, 1)
    assert set(optimizer.state) == set(module.parameters())
    assert all(optimizer.state[p] for p in module.parameters())
    assert optimizer.state["somebody else"] == {}  # a defaultdict, as torch's
    assert all(int(optimizer.state[p]["step"]) == 1 for p in module.parameters())


@every_case
def test_state_dicts_are_deterministic_and_not_changed_by_loading(cls, options):
    a, one = trained(cls, options)
    _, two = trained(cls, options)
    assert plain(one.state_dict()) == plain(two.state_dict())
    saved = copy.deepcopy(one.state_dict())
    before = plain(saved)
    c = copy.deepcopy(a)
    other = cls(c.parameters(), lr=0.5, **options)
    other.load_state_dict(saved)
    train(a, one, 3)
    train(c, other, 3)
    assert same(a, c) and plain(saved) == before
    assert plain(one.state_dict()) == plain(other.state_dict())


@every_case
def test_saved_with_weights_only_and_in_a_pickle(cls, options):
    module, optimizer = trained(cls, options)
    for protocol in (0, pickle.HIGHEST_PROTOCOL):
        copied, other = pickle.loads(pickle.dumps((module, optimizer), protocol))
        assert same(module, copied) and plain(other.state_dict()) == plain(optimizer.state_dict())
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert plain(loaded) == plain(optimizer.state_dict())
    fresh = copy.deepcopy(module)
    other = cls(fresh.parameters(), lr=0.5, **options)
    other.load_state_dict(loaded)
    train(module, optimizer, 2)
    train(fresh, other, 2)
    assert same(module, fresh)


@every_class
def test_deepcopy_copies_all_public_attributes_and_the_model_with_it(cls, options):
    module, optimizer = trained(cls, options)

    def public(one):
        return {name for name in one.__dict__ if not name.startswith("_")}

    copied, other = copy.deepcopy((module, optimizer))
    assert public(other) == public(optimizer) == {"defaults", "state", "param_groups"}
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], copied.parameters(), strict=True))
    train(module, optimizer, 3)
    train(copied, other, 3)
    assert same(module, copied)


@every_class
def test_a_saved_step_that_is_a_number(cls, options):
    """Like checkpoints of old versions of torch: it is read correctly or refused, and nothing is half loaded."""
    module, optimizer = trained(cls, options)
    saved = optimizer.state_dict()
    saved = {**saved, "state": {k: {**v, "step": float(v["step"])} for k, v in saved["state"].items()}}
    other_module = copy.deepcopy(module)
    other = cls(other_module.parameters(), lr=0.5, **options)
    before = plain(other.state_dict())
    try:
        other.load_state_dict(saved)
    except ValueError as error:
        assert "step" in str(error) and plain(other.state_dict()) == before
        return
    train(module, optimizer, 2)
    train(other_module, other, 2)
    assert same(module, other_module)


@every_class
@pytest.mark.parametrize("damage", ["groups", "parameters"])
def test_a_state_dict_of_another_model_is_refused(cls, options, damage):
    _, optimizer = trained(cls, options)
    saved = copy.deepcopy(optimizer.state_dict())
    if damage == "groups":
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
    else:
        saved["param_groups"][0]["params"].append(4)
    before = plain(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter"):
        optimizer.load_state_dict(saved)
    assert plain(optimizer.state_dict()) == before


@every_class
def test_an_optimizer_that_is_dropped_frees_its_state(cls, options):
    _, optimizer = trained(cls, options)
    kept = [weakref.ref(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert kept and all(r() is not None for r in kept)
    weak = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert weak() is None and all(r() is None for r in kept)


# -- schedulers ------------------------------------------------------------------------------------------------------


def chained(optimizer):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 3, cycle_momentum="betas" in o.defaults),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, 10, cycle_momentum="betas" in o.defaults),
    "SWALR": lambda o: swa_utils.SWALR(o, 1e-3, 3),
}


def test_every_scheduler_of_torch_is_here():
    theirs = {
        name for name, one in vars(lr_scheduler).items()
        if inspect.isclass(one) and issubclass(one, lr_scheduler.LRScheduler) and not name.startswith("_")
    }  # fmt: skip
    assert theirs - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


def scheduled():
    """The base class reads the rate, so three optimizers get all schedulers, and all optimizers get three of them."""
    for one in CLASSES:
        whole = one.values[0] in (CSAdam, CSMomentum, MemSGD)
        for scheduler in SCHEDULERS if whole else ("OneCycleLR", "SequentialLR", "ReduceLROnPlateau"):
            yield pytest.param(*one.values, scheduler, False, id=f"{scheduler}-{one.id}-number")
            if one.values[0] in (CSMomentum, MemSGD):
                yield pytest.param(*one.values, scheduler, True, id=f"{scheduler}-{one.id}-tensor")


@pytest.mark.parametrize(("cls", "options", "scheduler", "as_tensor"), [*scheduled()])
def test_steps_are_taken_with_the_scheduler_s_rate(cls, options, scheduler, as_tensor):
    """The run equals one whose groups get AdamW's values by hand; it is also resumed in the middle."""
    a, b = model(), model()
    rate = torch.tensor(RATE) if as_tensor else RATE
    one, two = cls(a.parameters(), lr=rate, **options), cls(b.parameters(), lr=RATE, **options)
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))], lr=RATE)
    if "betas" in one.defaults:
        theirs.param_groups[0]["betas"] = theirs.defaults["betas"] = one.defaults["betas"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AdamW takes no step here, of which schedulers warn
        mine, reference = SCHEDULERS[scheduler](one), SCHEDULERS[scheduler](theirs)
        rates = set()
        for step in range(8):
            # A number, of a tensor its own dtype's.
            expected = float(theirs.param_groups[0]["lr"])
            assert float(one.param_groups[0]["lr"]) == pytest.approx(expected, rel=1e-5, abs=1e-9)
            rates.add(round(expected, 9))
            for group in two.param_groups:
                group["lr"] = float(one.param_groups[0]["lr"])
                if "betas" in group:
                    assert one.param_groups[0]["betas"] == pytest.approx(theirs.param_groups[0]["betas"])
                    group["betas"] = one.param_groups[0]["betas"]
            train(a, one, 1)
            train(b, two, 1)
            for s in (mine, reference):
                s.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            if step == 3:  # from here on a copy of everything, from state dicts
                saved = copy.deepcopy((a.state_dict(), one.state_dict(), mine.state_dict()))
                a = model()
                a.load_state_dict(saved[0])
                one = cls(a.parameters(), lr=torch.tensor(RATE) if as_tensor else RATE, **options)
                mine = SCHEDULERS[scheduler](one)
                one.load_state_dict(saved[1])
                mine.load_state_dict(saved[2])
    assert len(rates) > 1
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        if as_tensor:  # the product with a tensor is rounded in another order
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(p, q)


@every_class
def test_averaged_models_and_swa(cls, options):
    module = model()
    optimizer = cls(module.parameters(), lr=RATE, **options)
    averaged, scheduler = swa_utils.AveragedModel(module), swa_utils.SWALR(optimizer, 1e-3, 2)
    mean, count = [torch.zeros_like(p) for p in module.parameters()], 4
    for _ in range(count):
        train(module, optimizer, 1, scheduler)
        averaged.update_parameters(module)
        for total, p in zip(mean, module.parameters(), strict=True):
            total += p.detach() / count
    for p, q in zip(averaged.module.parameters(), mean, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)  # the order of sums
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@every_class
def test_a_compiled_step_is_the_step(cls, options):
    torch._dynamo.reset()
    module, other = model(), model()
    one, two = (cls(m.parameters(), lr=RATE, **options) for m in (module, other))
    run = torch.compile(one.step, backend="eager")
    for _ in range(3):
        for m in (module, other):
            m.zero_grad()
            loss_of(m).backward()
        run()
        two.step()
    assert same(module, other)

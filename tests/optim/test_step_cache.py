"""The cache of a step on a CPU: it notices every change, is no state, and never changes a bit."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch

from sketch_plugins import SM3, CSAdam, Sketchy
from sketch_plugins.sharding.state_names import nested

pytest.importorskip("numba", reason="Numba is not installed")

SHAPES = [(70, 48), (40, 33), (5,), (24, 2, 8)]
OPTIMIZERS = [
    (CSAdam, {}), (CSAdam, {"preset": "lean"}), (SM3, {}), (SM3, {"preset": "ema"}),
    (CSAdam, {"preset": "lean", "lagged_rms": True}),
    (CSAdam, {"fused": False}), (SM3, {"fused": False, "update_clip": 1.0}), (Sketchy, {"rank": 4, "update_freq": 2}),
    (Sketchy, {"rank": 4, "fused": False, "statistics": "sample", "tail": "paper"}),
]  # fmt: skip


def build(cls, options, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    return params, cls(params, **{"fused": True, "min_compress_size": 0, **options})


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def step(optimizer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
        optimizer.step()


def everything(params, optimizer):
    for p in params:
        yield p.detach()
        yield from optimizer.state[p].values()


def nothing(params, optimizer):
    pass


def data_swapped(params, optimizer):
    params[0].data = params[0].detach() * 0.5


def parameter_replaced(params, optimizer):
    new = torch.nn.Parameter(params[0].detach() + 1)
    optimizer.state[new] = optimizer.state.pop(params[0])
    params[0] = new
    optimizer.param_groups[0]["params"][0] = new


def gradient_of_another_layout(params, optimizer):
    params[0].grad = params[0].grad.t().contiguous().t()


def gradient_in_the_same_place(params, optimizer):
    params[0].grad.neg_()


def sparse_gradient(params, optimizer):
    params[0].grad[3:] = 0
    params[0].grad = params[0].grad.to_sparse(1)


def no_gradient(params, optimizer):
    params[1].grad = None


def state_reloaded(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def state_replaced(params, optimizer):
    state = optimizer.state[params[0]]
    state.update({name: tensor * 2 for name, tensor in state.items() if name.startswith("second_moment.")})


def state_dropped(params, optimizer):
    optimizer.state.clear()


def counter_replaced(params, optimizer):
    optimizer.state[params[0]]["step"] = torch.tensor(7.0)


def counter_set_back(params, optimizer):
    optimizer.state[params[0]]["step"].zero_()


def measure_replaced(params, optimizer):
    if "rms" in optimizer.state[params[0]]:
        optimizer.state[params[0]]["rms.last"] = torch.tensor([3.0, 0.5])


def model_in_bfloat16(params, optimizer):
    for p in params:
        grad, p.grad = p.grad, None
        p.data = p.data.bfloat16()
        p.grad = grad.bfloat16()


def option(**values):
    def change(params, optimizer):
        optimizer.param_groups[0].update(values)

    change.__name__ = "_".join(values)
    return change


def group_added(params, optimizer):
    new = torch.nn.Parameter(torch.ones(20, 16))
    new.grad = torch.ones_like(new)
    params.append(new)
    optimizer.add_param_group({"params": [new], "lr": 0.5})


NAMES = ["cs_adam", "lean", "sm3", "ema", "lagged", "eager", "eager_sm3", "sketchy", "eager_sketchy"]
EVENTS = [
    nothing, data_swapped, parameter_replaced, gradient_of_another_layout, gradient_in_the_same_place, sparse_gradient,
    no_gradient, state_reloaded, state_replaced, state_dropped, counter_replaced, counter_set_back, measure_replaced,
    model_in_bfloat16, group_added,
    option(lr=0.3), option(lr=torch.tensor(0.3)), option(weight_decay=0.2), option(betas=(0.5, 0.6)),
    option(maximize=True), option(update_clip=0.2), option(scale_parameter=True), option(row_sparse="auto"),
    option(fused=False), option(eps=1e-3),
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda e: e.__name__)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=NAMES)
def test_whatever_changes_is_noticed(cls, options, event):
    """The same bits as without a cache, before and after a change."""
    results = []
    for remembers in (True, False):
        params, optimizer = build(cls, options)
        for seed in range(4):
            gradients(params, seed)
            if seed == 2:
                event(params, optimizer)
            if not remembers:
                optimizer._step_cache = None
            step(optimizer)
        results.append([t.clone() for t in everything(params, optimizer)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=NAMES)
def test_an_equal_step_is_remembered(cls, options, monkeypatch):
    params, optimizer = build(cls, options)
    looked, inner = [], cls._gradient
    monkeypatch.setattr(cls, "_gradient", lambda self, p, *rest: looked.append(p) or inner(self, p, *rest))
    for seed in range(3):
        gradients(params, seed)
        step(optimizer)
    # The first step with lagged_rms, which measures, is no repetition. SM3's cover of the n-d tensor is no kernel's:
    # where kernels are asked for, each step says so.
    refused = cls is SM3 and "fused" not in options
    assert len(looked) == len(SHAPES) * (2 if "lagged_rms" in options else 1) + 2 * refused


def test_an_error_leaves_all_as_it_was():
    params, optimizer = build(CSAdam, {})
    for seed in range(2):
        gradients(params, seed)
        step(optimizer)
    before = [t.clone() for t in everything(params, optimizer)]
    optimizer.param_groups[0]["block_size"] = 16
    with pytest.raises(ValueError, match="parameters' state was made with the old value"):
        step(optimizer)
    optimizer.param_groups[0]["block_size"] = 128
    optimizer.state[params[-1]]["first_moment.scales"] = torch.ones(3)
    with pytest.raises(ValueError, match="has 'scales' of shape"):
        step(optimizer)
    optimizer.state[params[-1]]["first_moment.scales"] = before[-2]
    optimizer.state[params[-1]]["step"] = torch.tensor(-1.0)
    with pytest.raises(ValueError, match=r"step of .* is tensor\(-1.\)"):
        step(optimizer)
    after = [t for t in everything(params[:-1], optimizer)]
    assert all(map(torch.equal, before, after))


def test_it_is_no_state_and_keeps_nothing_alive():
    params, optimizer = build(CSAdam, {})
    gradients(params, 0)
    step(optimizer)
    keys = set(pickle.loads(pickle.dumps(optimizer)).__dict__)
    assert "_step_cache" not in keys and "_step_cache" not in copy.deepcopy(optimizer).__dict__
    kept = [weakref.ref(p.grad) for p in params]
    kept += [weakref.ref(t) for p in params for t in nested(optimizer.state[p])["second_moment"].values()]
    optimizer.zero_grad()
    optimizer.state.clear()
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_copy_takes_the_same_steps():
    params, optimizer = build(CSAdam, {})
    gradients(params, 0)
    step(optimizer)
    both = copy.deepcopy((params, optimizer))
    for some, one in ((params, optimizer), both):
        for seed in (1, 2):
            gradients(some, seed)
            step(one)
    assert all(map(torch.equal, everything(params, optimizer), everything(*both)))


def test_another_number_of_threads():
    results, threads = [], torch.get_num_threads()
    try:
        for numbers in ((1, 1, 1), (1, 3, 2)):
            params, optimizer = build(CSAdam, {"preset": "lean"})
            for seed, n in enumerate(numbers):
                torch.set_num_threads(n)
                gradients(params, seed)
                step(optimizer)
            results.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("step", [None, 3, "x"])
def test_a_counter_that_is_replaced_is_refused_by_name(step):
    p = torch.nn.Parameter(torch.ones(64, 80))
    optimizer = CSAdam([p], fused=False)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    optimizer.state[p]["step"] = step
    with pytest.raises(ValueError, match=f"the present step of parameter 0 .* is {step!r}"):
        optimizer.step()

"""``nonfinite="deferred"``: the device takes a step with zeros, and the host learns of it before the next step."""

import copy
import gc
import math
import pickle
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sketch_plugins import InBackward, NumericsProbe, Sketchy
from sketch_plugins.memory.plan import plan

from .test_stacks import BERT, Operations, give_gradients, parameters

# Members of one stack, a tensor that is preconditioned along its shorter axis, a vector, and one with sparse gradients.
SHAPES = [(24, 16)] * 3 + [(16, 40), (300, 12), (20,), (40, 16)]
PLACES = {"a matrix": 1, "an embedding": 4, "a vector": 5, "a sparse gradient": 6}
LATE = "gradients of the last step were not finite"


KERNELS = ["eager", "numba", "triton_interpreter"]


@pytest.fixture(params=KERNELS)
def fused(request, monkeypatch):
    """The option ``fused`` with which these kernels are used."""
    if request.param == "triton_interpreter":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("kernels are interpreted where there is no GPU only")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif request.param == "numba":
        pytest.importorskip("numba")
    return request.param != "eager"


@pytest.fixture(autouse=True)
def quiet():
    """Some of these tensors have no kernel."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
        yield


def build(params, nonfinite, fused=False, **options):
    """Two groups that share stacks, with rates and weight decays of their own."""
    groups = [{"params": params[::2], "lr": 0.03, "weight_decay": 0.2}, {"params": params[1::2]}]
    given = {"lr": 0.02, "rank": 4, "update_freq": 3, "min_compress_size": 100, "weight_decay": 0.1, **options}
    return Sketchy(groups, nonfinite=nonfinite, fused=fused, **given)


def give(params, step, place=None, value=math.nan):
    """Gradients of a step, with one number that is not finite at a place of `SHAPES`, or all of them zeros."""
    give_gradients(params, step)
    rows = torch.tensor([[step, step + 9]])
    params[-1].grad = torch.sparse_coo_tensor(
        rows, params[-1].grad[:2], SHAPES[-1], is_coalesced=True, check_invariants=False
    )
    for p in params if place == "zeros" else ():
        (p.grad.values() if p.grad.is_sparse else p.grad).zero_()
    if place in range(len(SHAPES)):
        grad = params[place].grad
        (grad.values() if grad.is_sparse else grad).view(-1)[3] = value


def everything(optimizer):
    """Weights and state, in copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.clone() for p in params for t in [p.detach(), *optimizer.state[p].values()]]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


VARIANTS = {
    "default": ({}, torch.float32),
    "paper": ({"preset": "paper", "rank": 4}, torch.float32),
    "no graft": ({"graft": "none", "momentum_placement": "after"}, torch.float32),
    "of gradients": ({"input": "gradient", "graft": "sm3", "momentum_of": "all"}, torch.float32),
    "rate in a tensor": ({"lr": torch.tensor(0.02)}, torch.float32),
    "stochastic rounding": ({"stochastic_rounding": True}, torch.bfloat16),
    "24 bits": ({"weight_bits": 24}, torch.bfloat16),
    "32 bits": ({"weight_bits": 32}, torch.float16),
    "float64": ({"stack_bytes": 0}, torch.float64),
}


# The interpreter takes a second for each.
SHORT = ("default", "of gradients", "24 bits")
CASES = [(kernels, one) for kernels in KERNELS for one in VARIANTS if kernels != "triton_interpreter" or one in SHORT]


@pytest.mark.parametrize(("fused", "variant"), CASES, indirect=["fused"])
def test_with_finite_gradients_it_is_the_same_step(fused, variant):
    options, dtype = VARIANTS[variant]
    ends = []
    for nonfinite in ("error", "deferred"):
        params = parameters(SHAPES, dtype)
        optimizer = build(params, nonfinite, fused, **options)
        for step in range(5):
            give(params, step)
            optimizer.step()
        optimizer.check_last_step()
        ends.append(everything(optimizer))
    assert same(*ends) and optimizer.skipped_steps == 0


def against_zeros(place, value, fused, dtype=torch.float32, **options):
    """A step with a number that is not finite equals one with gradients, rate and weight decay of 0."""
    params, others = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer, reference = build(params, "deferred", fused, **options), build(others, "error", fused, **options)
    for step in range(2):
        for ps, one in ((params, optimizer), (others, reference)):
            give(ps, step)
            one.step()
    before = [p.detach().clone() for p in params]
    give(params, 2, place, value)
    optimizer.step()
    assert same([p.detach() for p in params], before)
    assert not any((p.grad.values() if p.grad.is_sparse else p.grad).any() for p in params)
    rates = [(group["lr"], group["weight_decay"]) for group in reference.param_groups]
    for group in reference.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    give(others, 2, "zeros")
    reference.step()
    for group, (lr, decay) in zip(reference.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = lr, decay
    after = everything(optimizer)
    assert same(after, everything(reference)) and all(torch.isfinite(t).all() for t in after)
    for ps in (params, others):
        give(ps, 3)
    with pytest.raises(ValueError, match=LATE):
        optimizer.step()
    assert same(after, everything(optimizer))  # the error has changed nothing
    for step in range(3, 6):
        for ps, one in ((params, optimizer), (others, reference)):
            give(ps, step)
            one.step()
    assert same(everything(optimizer), everything(reference))
    assert not same([p.detach() for p in params], before)


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_not_finite_is_one_of_zeros(place, fused):
    against_zeros(PLACES[place], -math.inf if place == "a vector" else math.nan, fused)


@pytest.mark.parametrize(("fused", "variant"), [case for case in CASES if case[1] != "default"], indirect=["fused"])
def test_it_is_one_of_zeros_with_any_options(fused, variant):
    options, dtype = VARIANTS[variant]
    against_zeros(1, math.nan, fused, dtype, **options)


@pytest.mark.parametrize("when", [1, 3], ids=["the first step", "a step with a solve"])
def test_any_step_may_be_one(when, fused):
    params = parameters(SHAPES)
    optimizer = build(params, "deferred_skip", fused)
    with pytest.warns(RuntimeWarning, match=LATE):
        for step in range(1, 6):
            give(params, step, 3 if step == when else None)
            optimizer.step()
            assert all(torch.isfinite(t).all() for t in everything(optimizer))
    assert optimizer.skipped_steps == 1 and {float(s["step"]) for s in optimizer.state.values()} == {5.0}


def test_steps_are_counted_and_warned_of_once():
    params = parameters(SHAPES)
    optimizer = build(params, "deferred_skip")
    seen = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        for step in range(6):
            give(params, step, 2 if step in (1, 3, 4) else None)
            optimizer.step()
            seen.append(len(caught))
    # Each is noticed before the step after it.
    assert seen == [0, 0, 1, 1, 1, 1] and LATE in str(caught[0].message)
    assert optimizer.skipped_steps == 3
    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    give(params, 6, 2)
    optimizer.step()
    assert optimizer.skipped_steps == 4


class Reads(TorchDispatchMode):
    """Notes the dtype of what the host reads. A fake tensor has no number: the answer is that five steps were taken."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.found.append(args[0].dtype)
            return 5.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


def test_what_the_host_reads():
    """On fake tensors, of which every read is an operation. With "error" it reads one number more: a truth value."""
    found = {}
    for nonfinite in ("error", "deferred"):
        with FakeTensorMode():
            params = [torch.nn.Parameter(torch.empty(shape)) for shape in [(24, 16)] * 2 + [(300, 12), (20,)]]
            # The sixth step has no solve, whose decompositions are read, too.
            optimizer = Sketchy(params, rank=4, fused=False, update_freq=1000, nonfinite=nonfinite, weight_decay=0.1)
            optimizer._numbers_are_answered = True
            for _ in range(3):
                for p in params:
                    p.grad = torch.empty_like(p)
                with Reads() as reads:
                    optimizer.step()
        found[nonfinite] = reads.found
    # The rest are step counters, and sums of the eager step that are read on a CPU only.
    assert found["error"] == [torch.bool, *found["deferred"]] and set(found["deferred"]) == {torch.float32}


def test_operations_of_bert_base():
    pytest.importorskip("numba", reason="without kernels each elementwise part is operations of its own")
    counts = {}
    for nonfinite in ("error", "deferred"):
        params = parameters(BERT)
        optimizer = Sketchy(params, chunk_size=1 << 24, stack_bytes=1 << 28, weight_decay=0.1, nonfinite=nonfinite)
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
        give_gradients(params, 5)
        with Operations() as operations:
            optimizer.step()
        counts[nonfinite] = operations.counts
    assert counts["deferred"][torch.ops.aten._local_scalar_dense] == 0
    assert counts["deferred"].total() <= counts["error"].total() + 8


def test_an_error_is_not_lost_at_the_end():
    params = parameters(SHAPES)
    optimizer = build(params, "deferred")
    for again in (optimizer.check_last_step, optimizer.state_dict):
        give(params, 0, 1)
        optimizer.step()
        with pytest.raises(ValueError, match=LATE):
            again()
        again()  # once
    give(params, 1)
    optimizer.step()
    # If the option has been changed, too.
    give(params, 2, 1)
    optimizer.step()
    for group in optimizer.param_groups:
        group["nonfinite"] = "error"
    give(params, 3)
    with pytest.raises(ValueError, match=LATE):
        optimizer.step()


def test_the_last_step_of_all_is_warned_of():
    params = parameters(SHAPES)
    optimizer = build(params, "deferred")
    give(params, 0, 1)
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=r"the very last step were not finite.*check_last_step"):
        del optimizer
        gc.collect()
    optimizer = build(params, "deferred")
    give(params, 0)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del optimizer
        gc.collect()


def test_copies_and_loaded_state_know_nothing_of_the_last_step():
    """A copy has the weights and the state of a step that moved nothing; the original raises the error."""
    params = parameters(SHAPES)
    optimizer = build(params, "deferred")
    give(params, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    give(params, 1, 1)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert same(everything(optimizer), everything(other))
        theirs = [p for group in other.param_groups for p in group["params"]]
        for p, q in zip(theirs, [p for group in optimizer.param_groups for p in group["params"]], strict=True):
            p.grad = torch.ones_like(q)
        other.step()
        other.check_last_step()
    with pytest.raises(ValueError, match=LATE):
        optimizer.check_last_step()
    give(params, 1, 1)
    optimizer.step()
    optimizer.load_state_dict(saved)  # the run goes back to an earlier step
    optimizer.check_last_step()
    give(params, 1)
    optimizer.step()


def test_groups_decide_for_themselves_what_happens_later():
    """An error if a group with "deferred" was the reason, and otherwise the step is counted."""
    for place, error in ((0, True), (1, False)):
        params = parameters([(24, 16)] * 2)
        optimizer = Sketchy([{"params": [params[0]], "nonfinite": "deferred"}, {"params": [params[1]]}],
                            rank=4, nonfinite="deferred_skip")  # fmt: skip
        before = [p.detach().clone() for p in params]
        give_gradients(params, 0)
        params[place].grad[0, 0] = math.inf
        optimizer.step()
        assert same([p.detach() for p in params], before)  # the whole step, in either case
        if error:
            with pytest.raises(ValueError, match=LATE):
                optimizer.check_last_step()
        else:
            with pytest.warns(RuntimeWarning, match=LATE):
                optimizer.check_last_step()
        assert optimizer.skipped_steps == (0 if error else 1)


def test_the_host_waits_for_all_groups_or_for_none():
    params = parameters([(24, 16)] * 2)
    words = r"'error' in parameter group 0 and 'deferred' in group 1"
    with pytest.raises(ValueError, match=words):
        Sketchy([{"params": [params[0]]}, {"params": [params[1]], "nonfinite": "deferred"}])
    optimizer = Sketchy([{"params": [params[0]]}])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [params[1]], "nonfinite": "deferred"})
    optimizer.add_param_group({"params": [params[1]]})
    optimizer.param_groups[1]["nonfinite"] = "deferred"
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert same([p.detach() for p in params], before) and not optimizer.state


def test_no_step_in_backward():
    optimizer = Sketchy([torch.nn.Parameter(torch.zeros(8, 8))], nonfinite="deferred")
    with pytest.raises(ValueError, match=r"nonfinite='deferred' would leave out the whole step.*nonfinite='error'"):
        InBackward(optimizer)


def expanded(g):
    return g[:1].expand(g.shape)


def in_inference_mode(g):
    with torch.inference_mode():
        return g.clone()


def of_a_graph(g):
    return g.requires_grad_() * 1.0


LAYOUTS = {
    "transposed": lambda g: g.t().contiguous().t(),
    "rows with gaps": lambda g: torch.cat([g, g], 1)[:, : g.shape[1]],
    "negated": lambda g: torch._neg_view(-g),
    "expanded": expanded,
    "inference": in_inference_mode,
    "a graph": of_a_graph,
    "sparse, not coalesced": lambda g: torch.sparse_coo_tensor(
        torch.tensor([[3, 0, 3]]), g[:3], g.shape, check_invariants=False
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(layout):
    """Those that cannot be multiplied in place stay as they are, and the step does not use them."""
    for finite in (True, False):
        ends = []
        for nonfinite in ("error", "deferred"):
            params = parameters([(24, 16)] * 2)
            optimizer = Sketchy(params, rank=4, nonfinite=nonfinite, weight_decay=0.1)
            for step in range(3):
                give_gradients(params, step)
                void = step == 1 and not finite
                if void and nonfinite == "error":
                    optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
                    params[0].grad.zero_(), params[1].grad.zero_()
                elif void:
                    params[0].grad[0, 1] = math.nan
                params[0].grad = LAYOUTS[layout](params[0].grad)
                if void and nonfinite == "deferred":
                    optimizer.step()
                    with pytest.raises(ValueError, match=LATE):
                        optimizer.check_last_step()
                else:
                    optimizer.step()
                optimizer.param_groups[0].update(lr=1e-3, weight_decay=0.1)
            ends.append(everything(optimizer))
        assert same(*ends)


@pytest.mark.parametrize(
    ("dtype", "size", "fine"),
    [
        (torch.float32, 1e16, True),
        (torch.float32, 1e18, False),
        (torch.float32, 3e38, False),
        (torch.float16, 6e4, True),  # a norm in float16 would be infinite
        (torch.bfloat16, 1e30, False),
        (torch.float64, 1e100, True),  # its own covariance holds it
        (torch.float64, 1e300, False),
    ],
    ids=str,
)
def test_norms_that_are_too_large(dtype, size, fine):
    """The same limits as with "error"."""
    for nonfinite in ("error", "deferred"):
        params = parameters([(24, 16)] * 2, dtype)
        optimizer = Sketchy(params, rank=4, nonfinite=nonfinite)
        for p in params:
            p.grad = torch.full_like(p, size)
        try:
            optimizer.step()
            optimizer.check_last_step()
        except ValueError as error:
            assert not fine and "not finite" in str(error)
        else:
            assert fine


def test_weights_that_were_held_are_not_called_stuck():
    matrix = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Sketchy([matrix], lr=1e-4, nonfinite="deferred_skip", rank=4)
    probe = NumericsProbe(optimizer, every=1, looks=1)
    matrix.grad = torch.ones_like(matrix)
    matrix.grad[0, 0] = math.inf
    optimizer.step()
    assert bool((matrix == 1).all()) and math.isnan(probe.share)
    with pytest.warns(RuntimeWarning, match=LATE):
        assert optimizer.skipped_steps == 1


def test_a_plan_counts_the_same_memory():
    """Gradients are multiplied in place, and a plan has no numbers to send."""
    found = plan(
        lambda: torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256), torch.nn.LayerNorm(256)),
        sample=lambda size: torch.empty(size, 256),
        loss=lambda model, x: model(x).square().mean(),
        optimizers=["sketchy:rank=8", "sketchy:rank=8,nonfinite=deferred"],
        device="cpu",
    )
    ordinary, deferred = found.rows
    assert ordinary.when == "step" and deferred.peak == pytest.approx(ordinary.peak, abs=64)


def test_in_inference_mode_and_outside_of_it():
    params = parameters([(24, 16)] * 2)
    optimizer = Sketchy(params, rank=4, nonfinite="deferred")
    for step in range(4):
        give_gradients(params, step)
        with torch.inference_mode(step % 2 == 0):
            optimizer.step()
    optimizer.check_last_step()
    assert all(torch.isfinite(p).all() for p in params)


def test_without_gradients_nothing_is_wrong():
    params = parameters([(24, 16)])
    optimizer = Sketchy(params, rank=4, nonfinite="deferred")
    optimizer.step()
    optimizer.check_last_step()
    assert not optimizer.state

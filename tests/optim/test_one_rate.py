"""AdamW's learning rate carries over: ``reference_rms``, presets, old checkpoints, rates that are far off."""

import copy
import pickle
import re
import warnings

import pytest
import torch

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSLion, CSRMSprop, Sketchy
from sketch_plugins.checkpoints.saved import SavedOptimizer
from sketch_plugins.optim.family import TYPICAL_RMS

from .conftest import parameters, train

SHAPES = [(20, 30), (9,), (5, 4, 3, 3)]
#: Those whose steps are relative to the weights, with what each needs for that.
RELATIVE = [
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"scale_parameter": True, "update_clip": 1.0}),
    (CSRMSprop, {"preset": "lean", "lagged_rms": True}),
    (CSAdagrad, {"preset": "lean"}),
    (SM3, {"preset": "ema"}),
    (Sketchy, {"rank": 4}),
    (Sketchy, {"rank": 4, "graft": "none"}),
    (Sketchy, {"rank": 4, "input": "gradient", "momentum_placement": "after", "momentum_of": "all"}),
]
each = pytest.mark.parametrize(
    ("cls", "options"), RELATIVE, ids=lambda v: v.__name__ if isinstance(v, type) else str(v)
)


def build(cls, options, lr, reference, dtype=torch.float64):
    params = parameters(SHAPES, dtype)
    options = {"weight_decay": 0.0, **options}
    return cls(params, lr=lr, reference_rms=reference, min_compress_size=64, **options), params


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_reference_divides_the_rate(cls, options, dtype):
    one, params = build(cls, options, 0.02, 0.25, dtype)
    two, others = build(cls, options, 0.08, 1.0, dtype)
    train(one, params, 5)
    train(two, others, 5)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)


@each
def test_weight_decay_is_that_of_the_rate_itself(cls, options):
    """``p <- (1 - lr * weight_decay) * p``, as AdamW has it: with gradients of 0 nothing else moves a parameter."""
    if cls is CSAdagrad:
        options = {**options, "decoupled_weight_decay": True}
    optimizer, params = build(cls, {**options, "weight_decay": 0.5}, 0.02, 0.25)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), 0.99 * old, rtol=1e-12, atol=0)


def test_which_names_take_adamw_s_rate_by_default():
    p = torch.nn.Parameter(torch.ones(4, 4))
    for cls, preset in (
        (CSAdam, "lean"),
        (CSRMSprop, "lean"),
        (SM3, "default"),
        (SM3, "ema"),
        (SM3, "exact"),
        (Sketchy, "default"),
    ):
        (group,) = cls([p], preset=preset).param_groups
        assert (group["lr"], group["scale_parameter"], group["reference_rms"]) == (1e-3, True, TYPICAL_RMS), cls
    (group,) = Sketchy([p], preset="paper").param_groups
    assert (group["lr"], group["scale_parameter"]) == (1e-3, False)
    for preset in ("paper", "lean"):
        (group,) = SM3([p], preset=preset).param_groups
        assert (group["lr"], group["scale_parameter"], group["betas"][1]) == (1e-2, False, 1.0)  # Adagrad's
    # A group's own preset brings its own reference.
    mixed = CSAdam([{"params": [p], "preset": "lean"}, {"params": [torch.nn.Parameter(torch.ones(2))]}])
    assert [g["reference_rms"] for g in mixed.param_groups] == [TYPICAL_RMS, 1.0]


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize(("cls", "options"), [RELATIVE[0], RELATIVE[2], RELATIVE[4], RELATIVE[5], RELATIVE[6]], ids=str)
def test_large_weights_take_steps_of_at_most_twenty_times_the_rate(cls, options, fused):
    """Weights of RMS 1, as those of a norm and of `torch.nn.Embedding`, and whatever is larger."""
    if fused is None:
        pytest.importorskip("numba", reason="needs Numba's kernels")
    for size, factor in ((1.0, 20.0), (1e4, 20.0), (0.017, 1.0), (1e-9, 1e-3 / 0.017)):
        p = torch.nn.Parameter(torch.full((256, 200), size))
        before = p.detach().clone()
        more = {} if cls is CSRMSprop else {"first_moment": "none"}
        optimizer = cls([p], lr=1e-3, fused=fused, weight_decay=0.0, min_compress_size=0, **more, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        rms = (p.detach() - before).double().square().mean().sqrt().item()
        assert rms <= 1.01e-3 * factor + 2 * size * 2**-24, (size, rms)
        assert rms >= 0.5e-3 * factor - 2 * size * 2**-24 or "graft" in options, (size, rms)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), "big"])
def test_what_is_no_reference_is_refused(value):
    with pytest.raises(ValueError, match=r"reference_rms="):
        CSAdam(parameters(SHAPES, torch.float32), preset="lean", reference_rms=value)


@each
def test_a_checkpoint_from_before_the_option_goes_on_with_rates_relative_to_the_weights(cls, options):
    old, params = build(cls, options, 0.05, 1.0)
    train(old, params, 3)
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        del group["reference_rms"]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    new = cls(others, min_compress_size=64, **options)
    new.load_state_dict(saved)
    assert new.param_groups[0]["reference_rms"] == 1.0 and new.param_groups[0]["lr"] == 0.05
    train(old, params, 2, first=3)
    train(new, others, 2, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert SavedOptimizer(saved["param_groups"]).groups[0]["reference_rms"] == 1.0


FAR = [
    (Sketchy, {"lr": 0.08}, r"lr=0.08 is 80 times the usual .* 0.001, .*reference_rms=1 "),
    (Sketchy, {"reference_rms": 1.0}, r"lr=0.001 is 59 times smaller than .*0.059, .*reference_rms=0.017"),
    (Sketchy, {"graft": "adagrad", "lr": 5e-5}, "second moments are sums"),
    (Sketchy, {"graft": "none", "lr": 5.0}, "may diverge"),
    (CSAdam, {"preset": "lean", "reference_rms": 1.0, "lr": 5e-5}, "relative to the weights"),
    (CSAdam, {"lr": 0.1}, "may diverge. Use a smaller learning rate"),
    (SM3, {"preset": "paper", "lr": 5e-5}, '"default" or "ema"'),
    (CSAdagrad, {"lr": 5e-5}, "Use a larger one"),
    (CSLion, {"lr": 1e-2}, "may diverge"),
]
USUAL = [
    (Sketchy, {}), (Sketchy, {"lr": 1e-6}), (Sketchy, {"preset": "paper"}),
    (Sketchy, {"graft": "none", "lr": 5.0, "update_clip": 0.0, "scale_parameter": False}),
    (Sketchy, {"reference_rms": 1.0, "lr": 0.08}), (CSAdam, {"preset": "lean", "lr": 5e-5}), (CSAdam, {"lr": 0.0}),
    (CSAdam, {"preset": "lean", "lr": 2e-5, "reference_rms": 0.02}), (SM3, {"preset": "ema", "lr": 5e-5}),
    (SM3, {"preset": "paper", "lr": 1e-3}), (SM3, {"preset": "paper"}), (SM3, {}), (SM3, {"lr": 1e-6}),
    (CSAdagrad, {}), (CSLion, {}),
]  # fmt: skip


def said_in_steps(optimizer, params, steps=3, schedule=lambda step: None):
    found = []
    for step in range(steps):
        schedule(step)
        for p in params:
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found += [str(w.message) for w in caught if "lr=" in str(w.message)]
    return found


@pytest.mark.parametrize(("cls", "options", "match"), FAR, ids=str)
def test_a_rate_that_is_far_from_the_usual_one_is_warned_of_once(cls, options, match):
    params = parameters(SHAPES, torch.float32)
    (message,) = said_in_steps(cls(params, **options), params)
    assert message.startswith("parameter group 0: lr=") and re.search(match, message), message


@pytest.mark.parametrize(("cls", "options"), USUAL, ids=str)
def test_usual_rates_are_not_warned_of(cls, options):
    params = parameters(SHAPES, torch.float32)
    assert said_in_steps(cls(params, **options), params) == []


def test_what_a_schedule_makes_of_a_rate_decides():
    """A small first rate causes no warning; a large one is found when it comes, whoever sets it in the group."""
    params = parameters(SHAPES, torch.float32)

    def rates(optimizer, values):
        return lambda step: [group.update(lr=values(step)) for group in optimizer.param_groups]

    warm_up = SM3(params, lr=1e-2, preset="paper")
    assert said_in_steps(warm_up, params, 3, rates(warm_up, lambda step: 1e-5 * step)) == []
    noam = CSAdam(params, lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(noam, lambda step: 1e-7 * (step + 1))
    assert said_in_steps(noam, params) == []
    late = Sketchy(params, lr=8e-2)
    found = said_in_steps(late, params, 9, rates(late, lambda step: 1e-2 * step))
    assert len(found) == 1 and "lr=0.04 is 40 times" in found[0]
    # A dummy step with a rate of 0, as torch.distributed.checkpoint takes one.
    dummy = Sketchy(params, lr=8e-2)
    found = said_in_steps(dummy, params, 3, rates(dummy, lambda step: 8e-2 * (step > 0)))
    assert len(found) == 1


def test_a_group_with_a_rate_of_0_stays_still_without_a_word():
    params = parameters(SHAPES, torch.float32)
    optimizer = SM3([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], preset="paper")
    assert said_in_steps(optimizer, params) == []


def test_a_group_that_is_added_is_looked_at_and_an_error_changes_nothing():
    params = parameters(SHAPES, torch.float32)
    optimizer = CSAdam(params[:1])
    assert said_in_steps(optimizer, params, 5) == []
    optimizer.add_param_group({"params": params[1:], "lr": 10.0})
    before = [p.detach().clone() for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="parameter group 1: lr=10 is 10000 times"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_the_rate_of_sm3_is_that_of_each_group_s_preset():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [p], "preset": "default"}, {"params": [q], "preset": "paper"}]
    for preset in ("default", "ema", "paper"):
        found = SM3(groups, preset=preset).param_groups
        assert [(g["lr"], g["betas"], g["update_clip"], g["scale_parameter"]) for g in found] == [
            (1e-3, (0.9, 0.999), 1.0, True), (1e-2, (0.9, 1.0), 0.0, False),
        ]  # fmt: skip
    assert [g["lr"] for g in SM3(groups, lr=0.5).param_groups] == [0.5, 0.5]
    # What counts is whether second moments are sums.
    assert SM3([p], betas=(0.9, 1.0)).param_groups[0]["lr"] == 1e-2
    assert SM3([p], betas=(0.9, 0.99), preset="paper").param_groups[0]["lr"] == 1e-3
    assert SM3([{"params": [p], "betas": (0.9, 1.0)}]).param_groups[0]["lr"] == 1e-2
    assert [g["lr"] for g in SM3([p], preset="ema").param_groups] == [1e-3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_copies_of_sm3_know_whether_a_learning_rate_was_given(copied):
    for given, rate in (({}, 1e-2), ({"lr": 0.5}, 0.5)):
        other = copied(SM3([torch.nn.Parameter(torch.ones(3))], **given))
        other.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "preset": "paper"})
        assert other.param_groups[1]["lr"] == rate


@each
def test_a_pickle_from_before_the_option_goes_on(cls, options):
    old, params = build(cls, options, 0.05, 1.0)
    train(old, params, 2)
    state = old.__getstate__()
    for values in (state["defaults"], *state["param_groups"]):
        values.pop("reference_rms")
    new = object.__new__(cls)
    new.__setstate__(state)
    train(new, params, 1, first=2)
    assert new.param_groups[0]["reference_rms"] == 1.0


def test_rates_in_tensors_and_in_numbers_share_a_stack():
    params = parameters([(20, 30), (20, 30)], torch.float32)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": [params[0]], "lr": torch.tensor(1e-3)}, {"params": [params[1]], "lr": 2e-3}]
    one = Sketchy(groups, rank=4)
    two = Sketchy([{"params": [others[0]], "lr": 1e-3}, {"params": [others[1]], "lr": 2e-3}], rank=4)
    train(one, params, 3)
    train(two, others, 3)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


class Network(torch.nn.Module):
    """A language model in small: an embedding, a block with a residual, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(96, 32), torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        self.head = torch.nn.Linear(64, 96, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=0.02)

    def forward(self, x):
        h = self.embed(x).flatten(-2)
        return self.head(self.norm(h + self.down(torch.nn.functional.gelu(self.up(h)))))


def loss_after(make, steps=150):
    """Of a model of texts in which two words say the next one, most of the time."""
    generator = torch.Generator().manual_seed(0)
    following = torch.randint(0, 96, (96, 96), generator=generator)
    torch.manual_seed(0)
    model = Network()
    optimizer = make(list(model.parameters()))

    def batch(count):
        x = torch.randint(0, 24, (count, 2), generator=generator)
        noise = torch.randint(0, 96, (count,), generator=generator)
        y = torch.where(torch.rand(count, generator=generator) < 0.1, noise, following[x[:, 0], x[:, 1]])
        return torch.nn.functional.cross_entropy(model(x), y)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 15, (steps - step) / 75)
        optimizer.zero_grad()
        batch(256).backward()
        optimizer.step()
    with torch.no_grad():
        return batch(4096).item()


def test_every_name_learns_at_adamw_s_rate():
    """A rate at which AdamW learns well. Quality at length: docs/benchmarks.md."""
    adamw = loss_after(lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.0))
    losses = {
        "cs_adam": loss_after(lambda params: CSAdam(params, lr=3e-3, weight_decay=0.0)),
        "lean": loss_after(lambda params: CSAdam(params, lr=3e-3, weight_decay=0.0, preset="lean")),
        "sketchy": loss_after(lambda params: Sketchy(params, lr=3e-3)),
        "sm3": loss_after(lambda params: SM3(params, lr=3e-3, preset="ema")),
    }
    assert adamw < 4.0 < torch.tensor(96.0).log(), adamw
    for name, loss in losses.items():
        assert loss < 1.03 * adamw, (name, losses, adamw)
    relative = loss_after(lambda params: Sketchy(params, lr=3e-3, reference_rms=1.0))
    assert relative > 1.05 * adamw  # the old behaviour: it hardly trained

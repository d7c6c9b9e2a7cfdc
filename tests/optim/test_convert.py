"""`convert_state`: a run that one of torch's optimizers began, continued by one of ours."""

import copy

import pytest
import torch

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum, CSRMSprop, Sketchy, convert_state, registry, state_report
from sketch_plugins.optim.convert import is_foreign
from sketch_plugins.optim.written import written_by
from sketch_plugins.sharding.blocks import Rows, matrix_shape
from sketch_plugins.sharding.state_names import nested

SHAPES = [(40, 33), (64, 70), (5,), (), (4, 3, 2, 2)]
TORCHS = {
    "AdamW": (lambda ps: torch.optim.AdamW(ps, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)),
    "Adagrad": (lambda ps: torch.optim.Adagrad(ps, lr=1e-2, weight_decay=0.1, initial_accumulator_value=0.3)),
    "SGD": (lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.7, weight_decay=0.1, nesterov=True)),
}
OURS = {
    "AdamW": (lambda ps, **kw: CSAdam(ps, lr=1.0, betas=(0.8, 0.99), weight_decay=0.1, preset="exact", **kw)),
    "Adagrad": (lambda ps: CSAdagrad(ps, lr=1.0, weight_decay=0.1, initial_accumulator_value=0.3, preset="exact")),
    "SGD": (lambda ps: CSMomentum(ps, lr=1.0, momentum=0.7, weight_decay=0.1, nesterov=True, preset="exact")),
}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def train(optimizer, params, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def trained(kind, steps=7, dtype=torch.float64):
    params = parameters(dtype)
    optimizer = TORCHS[kind](params)
    train(optimizer, params, 0, steps)
    return params, optimizer


@pytest.mark.parametrize("kind", TORCHS)
def test_dense_stores_continue_exactly(kind):
    params, theirs = trained(kind)
    ours = OURS[kind]([torch.nn.Parameter(p.detach().clone()) for p in params])
    ours.load_state_dict(convert_state(theirs.state_dict(), ours))
    assert ours.param_groups[0]["lr"] == 1e-2
    own = ours.param_groups[0]["params"]
    for p, q in zip(params, own, strict=True):
        dense = {"AdamW": ("exp_avg", "exp_avg_sq"), "Adagrad": (None, "sum"), "SGD": ("momentum_buffer", None)}[kind]
        for name, moment in zip(dense, ("first_moment", "second_moment"), strict=True):
            if name is not None:
                kept = ours.state[q][f"{moment}.dense"]
                assert torch.equal(kept.reshape(p.shape), theirs.state[p][name])
    train(theirs, params, 7, 15)
    train(ours, own, 7, 15)
    for p, q in zip(params, own, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)  # float64 rounding of another order of operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_optimizer_goes_on(name, dtype):
    params, adamw = trained("AdamW", dtype=dtype)
    cls = registry.get(name).cls
    options = {"min_compress_size": 0} if "min_compress_size" in cls.OPTIONS else {}
    ours = cls(params, lr=1e-3, **options)
    planned = state_report(ours).state_bytes
    ours.load_state_dict(convert_state(adamw.state_dict(), ours))
    assert state_report(ours).state_bytes == planned
    assert all(float(ours.state[p]["step"]) == 7 for p in params)
    assert ours.param_groups[0]["lr"] == 1e-2
    before = [p.detach().clone() for p in params]
    train(ours, params, 7, 10)
    for p, old in zip(params, before, strict=True):
        # A bfloat16 scalar may round a small step away.
        assert torch.isfinite(p).all() and (p.ndim == 0 or not torch.equal(p, old))


def whole(optimizer, p, moment):
    group = optimizer.param_groups[0]
    store = optimizer._stores(p, group)[0 if moment == "first_moment" else 1]
    rows, columns = matrix_shape(p.shape)
    dtype = torch.promote_types(p.dtype, torch.float32)
    return store.read(nested(optimizer.state[p])[moment], Rows(rows, torch.arange(rows), 0, columns), dtype).expand(
        rows, columns
    )


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (lambda ps: CSRMSprop(ps, betas=(0, 0.99), preset="exact"), None, lambda m, v, t: v),
        (
            lambda ps: CSAdam(ps, betas=(0.9, 0.999), preset="exact"),
            lambda m, v, t: m,
            lambda m, v, t: v,
        ),
        (lambda ps: CSMomentum(ps, momentum=0.3, preset="exact"), lambda m, v, t: m / 0.2, None),
        (lambda ps: CSAdagrad(ps, preset="exact"), None, lambda m, v, t: t * v / (1 - 0.99**t)),
    ],
)
def test_what_each_is_given(make, first, second):
    params, adamw = trained("AdamW")
    ours = make(params)
    ours.load_state_dict(convert_state(adamw.state_dict(), ours))
    for p in params:
        m, v, t = adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"], float(adamw.state[p]["step"])
        for moment, expected in (("first_moment", first), ("second_moment", second)):
            assert (moment in nested(ours.state[p])) == (expected is not None)
            if expected is not None:
                wanted = expected(m, v, t).reshape(matrix_shape(p.shape))
                torch.testing.assert_close(whole(ours, p, moment), wanted, rtol=1e-12, atol=0)


def test_kept_betas_convert_by_weight():
    # Gradients that are alike: an average with any betas is g times the sum of its weights.
    p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    adamw = torch.optim.AdamW([p], betas=(0.8, 0.99))
    g = torch.randn(6, 5, dtype=torch.float64)
    for _ in range(5):
        p.grad = g
        adamw.step()
    ours = CSAdam([p], betas=(0.9, 0.95), preset="exact")
    ours.load_state_dict(convert_state(adamw.state_dict(), ours, keep=["betas"]))
    assert ours.param_groups[0]["betas"] == (0.9, 0.95)
    torch.testing.assert_close(whole(ours, p, "first_moment"), g * (1 - 0.9**5), rtol=1e-12, atol=0)
    torch.testing.assert_close(whole(ours, p, "second_moment"), g * g * (1 - 0.95**5), rtol=1e-12, atol=0)


def test_sm3_is_an_upper_bound_of_the_squares_and_momentum_is_preconditioned():
    params, adamw = trained("AdamW")
    ours = registry.get("sm3").cls(params, first_moment="fp32", preset="paper")
    ours.load_state_dict(convert_state(adamw.state_dict(), ours))
    for p in params:
        v, t = adamw.state[p]["exp_avg_sq"], float(adamw.state[p]["step"])
        total = (t * v / (1 - 0.99**t)).reshape(matrix_shape(p.shape))
        assert (whole(ours, p, "second_moment") >= total * (1 - 1e-12)).all()
        # `betas` of SM3 are no Adam's: an average of its own.
        m = adamw.state[p]["exp_avg"] * (1 - 0.9**t) / (1 - 0.8**t)
        expected = m.reshape(matrix_shape(p.shape)) / total.sqrt()
        torch.testing.assert_close(whole(ours, p, "first_moment"), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper", "rank": 4},
        {"input": "gradient"},
        {"graft": "none"},
        {"graft": "sm3", "momentum_of": "all"},
    ],
    ids=str,
)
def test_sketchy_starts_without_covariances(options):
    params, adamw = trained("AdamW", dtype=torch.float32)
    ours = Sketchy(params, **options)
    ours.load_state_dict(convert_state(adamw.state_dict(), ours))
    p = params[1]
    held = nested(ours.state[p])["preconditioner"]
    assert all((held[key] == 0).all() for key in held if key.startswith(("values", "trace")))
    if options.get("input") == "gradient" and "preset" not in options:
        error = whole(ours, p, "first_moment") - adamw.state[p]["exp_avg"]
        assert error.norm() < 0.01 * adamw.state[p]["exp_avg"].norm()  # int8
    before = p.detach().clone()
    train(ours, params, 7, 20)
    assert torch.isfinite(p).all() and not torch.equal(p, before)


LAGGED = [{}, {"preset": "lean"}, {"first_moment": "fp32", "second_moment": "dense"}]


@pytest.mark.parametrize("options", LAGGED, ids=str)
def test_what_lagged_rms_goes_by(options):
    params, adamw = trained("AdamW")
    options = {"update_clip": 1.0, "scale_parameter": True, "betas": (0.8, 0.99), "lagged_rms": True, **options}
    ours = CSAdam(params, **options)
    before = [p.detach().clone() for p in params]
    ours.load_state_dict(convert_state(adamw.state_dict(), ours))
    for p in params:
        m, v, t = adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"], float(adamw.state[p]["step"])
        update = m / (1 - 0.8**t) if options.get("preset") != "lean" else (v / (1 - 0.99**t)).sqrt()
        update = update / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        wanted = torch.stack([update.square().mean().sqrt(), p.detach().square().mean().sqrt()])
        torch.testing.assert_close(ours.state[p]["rms.last"], wanted, rtol=1e-9, atol=0)
    train(ours, params, 7, 9)
    for p, old in zip(params, before, strict=True):
        assert torch.isfinite(p).all() and not torch.equal(p, old)


def test_schedules_come_along():
    params, adamw = trained("AdamW")
    torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=0.1, total_steps=10)
    adamw.param_groups[0]["tag"] = "decoder"
    group = convert_state(adamw.state_dict(), CSAdam(params, lr=7.0, eps=1e-3))["param_groups"][0]
    for key in ("lr", "initial_lr", "max_lr", "min_lr", "betas", "max_momentum", "tag"):
        assert group[key] == adamw.param_groups[0][key]
    assert (group["eps"], written_by(group)) == (1e-3, "CSAdam")
    kept = convert_state(adamw.state_dict(), CSAdam(params, lr=7.0), keep=["lr"])["param_groups"][0]
    assert kept["lr"] == 7.0 and "initial_lr" not in kept


def test_what_has_no_state_gets_none():
    params = parameters()
    adamw = TORCHS["AdamW"](params)
    assert convert_state(adamw.state_dict(), CSAdam(params))["state"] == {}
    params[0].grad = torch.ones_like(params[0])
    adamw.step()
    assert list(convert_state(adamw.state_dict(), CSAdam(params))["state"]) == [0]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adagrad"])
def test_the_kinds_are_told_apart(kind):
    params, theirs = trained(kind)
    assert is_foreign(theirs.state_dict())
    assert not is_foreign(CSAdam(params).state_dict())
    if kind == "SGD":
        with pytest.raises(ValueError, match="CSAdam needs averages of squared gradients"):
            convert_state(theirs.state_dict(), CSAdam(params))
    if kind == "Adagrad":
        ours = CSAdam(params, preset="exact")
        ours.load_state_dict(convert_state(theirs.state_dict(), ours))
        assert not whole(ours, params[0], "first_moment").any()


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def broken(state, change):
    state = copy.deepcopy(state)
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), "the state dict has no 'state'; it has param_groups"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "2 parameter groups, but this CSAdam has 1"),
        (lambda s: s["param_groups"][0]["params"].pop(), "has 4 parameters, but this CSAdam's has 5"),
        (
            lambda s: s["param_groups"][0].update(optimizer="SM3", preset="lean"),
            "written by SM3 and needs no conversion",
        ),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), r"exp_avg of parameter 0 .* has shape \(3,\)"),
        (lambda s: s["state"][1]["exp_avg"].fill_(float("nan")), "exp_avg of parameter 1 .* not finite"),
        (lambda s: s["state"][0].update(max_exp_avg_sq=1), "AMSGrad"),
        (
            lambda s: s["state"][2].update(mu_product=torch.zeros(5)),
            "contains exp_avg, exp_avg_sq, mu_product; expected",
        ),
        (
            lambda s: s["state"][2]["exp_avg_sq"].sub_(1e9),
            "exp_avg_sq of parameter 2 .* contains -1e.*; squares must be",
        ),
        (lambda s: s["state"].update({0: "x"}), "the state of parameter 0 .* is 'x'; expected a mapping"),
        (lambda s: s["state"].update({0: None}), "the state of parameter 0 .* is None; expected a mapping"),
        (
            lambda s: s["state"].update({0: torch.ones(3)}),
            "the state of parameter 0 .* is tensor.*; expected a mapping",
        ),
        (lambda s: s.update(param_groups={"lr": 0.1}), "'param_groups' of the state dict is a dict; expected a list"),
        (lambda s: s.update(state=None), "'state' of the state dict is a NoneType; expected a mapping"),
        (lambda s: s["param_groups"][0].update(params=None), "group 0 of the state dict has params=None"),
        *(
            (
                lambda s, odd=odd: s["state"][0].update(exp_avg=odd(s["state"][0]["exp_avg"])),
                f"exp_avg of parameter 0 .* {said}",
            )
            for odd, said in (
                (lambda t: t.to_sparse(), "with layout torch.sparse_coo"),
                (lambda t: t.to("meta"), "on the meta device"),
                (freed, "whose memory has been freed"),
                (lambda t: t.to(torch.complex64), "has dtype torch.complex64; expected floating point"),
                (lambda t: t.tolist(), "is .*; expected a tensor"),
            )
        ),
        *(
            (
                lambda s, step=step: s["state"][0].update(step=step),
                "the step of parameter 0 .*; expected one whole number >= 1",
            )
            for step in (torch.tensor(float("nan")), torch.tensor(0.0), torch.tensor(1.5), torch.ones(2), -1, "x")
        ),
        *(
            (lambda s, betas=betas: s["param_groups"][0].update(betas=betas), "betas=.*; expected two numbers")
            for betas in (None, (0.9,), (0.9, float("nan")), (0.9, 1.0))
        ),
        (lambda s: s["param_groups"][0].update(lr="x"), "lr='x' is not allowed"),
    ],
)
def test_errors(change, message):
    params, adamw = trained("AdamW")
    with pytest.raises(ValueError, match=message):
        convert_state(broken(adamw.state_dict(), change), CSAdam(params))


def test_dampening_that_leaves_no_gradients():
    params, sgd = trained("SGD")
    saved = broken(sgd.state_dict(), lambda s: s["param_groups"][0].update(dampening=1.0))
    with pytest.raises(ValueError, match=r"parameter 0 .* was written with dampening=1"):
        convert_state(saved, CSMomentum(params))


def test_wrong_arguments():
    params, adamw = trained("AdamW")
    for wrong in (None, [1], "x", adamw):
        with pytest.raises(ValueError, match=f"the state dict is a {type(wrong).__name__}; expected a mapping"):
            convert_state(wrong, CSAdam(params))
    with pytest.raises(TypeError, match="needs a sketched optimizer, not AdamW"):
        convert_state(adamw.state_dict(), adamw)
    with pytest.raises(ValueError, match="keep='eps' is not allowed"):
        convert_state(adamw.state_dict(), CSAdam(params), keep=["eps"])


def test_the_direction_has_to_be_the_same():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones_like(p)
    theirs = torch.optim.AdamW([p], maximize=True)
    theirs.step()
    with pytest.raises(ValueError, match="written with maximize=True, but this CSAdam has maximize=False"):
        convert_state(theirs.state_dict(), CSAdam([p]))
    assert convert_state(theirs.state_dict(), CSAdam([p], maximize=True))["param_groups"][0]["maximize"] is True


def test_messages_name_the_group_by_its_number():
    params = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    adamw = torch.optim.AdamW([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.randn_like(p)
    adamw.step()
    saved = adamw.state_dict()
    saved["state"][0]["exp_avg"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="parameter 0 of group 0"):
        convert_state(saved, CSAdam([{"params": [p]} for p in params]))

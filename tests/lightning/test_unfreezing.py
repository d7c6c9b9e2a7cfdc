"""Parameter groups that are added later have the module's hyperparameters and the strategy's options."""

import copy
import gc
import importlib
import pickle
import weakref

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim import lr_scheduler as schedules

from sketch_plugins import registry
from sketch_plugins.counterpart import counterpart

from .conftest import SMALL, data, equal, ours, same_state, strategy


def make(namespace, optimizer):
    """A module with a backbone and a head; ``optimizer(parameters)`` gets what is not frozen."""
    base = importlib.import_module(namespace).LightningModule

    class Module(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40))
            self.head = torch.nn.Linear(40, 3)

        def training_step(self, batch, index):
            return torch.nn.functional.mse_loss(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self):
            made = optimizer([p for p in self.parameters() if p.requires_grad])
            return {"optimizer": made, "lr_scheduler": schedules.ExponentialLR(made, 0.9)}

        def train_dataloader(self):
            return torch.utils.data.DataLoader(data(), batch_size=8)

    return Module()


def unfreezing(namespace):
    cls = importlib.import_module(f"{namespace}.callbacks").BackboneFinetuning
    return cls(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.5)


@pytest.fixture
def fit(trainer):
    def run(optimizer, strategy="auto", namespace="lightning.pytorch", epochs=3, ckpt_path=None, more=(), **options):
        module = make(namespace, optimizer)
        made = trainer(
            namespace, strategy=strategy, max_steps=-1, max_epochs=epochs, callbacks=[unfreezing(namespace), *more],
            **options,
        )  # fmt: skip
        made.fit(module, ckpt_path=ckpt_path)
        return module, made

    return run


# Optimizer of the module; our name; options of the strategy; arguments of a module that builds ours itself.
CASES = {
    "adamw": (
        lambda ps: AdamW(ps, lr=2e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
        "cs_adam",
        {},
        {"lr": 2e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adam": (
        lambda ps: Adam(ps, lr=2e-2, betas=(0.7, 0.9)),
        "cs_adam",
        {"compression": 0.2, "seed": 5, "first_moment": "bf16"},
        {"lr": 2e-2, "weight_decay": 0.0, "betas": (0.7, 0.9)},
    ),
    "a preset": (
        lambda ps: AdamW(ps, lr=2e-2),
        "cs_adam",
        {"preset": "lean"},
        {"lr": 2e-2, "weight_decay": 1e-2},
    ),
    "sgd": (
        lambda ps: SGD(ps, lr=2e-2, momentum=0.7, nesterov=True),
        "cs_momentum",
        {},
        {"lr": 2e-2, "momentum": 0.7, "nesterov": True, "weight_decay": 0.0},
    ),
    "sgd as adam": (
        lambda ps: SGD(ps, lr=2e-2, momentum=0.7),
        "cs_adam",
        {},
        {"lr": 2e-2, "betas": (0.7, 0.999), "weight_decay": 0.0},
    ),
    "adagrad": (
        lambda ps: Adagrad(ps, lr=2e-2, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1, eps=1e-6),
        "cs_adagrad",
        {},
        {"lr": 2e-2, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-6},
    ),
    "adamw as adagrad": (
        lambda ps: AdamW(ps, lr=2e-2, weight_decay=0.1),
        "cs_adagrad",
        {},
        {"lr": 2e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-8, "betas": (0.9, 0.999)},
    ),
    "sm3": (
        lambda ps: AdamW(ps, lr=2e-2, weight_decay=0.1),
        "sm3",
        {"betas": (0.8, 0.99)},
        {"lr": 2e-2, "weight_decay": 0.1, "betas": (0.8, 0.99)},
    ),
    "maximize": (
        lambda ps: AdamW(ps, lr=2e-3, maximize=True),
        "cs_adam",
        {},
        {"lr": 2e-3, "weight_decay": 1e-2, "maximize": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unfrozen_group_is_that_of_a_module_which_builds_the_optimizer_itself(case, fit):
    theirs, name, options, expected = CASES[case]
    options = {**SMALL, **options}
    one, made = fit(theirs, strategy("SketchStrategy", optimizer=name, optimizer_kwargs=options))
    other, reference = fit(ours(name, **{**options, **expected}))
    groups, wanted = made.optimizers[0].param_groups, reference.optimizers[0].param_groups
    assert len(groups) == 2 and {**made.optimizers[0].defaults} == {**reference.optimizers[0].defaults}
    for group, other_group in zip(groups, wanted, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other_group.items() if k != "params"
        }
        assert all(group[key] == value for key, value in {**expected, **options}.items() if key != "lr")
    assert equal(one, other)
    assert all(made.optimizers[0].state[p] for p in one.backbone.parameters())  # they were trained


def test_both_names_of_lightning(fit, namespace):
    theirs, name, _, expected = CASES["adamw"]
    _, made = fit(theirs, strategy("SketchStrategy", namespace, optimizer=name), namespace)
    for group in made.optimizers[0].param_groups:
        assert all(group[key] == value for key, value in expected.items() if key != "lr")


def run_and_resume(fit, tmp_path, cut, first, second):
    """The weights of a run that was cut after ``cut`` epochs, and the trainers of both halves."""
    _, one = fit(CASES["adamw"][0], first, epochs=cut)
    one.save_checkpoint(tmp_path / "cut.ckpt")
    module, two = fit(CASES["adamw"][0], second, ckpt_path=tmp_path / "cut.ckpt")
    return module, one, two


def sketched(**options):
    return strategy("SketchStrategy", optimizer_kwargs={**SMALL, "compression": 0.2, **options})


def test_a_run_that_unfreezes_after_it_was_resumed_is_the_whole_run_bit_for_bit(fit, tmp_path):
    whole, reference = fit(CASES["adamw"][0], sketched())
    resumed, _, again = run_and_resume(fit, tmp_path, 1, sketched(), sketched())
    assert equal(whole, resumed)
    one, other = reference.optimizers[0].state_dict(), again.optimizers[0].state_dict()
    assert same_state(one["state"], other["state"]) and len(other["param_groups"]) == 2
    for group, resumed_group in zip(one["param_groups"], other["param_groups"], strict=True):
        assert group.items() <= resumed_group.items()  # torch adds a key to the defaults when a state is loaded


def test_groups_that_the_callback_restores_keep_their_options(fit, tmp_path):
    """With AdamW as well, Lightning leaves the backbone frozen when a run is resumed after it was unfrozen."""
    _, one, two = run_and_resume(fit, tmp_path, 2, sketched(), sketched())
    for group, again in zip(one.optimizers[0].param_groups, two.optimizers[0].param_groups, strict=True):
        assert all(again[key] == value for key, value in group.items() if key not in ("params", "lr"))
    assert [p.shape for g in two.optimizers[0].param_groups for p in g["params"]] == [
        p.shape for g in one.optimizers[0].param_groups for p in g["params"]
    ]


def test_an_adamw_run_that_was_unfrozen_goes_on_with_a_warm_start(fit, tmp_path):
    """The callback restores AdamW's groups: they are converted, and exact stores continue as AdamW does."""
    warm = strategy("SketchStrategy", warm_start=True, optimizer_kwargs={"preset": "exact", "fused": False})
    resumed, one, again = run_and_resume(fit, tmp_path, 2, "auto", warm)
    assert type(one.optimizers[0]) is AdamW and len(one.optimizers[0].param_groups) == 2
    control, _, _ = run_and_resume(fit, tmp_path, 2, "auto", "auto")
    for group in again.optimizers[0].param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.8, 0.95), 1e-6)
        assert group["preset"] == "exact"
    # Three steps in float32, with another order of operations than in AdamW.
    for p, q in zip(control.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_steps_in_backward_take_those_that_were_unfrozen(fit):
    from sketch_lightning import OptimizerInBackward

    one, made = fit(CASES["adamw"][0], strategy("SketchStrategy", optimizer_kwargs=SMALL), more=[OptimizerInBackward()])
    other, _ = fit(CASES["adamw"][0], strategy("SketchStrategy", optimizer_kwargs=SMALL))
    assert equal(one, other) and len(made.optimizers[0].param_groups) == 2


# -- what a group that is added by hand may say ------------------------------------------------------------------------


def parameter():
    return torch.nn.Parameter(torch.ones(4, 4))


def test_later_groups_speak_the_language_of_the_optimizer_that_was_replaced():
    made = counterpart(SGD([parameter()], lr=0.1, momentum=0.7), "cs_adam", {})
    made.add_param_group({"params": parameter(), "momentum": 0.5, "fused": True, "foreach": False, "tag": "late"})
    late = made.param_groups[1]
    assert late["betas"] == (0.5, 0.999) and late["tag"] == "late" and len(late["params"]) == 1
    assert "momentum" not in late and late["fused"] is None  # an option of torch's kernels
    made.add_param_group({"params": (p for p in [parameter()]), "lr": 0.5, "compression": 0.25})
    assert (made.param_groups[2]["compression"], made.param_groups[2]["lr"]) == (0.25, 0.5)
    assert made.param_groups[2]["betas"] == (0.7, 0.999) and len(made.param_groups[2]["params"]) == 1

    named = counterpart(AdamW([("v", parameter())], lr=0.1), "cs_adam", {})
    named.add_param_group({"params": [("w", parameter())]})
    assert [group["param_names"] for group in named.param_groups] == [["v"], ["w"]]

    decoupled = counterpart(AdamW([parameter()], lr=0.1, weight_decay=0), "cs_adagrad", {})
    decoupled.add_param_group({"params": parameter(), "weight_decay": 0.1})
    assert decoupled.param_groups[1]["decoupled_weight_decay"] is True


def test_what_a_later_group_says_and_cannot_have_is_an_error():
    made = counterpart(Adam([parameter()], lr=0.1), "cs_adam", {})
    for said, message in (
        ({"weight_decay": 0.1}, "adds the weight decay to the gradient"),
        ({"amsgrad": True}, "amsgrad=True"),
        ({"compresion": 0.1}, "compression"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add_param_group({"params": parameter(), **said})
        assert len(made.param_groups) == 1
    with pytest.raises(TypeError, match="must be a dict"):
        made.add_param_group([parameter()])
    sgd = counterpart(SGD([parameter()], lr=0.1), "cs_rmsprop", {})
    with pytest.raises(ValueError, match="momentum"):
        sgd.add_param_group({"params": parameter(), "momentum": 0.9})


def test_a_default_that_no_group_has_yet_is_not_dropped_either():
    with pytest.raises(ValueError, match="amsgrad=True"):
        counterpart(AdamW([{"params": parameter(), "amsgrad": False}], lr=0.1, amsgrad=True), "cs_adam", {})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_the_same_defaults(copied):
    theirs = AdamW([parameter()], lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-5)
    made = counterpart(theirs, "cs_adam", {"compression": 0.25})
    other = copied(made)
    assert other.defaults.items() >= made.defaults.items()  # torch adds a key of its own
    other.add_param_group({"params": parameter()})
    assert other.param_groups[1]["compression"] == 0.25
    for key in ("lr", "weight_decay", "betas", "eps"):
        assert other.param_groups[1][key] == theirs.defaults[key]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_later_groups_of_copies_speak_the_same_language(copied):
    made = counterpart(SGD([parameter()], lr=0.1, momentum=0.9), "cs_adam", {"compression": 0.25})
    for other in (copied(made), copied(copied(made))):
        other.add_param_group({"params": parameter(), "momentum": 0.3, "compression": 0.5})
        assert other.param_groups[1]["betas"] == (0.3, 0.999) and "momentum" not in other.param_groups[1]
        assert [group["compression"] for group in other.param_groups] == [0.25, 0.5]
        with pytest.raises(ValueError, match="adds the weight decay to the gradient"):
            other.add_param_group({"params": parameter(), "weight_decay": 0.3})
        assert len(other.param_groups) == 2
    assert len(made.param_groups) == 1


@pytest.mark.parametrize("name", registry.names())
def test_the_translation_does_not_hold_the_optimizer(name):
    """An optimizer that is dropped is freed at once, with its weights, as AdamW is."""
    gc.disable()
    try:
        weight = parameter()
        made = counterpart(AdamW([weight], lr=0.1), name, {})
        gone = [weakref.ref(made), weakref.ref(weight)]
        del made, weight
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("name", registry.names())
def test_every_optimizer_takes_the_defaults_of_the_module(name):
    settings = {"lr": 0.1, "weight_decay": 0.3, "maximize": True}
    if registry.get(name).cls.ADAM_SETTINGS:
        settings |= {"betas": (0.8, 0.9), "eps": 1e-5}
    made = counterpart(AdamW([parameter()], **settings), name, {})
    made.add_param_group({"params": parameter()})
    first, late = ({k: v for k, v in group.items() if k != "params"} for group in made.param_groups)
    assert first == late and late.items() >= made.defaults.items()
    assert all(late[key] == settings[key] for key in ("lr", "weight_decay", "maximize"))


def test_the_optimizer_that_was_replaced_takes_no_groups(fit):
    kept = []

    def optimizer(params):
        kept.append(AdamW(params, lr=1e-2))
        return kept[0]

    fit(optimizer, "cs_adam", epochs=1)
    with pytest.raises(
        RuntimeError, match=r"this AdamW was replaced by CSAdam .*would not be trained.*self.optimizers"
    ):
        kept[0].add_param_group({"params": parameter()})
    with pytest.raises(RuntimeError, match=r"this AdamW was replaced by CSAdam .*would not be used"):
        kept[0].load_state_dict(kept[0].state_dict())

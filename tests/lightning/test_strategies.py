"""Strategies for one device: the weights are those of a module that builds the sketched optimizer itself."""

import importlib
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW
from torch.optim import lr_scheduler as schedules

from sketch_plugins import CSAdam, CSMomentum, registry
from sketch_plugins.counterpart import REPLACED, counterpart

from .conftest import SMALL, equal, make_module, ours, same_state, small, strategy


def single(optimizer):
    return lambda module: optimizer(module.parameters())


def adamw(module, **options):
    return AdamW(module.parameters(), **{"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1, **options})


def test_every_name_is_registered(namespace):
    found = importlib.import_module(f"{namespace}.strategies").StrategyRegistry
    for name in registry.names():
        for entry in (
            name, f"ddp_{name}", f"ddp_spawn_{name}", f"ddp_find_unused_parameters_true_{name}", f"fsdp_{name}",
            f"deepspeed_{name}", f"deepspeed_{name}_stage_1", f"deepspeed_{name}_stage_2",
            f"deepspeed_{name}_stage_3", f"deepspeed_{name}_stage_2_offload", f"deepspeed_{name}_stage_3_offload",
        ):  # fmt: skip
            assert found[entry]["init_params"]["optimizer"] == name
            assert found[entry]["strategy"].__module__.startswith("sketch_lightning.")
            bases = [cls.__module__ for cls in found[entry]["strategy"].__mro__]
            assert next(m for m in bases if not m.startswith("sketch_lightning.")).startswith(namespace)


def test_by_name(name, fit, namespace, log):
    source = Adam if registry.get(name).cls.ADAM_SETTINGS else SGD  # SM3 does not use Adam's betas
    one, made = fit(lambda m: source(m.parameters(), lr=1e-2), name, namespace)
    common = {"lr": 1e-2, "weight_decay": 0.0, **({"eps": 1e-8} if source is Adam else {})}
    other, _ = fit(lambda m: registry.get(name).cls(m.parameters(), **common), "auto", namespace)
    assert equal(one, other)
    assert type(made.optimizers[0]) is registry.get(name).cls
    said = [line for line in log() if line.startswith("sketch_lightning")]
    assert said == [f"sketch_lightning: replaced {source.__name__} by {registry.get(name).cls.__name__}(lr=0.01)"]


def test_options_are_carried_over(name, fit):
    kwargs = {**small(name), "seed": 3}
    if not registry.get(name).cls.ADAM_SETTINGS:
        kwargs["betas"] = (0.8, 0.99)
        kwargs["eps"] = 1e-7
    one, made = fit(lambda m: adamw(m, eps=1e-7), strategy("SketchStrategy", optimizer=name, optimizer_kwargs=kwargs))
    decoupled = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in registry.get(name).cls.OPTIONS else {}
    theirs = ours(name, lr=1e-2, betas=(0.8, 0.99), eps=1e-7, weight_decay=0.1, seed=3, **decoupled)
    other, _ = fit(lambda m: theirs(m.parameters()))
    assert equal(one, other)
    assert same_state(made.optimizers[0].state_dict()["state"], _.optimizers[0].state_dict()["state"])


def groups(module):
    net = module.net
    return [
        {"params": [*net[0].named_parameters()], "lr": 3e-2, "weight_decay": 0.2, "tag": "first"},
        {"params": [("w", net[2].weight), ("b", net[2].bias)]},
        {"params": [*net[3].named_parameters()], "betas": (0.7, 0.9), "eps": 1e-6},
    ]


def test_param_groups(fit):
    def make(cls, **options):
        return lambda m: cls(groups(m), lr=1e-2, weight_decay=0.0, **options)

    one, made = fit(make(AdamW), strategy("SketchStrategy", optimizer_kwargs=SMALL))
    other, reference = fit(make(CSAdam, **SMALL))
    assert equal(one, other)
    for group, expected in zip(made.optimizers[0].param_groups, reference.optimizers[0].param_groups, strict=True):
        assert group["param_names"] == expected["param_names"] and group.get("tag") == expected.get("tag")
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}


def one_cycle(optimizer):
    return schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=40)


SCHEDULES = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 5),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "one cycle": one_cycle,
    "cyclic": lambda o: schedules.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=True),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.7)], [3]
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.1, total_iters=2), schedules.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules(kind, fit):
    """Rates in every step are AdamW's own, and weights are those of a module that builds the sketched optimizer."""

    def make(optimizer):
        def configure(module):
            made = optimizer(module.parameters(), lr=1e-2)
            return {"optimizer": made, "lr_scheduler": {"scheduler": SCHEDULES[kind](made), "interval": "step"}}

        return configure

    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="torch.optim")  # such as those about the order of steps
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        one, made = fit(make(AdamW), strategy("SketchStrategy", optimizer_kwargs=SMALL), max_steps=9)
    other, reference = fit(make(ours("cs_adam")), max_steps=9)
    plain, _ = fit(make(AdamW), max_steps=9)
    assert one.rates == plain.rates and len({r[0][0] for r in one.rates}) > 1
    assert equal(one, other)
    assert made.optimizers[0].param_groups[0]["betas"] == reference.optimizers[0].param_groups[0]["betas"]
    assert made.lr_scheduler_configs[0].scheduler.optimizer is made.optimizers[0]


def test_reduce_on_plateau(fit):
    def make(optimizer):
        def configure(module):
            made = optimizer(module.parameters(), lr=1e-2)
            plateau = schedules.ReduceLROnPlateau(made, patience=0, threshold=10.0, factor=0.5)
            options = {"scheduler": plateau, "interval": "step", "monitor": "loss"}
            return {"optimizer": made, "lr_scheduler": options}

        return configure

    one, _ = fit(make(AdamW), strategy("SketchStrategy", optimizer_kwargs=SMALL))
    other, _ = fit(make(ours("cs_adam")))
    assert equal(one, other) and one.rates == other.rates
    assert one.rates[-1][0][0] < 1e-3


def test_cycled_momentum_of_another_name(fit):
    def make(optimizer):
        def configure(module):
            made = optimizer(module.parameters())
            return {"optimizer": made, "lr_scheduler": {"scheduler": one_cycle(made), "interval": "step"}}

        return configure

    one, made = fit(make(lambda ps: Adam(ps, lr=1e-2)), "cs_momentum")
    assert 0.8 < made.optimizers[0].param_groups[0]["momentum"] < 0.95 and len(one.rates) == 6
    _, made = fit(make(lambda ps: Adam(ps, lr=1e-2)), "sm3")
    beta1, beta2 = made.optimizers[0].param_groups[0]["betas"]
    assert 0.85 < beta1 < 0.95 and beta1 != 0.9 and beta2 == 0.999


def test_several_optimizers_by_hand(fit, log):
    def make(adam, other):
        def configure(module):
            first, second = adam(module.net[:2].parameters()), other(module.net[2:].parameters())
            module.kept = second
            return [first, second], [schedules.ExponentialLR(first, 0.9), schedules.StepLR(second, 2)]

        return configure

    theirs = make(lambda ps: AdamW(ps, lr=1e-2), lambda ps: SGD(ps, lr=1e-2, momentum=0.8))
    one, made = fit(theirs, strategy("SketchStrategy", optimizer_kwargs=SMALL), manual=True, max_steps=8)
    mine = make(ours("cs_adam", lr=1e-2), ours("cs_adam", lr=1e-2, betas=(0.8, 0.999), weight_decay=0.0))
    other, _ = fit(mine, manual=True, max_steps=8)
    assert equal(one, other) and one.rates == other.rates
    # A module that kept the old one would train with it.
    assert one.kept is made.optimizers[1] and type(one.kept) is CSAdam
    assert sum(line.startswith("sketch_lightning: replaced AdamW by") for line in log()) == 1


class Pair(NamedTuple):
    optimizer: object
    scheduler: object


@pytest.mark.parametrize("kept", ["attribute", "list", "tuple", "dict", "named"])
def test_a_scheduler_that_the_module_keeps(kept, fit):
    """Optimizers and schedulers that are not returned are found in attributes, lists, tuples and dicts."""
    places = {
        "attribute": lambda o, s: s,
        "list": lambda o, s: [o, [s]],
        "tuple": lambda o, s: ((o, s), 1),
        "dict": lambda o, s: {"o": o, "s": [{"s": s}]},
        "named": Pair,
    }
    found = {
        "attribute": lambda kept, o: (o, kept),
        "list": lambda kept, o: (kept[0], kept[1][0]),
        "tuple": lambda kept, o: kept[0],
        "dict": lambda kept, o: (kept["o"], kept["s"][0]["s"]),
        "named": lambda kept, o: kept,
    }

    def make(cls):
        def configure(module):
            optimizer = cls(module.parameters(), lr=1e-2)
            module.kept = places[kept](optimizer, schedules.StepLR(optimizer, 1, 0.5))

            def training_step(batch, batch_idx):
                optimizer, scheduler = found[kept](module.kept, module.optimizers())
                optimizer.zero_grad()
                module.manual_backward(module.loss(batch))
                optimizer.step()
                scheduler.step()

            module.training_step = training_step
            return optimizer

        return configure

    options = {"manual": True, "max_epochs": 2, "max_steps": -1}  # Lightning counts only the steps of its own wrapper
    one, made = fit(make(AdamW), strategy("SketchStrategy", optimizer_kwargs=SMALL), **options)
    other, _ = fit(make(ours("cs_adam")), **options)
    assert equal(one, other) and one.rates == other.rates == [[[1e-2 * 0.5**n]] for n in range(1, 7)]
    optimizer, scheduler = found[kept](one.kept, made.optimizers[0])
    assert scheduler.optimizer is made.optimizers[0] and type(scheduler.optimizer) is CSAdam
    assert getattr(optimizer, "_optimizer", optimizer) is made.optimizers[0]


def test_a_replaced_optimizer_steps_no_more(fit):
    def configure(module):
        optimizer = AdamW(module.parameters(), lr=1e-2)
        module.step = lambda: optimizer.step()
        module.training_step = lambda batch, batch_idx: (module.manual_backward(module.loss(batch)), module.step())[0]
        return optimizer

    with pytest.raises(RuntimeError, match=r"this AdamW was replaced by CSAdam .*self.optimizers\(\)"):
        fit(configure, "cs_adam", manual=True, max_epochs=1, max_steps=-1)


def cpu_scaler():
    from lightning.pytorch.plugins import MixedPrecision

    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "scaler"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_precision_accumulation_and_clipping(precision, accumulate, clip, fit):
    def run(*args, **kwargs):
        options = cpu_scaler() if precision == "scaler" else {"precision": precision}
        return fit(*args, max_steps=4, accumulate_grad_batches=accumulate, gradient_clip_val=clip, **options, **kwargs)

    one, made = run(adamw, strategy("SketchStrategy", optimizer_kwargs=SMALL))
    theirs = ours("cs_adam", lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1)
    other, _ = run(single(theirs))
    assert equal(one, other) and not equal(one.net, make_module("lightning.pytorch", adamw).net.to(one.dtype))
    assert made.optimizers[0].state_dict()["state"][0]["step"] == 4
    assert one.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


def test_left_alone(fit, log):
    one, made = fit(single(ours("sm3", lr=1e-2)), "cs_adam")
    other, _ = fit(single(ours("sm3", lr=1e-2)))
    assert equal(one, other) and type(made.optimizers[0]).__name__ == "SM3"
    assert "sketch_lightning: SM3 comes from the module and was not replaced" in log()


def test_without_optimizer(fit):
    module, _ = fit(lambda m: None, "cs_adam")
    assert equal(module.net, make_module("lightning.pytorch", adamw).net)


class OwnAdam(Adam):
    pass


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (
            lambda ps: torch.optim.Adadelta(ps),
            "cs_adam",
            "Adadelta has no .* counterpart; only Adam, AdamW",
        ),
        (lambda ps: OwnAdam(ps), "cs_adam", "OwnAdam has no sketched counterpart"),
        (lambda ps: torch.optim.RMSprop(ps), "cs_rmsprop", "RMSprop has no sketched counterpart"),
        (lambda ps: AdamW(ps, amsgrad=True), "cs_adam", r"AdamW\(amsgrad=True\) cannot be transferred to cs_adam"),
        (
            lambda ps: Adam(ps, weight_decay=0.1),
            "cs_adam",
            r"Adam\(weight_decay=0.1\) adds the weight decay to the gradient",
        ),
        (lambda ps: AdamW(ps, betas=(0.9, 0.95)), "sm3", r"betas=\(0.9, 0.95\)\) cannot .* sm3, whose betas are"),
        (lambda ps: SGD(ps, dampening=0.5), "cs_momentum", "dampening=0.5"),
        (lambda ps: SGD(ps, momentum=0.9), "cs_rmsprop", r"SGD\(momentum=0.9\) cannot .*, which keeps no momentum"),
        (lambda ps: SGD(ps, momentum=0.9, nesterov=True), "cs_adam", r"SGD\(nesterov=True\)"),
        (lambda ps: Adagrad(ps, lr_decay=0.1), "cs_adam", r"Adagrad\(lr_decay=0.1\) cannot be transferred to cs_adam"),
    ],
)
def test_what_has_no_counterpart(make, name, message):
    with pytest.raises(ValueError, match=message):
        counterpart(make([torch.nn.Parameter(torch.ones(3))]), name, {})


def test_the_error_reaches_fit(fit):
    with pytest.raises(ValueError, match=r"torch.optim.adadelta.Adadelta has no sketched counterpart"):
        fit(single(torch.optim.Adadelta), "cs_adam")


@pytest.mark.parametrize(
    ("make", "name", "options", "expected"),
    [
        (lambda ps: Adam(ps, weight_decay=0.1), "cs_adam", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        (
            lambda ps: SGD(ps, momentum=0.5, nesterov=True, weight_decay=0.1), "cs_momentum", {},
            {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
        ),
        (lambda ps: SGD(ps), "cs_momentum", {}, {"momentum": 0, "nesterov": False}),
        (lambda ps: SGD(ps, momentum=0.5), "sm3", {"preset": "ema"}, {"betas": (0.5, 0.999)}),
        (lambda ps: SGD(ps, momentum=0.5), "sm3", {}, {"betas": (0.5, 0.999), "scale_parameter": True}),
        (lambda ps: Adagrad(ps), "sm3", {}, {"lr": 1e-2, "betas": (0.9, 1.0), "scale_parameter": False}),
        (lambda ps: Adagrad(ps), "sm3", {"preset": "ema"}, {"betas": (0.9, 0.999), "scale_parameter": True}),
        (lambda ps: SGD(ps), "sketchy", {}, {"betas": (0.9, 0.999), "nesterov": True}),
        (
            lambda ps: AdamW(ps, weight_decay=0.1), "cs_adagrad", {},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
        ),
        (
            lambda ps: Adagrad(ps, lr_decay=0.1, eps=1e-3, initial_accumulator_value=0.5), "cs_adagrad", {},
            {"lr_decay": 0.1, "eps": 1e-3, "initial_accumulator_value": 0.5},
        ),
        (lambda ps: AdamW(ps, betas=(0.7, 0.9), maximize=True), "cs_momentum", {}, {"momentum": 0.7, "maximize": True}),
        (lambda ps: AdamW(ps, lr=torch.tensor(0.5)), "cs_adam", {"preset": "lean"}, {"lr": torch.tensor(0.5)}),
    ],
)  # fmt: skip
def test_hyperparameters(make, name, options, expected):
    (group,) = counterpart(make([torch.nn.Parameter(torch.ones(3))]), name, options).param_groups
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "unknown optimizer 'adam'. Did you mean 'cs_adam'.* The optimizers are cs_adam"),
        ({"optimizer_kwargs": {"compresion": 0.1}}, "no option 'compresion'. Did you mean 'compression'"),
        ({"optimizer_kwargs": {"compression": 2}}, "compression=2 is not allowed"),
        ({"optimizer_kwargs": {"lr": 0.1}}, "optimizer_kwargs sets lr=0.1, but the learning rate is set by"),
        ({"optimizer_kwargs": {"fused": True, "compile": True}}, "fused=True and compile=True are two ways"),
        ({"warm_start": "yes"}, "warm_start='yes' is not one of True, False"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        strategy("SketchStrategy", **options)


def test_one_device_means_one(trainer):
    with pytest.raises(ValueError, match="trains on one device, but devices=2 was requested: use strategy='ddp_sm3'"):
        trainer(strategy="sm3", devices=2)


def test_options_may_be_text():
    made = strategy("SketchStrategy", optimizer_kwargs={"compression": "0.1", "betas": "0.9:0.95"})
    assert made._sketch_options == {"compression": 0.1, "betas": (0.9, 0.95)}


def test_replaced_are_exactly_torchs():
    assert set(REPLACED) == {Adam, AdamW, SGD, Adagrad}


def test_a_second_fit_with_a_kept_optimizer(trainer):
    def keep(module):
        if not hasattr(module, "kept"):
            module.kept = AdamW(module.parameters(), lr=1e-2)
        return module.kept

    module = make_module("lightning.pytorch", keep)
    trainer(strategy="auto").fit(module)
    with pytest.raises(ValueError, match="To convert it, use"):
        trainer(strategy="cs_adam").fit(module)
    theirs = module.kept
    trainer(strategy=strategy("SketchStrategy", warm_start=True)).fit(module)
    assert type(module.kept) is CSAdam and theirs is not module.kept
    assert module.kept.state_dict()["state"][0]["step"] == 12


def test_two_namespaces_do_not_mix():
    assert strategy("SketchStrategy").__class__ is not strategy("SketchStrategy", "pytorch_lightning").__class__
    import sketch_lightning
    import sketch_lightning.lightning_pytorch as own

    assert sketch_lightning.SketchDDPStrategy is own.SketchDDPStrategy
    with pytest.raises(AttributeError, match="no attribute 'SketchXStrategy'"):
        _ = sketch_lightning.SketchXStrategy


@pytest.mark.parametrize("way", ["import", "hook", "class"])
def test_imports_are_lazy(way, tmp_path):
    """The names are registered for code that imports Lightning later, also if `sketch-plugins run` calls in between."""
    if way == "class":  # its module imports Lightning itself
        program = (
            "from sketch_lightning.pytorch_lightning import SketchStrategy, SketchCleaning\n"
            "from pytorch_lightning.strategies import StrategyRegistry\n"
            "assert StrategyRegistry['sm3']['strategy'] is SketchStrategy\n"
        )
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    program = (
        f"{'import sketch_lightning' if way == 'import' else HOOK}\n"
        "import sys\n"
        "assert not {'lightning.pytorch', 'pytorch_lightning'} & set(sys.modules), 'imported at once'\n"
        "if sys.argv[1] == 'import': sys.exit()\n"  # with Lightning it is in every test here
        "from pytorch_lightning import Trainer\n"
        "trainer = Trainer(strategy='ddp_sm3', accelerator='cpu', logger=False, enable_checkpointing=False)\n"
        "import sketch_lightning\n"
        "assert type(trainer.strategy) is sketch_lightning.SketchDDPStrategy\n"
        "assert 'lightning.pytorch' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, way]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HOOK = (
    "from sketch_plugins.import_hooks import when_imported\n"
    "when_imported('pytorch_lightning.strategies', lambda: __import__('sketch_lightning').register())"
)


def test_momentum_is_a_counterpart_of_sgd(fit):
    one, _ = fit(lambda m: SGD(m.parameters(), lr=0.1, momentum=0.9), "cs_momentum")
    other, _ = fit(lambda m: CSMomentum(m.parameters(), lr=0.1, momentum=0.9))
    assert equal(one, other)

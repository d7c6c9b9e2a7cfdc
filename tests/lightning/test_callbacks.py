"""Figures in the logs, samples and cleanings across checkpoints."""

import importlib
import math
import pickle

import pytest
import torch
from torch.optim import AdamW

import sketch_lightning
from sketch_plugins import CSAdam, state_report
from sketch_plugins.memory.probe import SecondMomentProbe

from .conftest import SMALL, equal, make_module, ours, same_state, strategy


def callback(kind, namespace="lightning.pytorch", **options):
    module = importlib.import_module(f"sketch_lightning.{namespace.replace('lightning.pytorch', 'lightning_pytorch')}")
    return getattr(module, kind)(**options)


def adamw(module):
    return AdamW(module.parameters(), lr=1e-2)


def recorder(namespace="lightning.pytorch"):
    """A logger that stores all that it gets."""
    base = importlib.import_module(f"{namespace}.loggers").Logger

    class Recorder(base):
        name, version = "recorder", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append({**metrics, "step": step})

        def log_hyperparams(self, *_):
            pass

    return Recorder()


def logged(logger):
    return logger.rows


def test_figures_reach_every_logger_and_the_table_the_log(fit, namespace, tmp_path, log):
    loggers = [recorder(namespace), recorder(namespace)]
    monitor = callback("OptimizerStateMonitor", namespace, prog_bar=True)
    _, made = fit(adamw, "cs_adam", namespace, callbacks=[monitor], logger=loggers, max_steps=4, log_every_n_steps=2)
    report = state_report(made.optimizers[0])
    for logger in loggers:
        rows = [row for row in logged(logger) if "optimizer/state_bytes" in row]
        assert [row["step"] for row in rows] == [1, 3]
        for row in rows:
            assert row["optimizer/state_bytes"] == report.state_bytes
            assert row["optimizer/state_bytes_per_param"] == report.bytes_per_param
            assert row["optimizer/saved_vs_adamw_bytes"] == report.saved_bytes
            assert "optimizer/second_moment_relative_error" not in row
    assert made.callback_metrics["optimizer/state_bytes"] == report.state_bytes
    assert made.progress_bar_metrics["state_MiB"] == pytest.approx(report.state_bytes / 2**20)
    tables = [line for line in log() if "beside AdamW" in line]
    assert len(tables) == 1 and "CSAdam" in tables[0] and "state to be allocated" in tables[0]


def test_any_optimizer_and_several(fit, tmp_path):
    def make(module):
        first, second = AdamW(module.net[:2].parameters()), CSAdam(module.net[2:].parameters(), **SMALL)
        return [first, second], [torch.optim.lr_scheduler.StepLR(o, 1) for o in (first, second)]

    logger = recorder()
    _, made = fit(make, manual=True, callbacks=[callback("OptimizerStateMonitor", sampled=True)], logger=logger)
    last = [row for row in logged(logger) if "optimizer_0/state_bytes" in row][-1]
    assert last["optimizer_0/saved_vs_adamw_bytes"] == 0
    assert last["optimizer_1/state_bytes"] == state_report(made.optimizers[1]).state_bytes
    assert "optimizer_0/second_moment_relative_error" not in last
    assert last["optimizer_1/second_moment_relative_error"] > 0


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_sampled_error_is_that_of_the_gradients_in_use(clip, fit, tmp_path):
    """Compared with a probe that gets the gradients by hand, after Lightning has clipped them."""
    errors, logger = [], recorder()

    class Watched(CSAdam):
        def _update(self, work, known):
            probe.update()
            super()._update(work, known)
            errors.append(probe.relative_error())

    def make(module):
        nonlocal probe
        optimizer = Watched(module.parameters(), lr=1e-2, **SMALL)
        probe = SecondMomentProbe(optimizer, rows=4, params=2)
        return optimizer

    probe = None
    monitor = callback("OptimizerStateMonitor", sampled=True, rows=4, params=2)
    one, made = fit(make, callbacks=[monitor], logger=logger, gradient_clip_val=clip)
    key = "optimizer/second_moment_relative_error"
    assert [row[key] for row in logged(logger) if key in row] == errors and len(errors) == 6 and errors[-1] > 0
    other, _ = fit(lambda m: ours("cs_adam", lr=1e-2)(m.parameters()), gradient_clip_val=clip)
    assert equal(one, other)  # the samples change nothing
    assert not made.optimizers[0]._optimizer_step_pre_hooks


def test_exact_stores_have_no_error(fit, tmp_path):
    logger = recorder()
    own = strategy("SketchStrategy", optimizer_kwargs={"preset": "exact"})
    fit(adamw, own, callbacks=[callback("OptimizerStateMonitor", sampled=True)], logger=logger)
    assert not any("optimizer/second_moment_relative_error" in row for row in logged(logger))


def test_samples_go_on_after_a_checkpoint(fit, tmp_path):
    def run(epochs, folder, **options):
        logger = recorder()
        own = strategy("SketchStrategy", optimizer_kwargs=SMALL)
        monitor = callback("OptimizerStateMonitor", sampled=True)
        _, made = fit(adamw, own, callbacks=[monitor], logger=logger, max_epochs=epochs, max_steps=-1, **options)
        key = "optimizer/second_moment_relative_error"
        return made, [row[key] for row in logged(logger) if key in row]

    _, whole = run(3, "whole")
    made, _ = run(1, "first")
    made.save_checkpoint(tmp_path / "a.ckpt")
    _, rest = run(3, "rest", ckpt_path=tmp_path / "a.ckpt")
    assert rest == whole[3:] and all(error > 0 for error in rest)


def test_samples_of_other_rows_are_not_taken_up():
    monitor = callback("OptimizerStateMonitor", sampled=True)
    monitor.load_state_dict({"settings": {"rows": 99, "params": 4, "seed": 0}, "samples": {0: 1}})
    assert monitor.state_dict()["samples"] == {}


def test_cleaning_by_steps_is_clean_every(fit):
    def own(**options):
        return strategy("SketchStrategy", optimizer_kwargs={**SMALL, **options})

    cleaning = callback("SketchCleaning", every_n_steps=3, factor=0.3)
    one, made = fit(adamw, own(), callbacks=[cleaning], max_steps=10)
    other, reference = fit(adamw, own(clean_every=3, clean_factor=0.3), max_steps=10)
    plain, _ = fit(adamw, own(), max_steps=10)
    assert equal(one, other) and not equal(one, plain) and cleaning.cleanings == 3
    assert same_state(made.optimizers[0].state_dict()["state"], reference.optimizers[0].state_dict()["state"])


def test_cleaning_of_bfloat16_tables_and_every_step(fit):
    options = {**SMALL, "table_dtype": "bf16", "second_moment": "row_count_min"}

    def own(**more):
        return strategy("SketchStrategy", optimizer_kwargs={**options, **more})

    one, _ = fit(adamw, own(), callbacks=[callback("SketchCleaning", every_n_steps=1, factor=0.5)])
    other, _ = fit(adamw, own(clean_every=1, clean_factor=0.5))
    assert equal(one, other)


def test_cleaning_goes_on_after_a_checkpoint(fit, tmp_path):
    def run(epochs, **options):
        cleaning = callback("SketchCleaning", every_n_steps=4)
        own = strategy("SketchStrategy", optimizer_kwargs=SMALL)
        module, made = fit(adamw, own, callbacks=[cleaning], max_epochs=epochs, max_steps=-1, **options)
        return module, made, cleaning.cleanings

    whole, _, times = run(3)
    _, made, _ = run(2)
    made.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _, again = run(3, ckpt_path=tmp_path / "a.ckpt")
    assert equal(resumed, whole) and times == again == 2


def test_cleaning_by_epochs(fit, tmp_path):
    def run(epochs, **options):
        cleaning = callback("SketchCleaning", every_n_epochs=2, factor=0.1)
        own = strategy("SketchStrategy", optimizer_kwargs=SMALL)
        limits = {"max_steps": -1, "max_epochs": epochs, "limit_train_batches": 2}
        return *fit(adamw, own, callbacks=[cleaning], **limits, **options), cleaning.cleanings

    whole, _, times = run(5)
    _, made, _ = run(3)
    made.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _, again = run(5, ckpt_path=tmp_path / "a.ckpt")
    assert equal(resumed, whole) and times == again == 2
    plain, _ = fit(
        adamw, strategy("SketchStrategy", optimizer_kwargs=SMALL), max_steps=-1, max_epochs=5, limit_train_batches=2
    )
    assert not equal(plain, whole)


def skipping_scaler():
    """Finds infinities in the second step, like a scaler with a scale that is too large."""
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2))


def test_another_fit_is_cleaned_from_the_start(fit):
    cleaning, counts = callback("SketchCleaning", every_n_epochs=2), []
    for _ in range(2):
        own = strategy("SketchStrategy", optimizer_kwargs=SMALL)
        fit(adamw, own, callbacks=[cleaning], max_epochs=5, max_steps=-1)
        counts.append(cleaning.cleanings)
    assert counts == [2, 4]


def test_a_skipped_step_is_not_cleaned_twice(fit):
    def own(**options):
        return strategy("SketchStrategy", optimizer_kwargs={**SMALL, **options})

    quiet = {"max_steps": 40, "max_epochs": 10}
    cleaning = callback("SketchCleaning", every_n_steps=2, factor=0.3)
    one, made = fit(adamw, own(), callbacks=[cleaning], plugins=skipping_scaler(), **quiet)
    other, _ = fit(adamw, own(clean_every=2, clean_factor=0.3), plugins=skipping_scaler(), **quiet)
    assert equal(one, other)
    steps = made.optimizers[0].state_dict()["state"][0]["step"]
    assert 0 < steps < 40 and cleaning.cleanings == steps // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "every_n_steps=None and every_n_epochs=None are given"),
        ({"every_n_steps": 1, "every_n_epochs": 1}, "every_n_steps=1 and every_n_epochs=1 are given"),
        ({"every_n_steps": 0}, "every_n_steps=0 is not allowed: every_n_steps must be an integer >= 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs=1.5 is not allowed"),
        ({"every_n_steps": 1, "factor": 2}, r"factor=2 is not allowed: factor must be a number in \[0, 1\]"),
    ],
)
def test_wrong_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        callback("SketchCleaning", **options)


def test_nothing_to_clean(fit):
    with pytest.raises(ValueError, match="has no effect: AdamW keeps no second moment in a sketch"):
        fit(adamw, callbacks=[callback("SketchCleaning", every_n_steps=2)])
    own = strategy("SketchStrategy", optimizer_kwargs={**SMALL, "clean_every": 5})
    with pytest.raises(ValueError, match="group 0 of CSAdam has clean_every=5, so the optimizer and"):
        fit(adamw, own, callbacks=[callback("SketchCleaning", every_n_steps=2)])


def test_wrong_samples():
    with pytest.raises(ValueError, match="rows=0 is not allowed: rows must be an integer >= 1"):
        callback("OptimizerStateMonitor", rows=0)


def test_classes_are_found_by_pickles(namespace):
    for kind, options in (("OptimizerStateMonitor", {}), ("SketchCleaning", {"every_n_steps": 2})):
        made = callback(kind, namespace, **options)
        assert type(pickle.loads(pickle.dumps(made))) is type(made)
        assert isinstance(made, importlib.import_module(f"{namespace}.callbacks").Callback)
    own = strategy("SketchDDPStrategy", namespace, optimizer="sm3")
    assert pickle.loads(pickle.dumps(type(own))) is type(own)
    assert sketch_lightning.SketchCleaning is type(callback("SketchCleaning", every_n_steps=1))


def test_nan_is_no_figure():
    assert math.isnan(SecondMomentProbe(CSAdam(make_module("lightning.pytorch", adamw).parameters())).relative_error())

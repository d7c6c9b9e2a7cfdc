"""``OptimizerStateMonitor(check_numerics=...)`` in Lightning: the logged figures and the warning."""

import csv
import importlib
import importlib.util
import math
import warnings

import pytest
import torch

from sketch_plugins import CSAdam

from .conftest import SMALL, strategy
from .test_callbacks import callback

UNMOVED = "numerics/unmoved"


def run(namespace, fit, tmp_path, optimizers, every=1, **options):
    """The rows of a real logger, the trainer and the warnings."""
    logger = importlib.import_module(f"{namespace}.loggers").CSVLogger(tmp_path, name="", version="")
    own = {"logger": logger, "precision": "bf16-true", "callbacks": [], **options}
    own["callbacks"] = [*own["callbacks"], callback("OptimizerStateMonitor", namespace, check_numerics=every)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, trainer = fit(optimizers, namespace=namespace, **own)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows, trainer, [str(one.message) for one in said if "check_numerics" in str(one.message)]


def ours(bits, lr):
    return lambda module: CSAdam(module.parameters(), lr=lr, weight_decay=0.0, weight_bits=bits, **SMALL)


@pytest.mark.parametrize("back", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("bits", [None, 32])
def test_the_share_is_logged_and_warned_of(bits, back, namespace, fit, tmp_path):
    more = [callback("OptimizerInBackward", namespace)] if back else []
    rows, trainer, said = run(namespace, fit, tmp_path, ours(bits, 1e-6), callbacks=more)
    shares = [float(row[UNMOVED]) for row in rows if row[UNMOVED]]
    assert len(shares) == 6 and float(trainer.callback_metrics[UNMOVED]) == shares[-1]
    if bits is None:
        assert min(shares) > 0.9 and len(said) == 1
    else:
        assert max(shares) < 0.05 and said == []
    assert not trainer.optimizers[0]._optimizer_step_post_hooks or back  # nothing is checked after the end


def test_an_optimizer_that_a_strategy_has_put_in(namespace, fit, tmp_path):
    made = strategy("SketchStrategy", namespace, optimizer="cs_adam", optimizer_kwargs={**SMALL, "weight_bits": 24})
    rows, _, said = run(
        namespace, fit, tmp_path, lambda module: torch.optim.AdamW(module.parameters(), lr=1e-3), 3, strategy=made
    )
    shares = [float(row[UNMOVED]) for row in rows if row[UNMOVED]]
    assert len(set(shares[:3])) == 1 and all(share < 0.1 for share in shares) and said == []


def test_several_optimizers(namespace, fit, tmp_path):
    def make(module):
        made = [
            torch.optim.AdamW(module.net[:2].parameters(), lr=1e-6),
            CSAdam(module.net[2:].parameters(), lr=1e-4, weight_bits=32, **SMALL),
        ]
        return made, [torch.optim.lr_scheduler.StepLR(one, 1) for one in made]

    rows, _, said = run(namespace, fit, tmp_path, make, manual=True, max_steps=8)
    last = [row for row in rows if row["numerics_0/unmoved"]][-1]
    assert float(last["numerics_0/unmoved"]) > 0.9 and float(last["numerics_1/unmoved"]) < 0.1 and len(said) == 1


def test_off_is_off_and_what_is_no_setting(namespace, fit):
    monitor = callback("OptimizerStateMonitor", namespace)
    _, trainer = fit(ours(None, 1e-6), namespace=namespace, callbacks=[monitor], max_steps=1)
    assert UNMOVED not in trainer.callback_metrics and monitor.numerics == {}
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    for value in (-1, math.pi, "often"):
        with pytest.raises(ValueError, match=r"check_numerics=.* is not allowed"):
            callback("OptimizerStateMonitor", namespace, check_numerics=value)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra `deepspeed`")
def test_deepspeed_is_refused(namespace, trainer):
    made = trainer(namespace, strategy=strategy("SketchDeepSpeedStrategy", namespace, stage=2))
    with pytest.raises(ValueError, match=r"check_numerics=True\) does not support DeepSpeed"):
        callback("OptimizerStateMonitor", namespace, check_numerics=True).on_train_start(made, None)


@pytest.mark.filterwarnings("ignore:check_numerics")
def test_with_samples_beside(namespace, fit, tmp_path):
    """The samples of second moments are made again at the start, and the probe stays."""
    monitor = callback("OptimizerStateMonitor", namespace, sampled=True, check_numerics=1)
    _, trainer = fit(ours(None, 1e-6), namespace=namespace, callbacks=[monitor], precision="bf16-true")
    assert float(trainer.callback_metrics[UNMOVED]) > 0.9
    assert "optimizer/second_moment_relative_error" in trainer.callback_metrics

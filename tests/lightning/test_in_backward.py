"""`OptimizerInBackward`: steps in backward, with the same results as without it."""

import importlib

import pytest
import torch
from torch.optim import AdamW

from sketch_plugins import CSAdam, InBackward
from sketch_plugins.memory.in_backward import in_backward

from .conftest import SMALL, equal, make_module, same_state, small, strategy


def callback(namespace="lightning.pytorch", name="OptimizerInBackward", **options):
    module = importlib.import_module(f"sketch_lightning.{namespace.replace('lightning.pytorch', 'lightning_pytorch')}")
    return getattr(module, name)(**options)


def checkpointing(namespace, folder):
    return importlib.import_module(f"{namespace}.callbacks").ModelCheckpoint(folder, save_last=True, save_top_k=0)


def sgd(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def own(module):
    return CSAdam(module.parameters(), lr=1e-2, **SMALL)


def watching(namespace):
    """A callback that counts gradients, and steps taken, after each backward."""
    base = importlib.import_module(namespace).Callback

    class Watch(base):
        def __init__(self):
            self.seen = []

        def on_after_backward(self, trainer, pl_module):
            back = in_backward(trainer.optimizers[0])
            gradients = sum(p.grad is not None for p in pl_module.parameters())
            self.seen.append((gradients, None if back is None else back.taken))

    return Watch()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_run_is_that_without(name, accumulation, namespace, fit):
    def run(callbacks):
        made = strategy("SketchStrategy", namespace, optimizer=name, optimizer_kwargs=small(name))
        # Three batches an epoch: with an accumulation of 4, each epoch ends with a shorter cycle.
        options = {"accumulate_grad_batches": accumulation, "max_steps": -1, "max_epochs": 2}
        return fit(sgd, made, namespace, callbacks=callbacks, **options)

    watch, other = watching(namespace), watching(namespace)
    (one, trainer), (two, reference) = run([callback(namespace), watch]), run([other])
    assert equal(one, two) and one.rates == two.rates
    assert same_state(trainer.optimizers[0].state_dict(), reference.optimizers[0].state_dict())
    assert {gradients for gradients, _ in other.seen} == {6}
    assert watch.seen == [(0, 6)] * 6 if accumulation == 1 else [(6, 0), (6, 0), (0, 6)] * 2
    assert in_backward(trainer.optimizers[0]) is None  # removed at the end


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precisions_and_resume_in_both_directions(precision, name, fit, tmp_path):
    def run(epochs, in_back, folder, **options):
        rounding = {"stochastic_rounding": True} if precision == "bf16-true" else {}
        made = strategy("SketchStrategy", optimizer=name, optimizer_kwargs={**small(name), **rounding})
        callbacks = [checkpointing("lightning.pytorch", tmp_path / folder), *([callback()] if in_back else [])]
        quiet = {"enable_checkpointing": True, "max_steps": -1, "precision": precision}
        return fit(sgd, made, max_epochs=epochs, callbacks=callbacks, **quiet, **options)[0]

    whole = run(2, False, "whole")
    for first in (True, False):
        run(1, first, f"parts {first}")
        resumed = run(2, not first, f"parts {first}", seed=7, ckpt_path="last")
        assert len(resumed.rates) == 3 and equal(resumed, whole)


def test_a_module_that_builds_its_own(fit):
    one, _ = fit(own, callbacks=[callback()])
    two, _ = fit(own)
    assert equal(one, two)


def test_the_documented_manual_loop(namespace, trainer):
    base = type(make_module(namespace, own))

    class Manual(base):
        def __init__(self, in_back):
            super().__init__()
            self.automatic_optimization, self.in_back = False, in_back

        def configure_optimizers(self):
            optimizer = own(self)
            if self.in_back:
                InBackward(optimizer)
            return optimizer

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))
            assert all((p.grad is None) == self.in_back for p in self.parameters())
            self.optimizers().step()
            self.optimizers().zero_grad()

    one, two = Manual(True), Manual(False)
    for module in (one, two):
        trainer(namespace).fit(module)
    assert equal(one, two)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5"),
        ({"strategy": "ddp"}, "DDPStrategy: a step in backward would be taken before"),
        ({"strategy": "ddp_cs_adam"}, "SketchDDPStrategy"),
        ({"manual": True}, "manual optimization"),
        ({"optimizers": lambda module: AdamW(module.parameters())}, "not AdamW"),
        ({"optimizers": lambda module: [own(module)], "precision": "scaled"}, "GradScaler unscales"),
    ],
    ids=["clip", "ddp", "sketch ddp", "manual", "AdamW", "scaler"],
)
def test_what_cannot_be_done_is_refused(options, said, namespace, trainer):
    options = dict(options)
    if options.get("precision") == "scaled":  # "16-mixed" has no scaler on a CPU unless one is given
        plugins = importlib.import_module(f"{namespace}.plugins.precision")
        options["plugins"] = [plugins.MixedPrecision(options.pop("precision").replace("scaled", "16-mixed"), "cpu")]
    module = make_module(namespace, options.pop("optimizers", own), manual=options.pop("manual", False))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=said):
        trainer(namespace, callbacks=[callback(namespace)], **options).fit(module)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_clipping_of_its_own_is_refused(trainer):
    module = make_module("lightning.pytorch", own)
    type(module).configure_gradient_clipping = lambda self, optimizer, *_, **__: None
    with pytest.raises(ValueError, match=r"Module\.configure_gradient_clipping, because steps in backward"):
        trainer(callbacks=[callback()]).fit(module)


@pytest.mark.parametrize(
    ("other", "options"), [("OptimizerStateMonitor", {"sampled": True}), ("SketchCleaning", {"every_n_steps": 2})]
)
def test_callbacks_that_look_at_gradients_are_refused(other, options, trainer):
    made = trainer(callbacks=[callback(name=other, **options), callback()])
    with pytest.raises(ValueError, match=f"{other}.*(have already freed|too late)"):
        made.fit(make_module("lightning.pytorch", own))
    assert in_backward(made.optimizers[0]) is None


class NoMeter:
    """There is always enough memory; an error ends the search."""

    def start(self):
        pass

    def read(self):
        return 0


def test_a_batch_that_fails_in_a_search_is_forgotten(trainer):
    """ReclaimBatchSize tries sizes until memory runs out, here in the middle of backward, and then trains."""

    def run(in_back):
        module = make_module("lightning.pytorch", own, batch_size=2)
        failed = []

        def fails(grad):
            if module.rows > 6:
                failed.append(module.rows)
                raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")

        step = type(module).training_step
        type(module).training_step = lambda self, batch, i: (
            setattr(self, "rows", len(batch[0])),
            step(self, batch, i),
        )[1]
        module.net[0].weight.register_hook(fails)
        search = callback(name="ReclaimBatchSize", budget=1, max_val=12, meter=NoMeter())
        made = trainer(callbacks=[callback(), search] if in_back else [search], max_steps=4)
        made.fit(module)
        assert search.batch_size == 6 and failed
        return module

    assert equal(run(True), run(False))

"""``SketchCallback(check_numerics=...)`` in Trainer: the logged figures and the warning."""

import json
import math
import warnings

import pytest
import torch

from sketch_transformers import SketchCallback

UNMOVED = "numerics/unmoved"


def run(make_trainer, new_model, optim, bits, lr, every=1, dtype=torch.bfloat16, **options):
    args = None if optim == "adamw_torch" else f"min_compress_size=256,weight_bits={bits}"
    callback = SketchCallback(check_numerics=every)
    trainer = make_trainer(
        optim, new_model(0, dtype), [callback], optim_args=args, learning_rate=lr, lr_scheduler_type="constant",
        max_grad_norm=0.0, **options,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    found = [str(one.message) for one in said if "check_numerics" in str(one.message)]
    return trainer, [log for log in trainer.state.log_history if "loss" in log], found


@pytest.mark.parametrize(
    ("optim", "bits", "lr"),
    [("cs_adam", None, 1e-6), ("adamw_torch", None, 1e-6), ("cs_adam_layerwise", None, 1e-6), ("cs_adam", 32, 1e-6),
     ("cs_adam_layerwise", 24, 1e-4)],
)  # fmt: skip
def test_the_share_is_logged_and_warned_of(optim, bits, lr, make_trainer, new_model):
    trainer, logs, said = run(make_trainer, new_model, optim, bits, lr)
    assert len(logs) == 6 and all(UNMOVED in log for log in logs)
    # Trainer's two groups: with weight decay, and biases and norms.
    assert all({f"{UNMOVED}_group_0", f"{UNMOVED}_group_1"} <= log.keys() for log in logs)
    share = logs[-1][UNMOVED]
    if bits is None:
        assert share > 0.8 and len(said) == 1
    else:
        assert share < 0.05 and said == []
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, SketchCallback)]
    assert callback.numerics.last.total.share == share  # the last report stays


def test_looks_are_as_many_as_were_asked_for_and_saved(make_trainer, new_model, tmp_path):
    trainer, logs, _ = run(make_trainer, new_model, "cs_adam", 32, 1e-4, every=4, save_strategy="steps", save_steps=6)
    shares = [log[UNMOVED] for log in logs]
    assert shares[0] == shares[3] and shares[4] == shares[5]  # checks in steps 1 and 5
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SketchCallback"]["args"]["check_numerics"] == 4
    # Train again with a new optimizer; after the end nothing is checked.
    trainer.train()
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("off", [{}, {"check_numerics": False}, {"check_numerics": 0}], ids=str)
def test_off_is_off(off, make_trainer):
    callback = SketchCallback(**off)
    trainer = make_trainer(callbacks=[callback], max_steps=2)
    trainer.train()
    assert callback.numerics is None and not any(UNMOVED in log for log in trainer.state.log_history)
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_the_first_step_of_a_warm_up_moves_nothing_and_is_not_counted(make_trainer, new_model):
    callback = SketchCallback(check_numerics=1)
    trainer = make_trainer("cs_adam", new_model(0, torch.bfloat16), [callback], warmup_steps=3, max_steps=2)
    trainer.train()
    first, second = [log for log in trainer.state.log_history if "loss" in log]
    assert UNMOVED not in first and math.isfinite(second[UNMOVED])


def test_deepspeed_is_refused(make_args):
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers import TrainerControl, TrainerState

    args = make_args()
    args.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match=r"check_numerics=True\) does not support DeepSpeed"):
        SketchCallback(check_numerics=True).on_train_begin(args, TrainerState(), TrainerControl())


def test_what_is_no_setting():
    for value in (-1, 1.5, "often", None):
        with pytest.raises(ValueError, match=r"check_numerics=.* is not allowed"):
            SketchCallback(check_numerics=value)

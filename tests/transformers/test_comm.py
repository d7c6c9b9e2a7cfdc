"""Options of the communication in optim_args; with two processes: tests/accelerate."""

import inspect
import logging

import pytest

import sketch_transformers
from sketch_plugins.comm import MemSGDState
from sketch_transformers.arguments import communication_options
from sketch_transformers.comm import OPTIONS, communication


def test_every_option_has_a_key():
    """Their values are text. Trainer itself sets the process group and the GradScaler."""
    names = set(inspect.signature(MemSGDState).parameters) - {"params", "process_group", "scaler"}
    assert set(OPTIONS) == {"comm" if name == "compressor" else f"comm_{name}" for name in names}


def test_optim_args(make_args):
    args = make_args(optim_args="compression=0.1,comm=topk,comm_density=0.02,comm_start=5,comm_memory_dtype=bf16")
    expected = {"compressor": "topk", "density": 0.02, "start": 5, "memory_dtype": "bf16"}
    assert communication_options(args) == expected
    args = make_args(optim_args="comm=randk,comm_momentum=0.9,comm_factor_masking=false,comm_seed=7")
    expected = {"compressor": "randk", "momentum": 0.9, "factor_masking": False, "seed": 7}
    assert communication_options(args) == expected
    assert communication_options(make_args()) is None
    assert communication_options(make_args("adamw_torch", optim_args=None)) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("comm=best", "'best' is not one of 'topk'"),
        ("comm=topk,comm_density=2", "density=2"),
        (
            "comm=topk,comm_size=2",
            "'comm_size' does not exist; the options of gradient compression are comm, comm_density",
        ),
        ("comm_density=0.1", "without 'comm'"),
        ("comm=topk,comm_start=1", "start=1"),
        ("comm=topk,comm_factor_masking=maybe", "comm_factor_masking"),
        ("comm=randk,comm_seed=0.5", "comm_seed"),
    ],
)
def test_errors(given, said, make_args):
    with pytest.raises(ValueError, match=said):
        make_args(optim_args=given)


def test_one_process_has_nothing_to_send(make_trainer, caplog):
    trainer = make_trainer(optim_args="min_compress_size=256,comm=block_topk", max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "there is one process" in caplog.text
    assert communication(trainer.callback_handler.callbacks).state is None and "are lost" not in caplog.text


def test_one_process_after_several(make_trainer, caplog, tmp_path):
    """It has no hook, so it cannot use the saved memory, and says so."""
    options = {"optim_args": "min_compress_size=256,comm=block_topk", "save_strategy": "steps", "save_steps": 2}
    make_trainer(max_steps=2, **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "memsgd").mkdir()
    with caplog.at_level(logging.WARNING):
        make_trainer(max_steps=3, **options).train(resume_from_checkpoint=str(checkpoint))
    assert "checkpoint-2/memsgd is not loaded, because there is one process now" in caplog.text


def test_said_where_nobody_would_read_it(make_trainer):
    """With an optimizer of Trainer itself, and in two places."""
    trainer = make_trainer("adamw_torch", optim_args="comm=topk, comm_density=0.1")
    with pytest.raises(ValueError, match=r"optim='adamw_torch' call sketch_transformers\.enable_memsgd"):
        trainer.train()
    with pytest.raises(ValueError, match="both set the gradient compression"):
        sketch_transformers.enable_memsgd(make_trainer(optim_args="comm=topk"), density=0.1)


def test_options_are_checked_at_once(make_trainer):
    for options, said in (({"density": 0}, "density=0"), ({"denisty": 0.1}, "denisty"),
                          ({"process_group": None}, "process_group")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            sketch_transformers.enable_memsgd(make_trainer(), **options)

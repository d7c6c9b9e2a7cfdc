"""MemSGDKwargs in accelerate and enable_memsgd in Trainer, in two processes: the checks are in comm_worker.py."""

import importlib.util
import logging
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import accelerate

import sketch_accelerate

WORKER = Path(__file__).with_name("comm_worker.py")


def test_two_ranks(launch_ranks, tmp_path):
    launch_ranks(WORKER, "accelerate,scaler,trainer", tmp_path)


def test_refused_where_gradients_are_reduced_otherwise(launch_ranks, tmp_path):
    """With FSDP and DeepSpeed, the real ones, in every way to turn compression on."""
    deepspeed = importlib.util.find_spec("deepspeed") is not None
    launch_ranks(WORKER, "deepspeed,fsdp" if deepspeed else "fsdp", tmp_path)


def test_one_process_has_nothing_to_send(caplog):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.ddp_handler = handler = sketch_accelerate.MemSGDKwargs(memsgd={"density": 0.01})
    with caplog.at_level(logging.WARNING):
        accelerator.prepare(torch.nn.Linear(3, 3))
    assert "memsgd has no effect: there is one process" in caplog.text and handler.state is None
    for options, said in (({"density": 2}, "density=2"), ({"denisty": 0.1}, "denisty")):  # without processes, too
        with pytest.raises(ValueError, match=said):
            sketch_accelerate.MemSGDKwargs(memsgd=options)

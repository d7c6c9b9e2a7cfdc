"""A real Trainer on a GPT-2 of two layers and 32 dimensions, with generated data."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import sketch_transformers  # noqa: F401

# Low enough for the matrices of the tiny model to be compressed.
SMALL = "min_compress_size=256"


class Tokens(torch.utils.data.Dataset):
    def __init__(self, size: int = 64, length: int = 16, vocabulary: int = 64) -> None:
        steps = torch.randint(1, 5, (size, 1), generator=torch.Generator().manual_seed(0))
        self.rows = (torch.arange(length) * steps) % vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, dropout: float = 0.1) -> GPT2LMHeadModel:
    set_seed(seed)
    size = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)).to(dtype)


@pytest.fixture
def make_args(tmp_path):
    def make(optim: str = "cs_adam", **kwargs: object) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "optim": optim,
            "optim_args": SMALL,
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "per_device_train_batch_size": 8,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
        }
        return TrainingArguments(**{**defaults, **kwargs})

    return make


@pytest.fixture
def make_trainer(make_args):
    def make(optim: str = "cs_adam", model: torch.nn.Module | None = None, callbacks=None, cls=Trainer, **kwargs):
        own = {"optimizer_cls_and_kwargs": kwargs.pop("optimizer_cls_and_kwargs", None), "callbacks": callbacks}
        model = tiny_model() if model is None else model
        return cls(model, make_args(optim, **kwargs), train_dataset=Tokens(), eval_dataset=Tokens(8), **own)

    return make


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def new_model():
    return tiny_model

"""The model of a plan, given by name, configuration, module or function."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Described:
    """The model, given by name, configuration, module or function."""

    def __init__(
        self,
        model: Any,
        sample: Callable[[int], Any] | None,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        task: str | None,
        seq_len: int,
        gradient_checkpointing: bool,
    ) -> None:
        self.seq_len: int | None = None
        if isinstance(model, nn.Module) or (callable(model) and not hasattr(model, "model_type")):
            if sample is None or loss is None:
                raise ValueError(
                    "a module needs two functions: sample=(batch size -> batch) and loss=((model, batch) -> loss)"
                )
            if gradient_checkpointing or task is not None:
                raise ValueError(
                    "gradient_checkpointing and task are only for models of transformers: set them in the module itself"
                )
            self.build: Callable[[], nn.Module] = (lambda: _on_meta(model)) if isinstance(model, nn.Module) else model
            self.sample, self.loss = sample, loss
            self.label = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")
            return
        if sample is not None or loss is not None:
            raise ValueError("sample and loss are only for modules of your own: models of transformers have theirs")
        try:
            planning = importlib.import_module("sketch_transformers.planning")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            raise ValueError(
                "models by name or configuration need transformers: pip install 'sketch-plugins[transformers]'"
            ) from error
        found: Any = planning.HuggingFaceModel(model, task, seq_len, gradient_checkpointing)
        self.build, self.sample, self.loss, self.label = found.build, found.sample, found.loss, found.label
        self.seq_len = seq_len


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(model, memo)

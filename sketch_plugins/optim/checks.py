"""Conditions on tensors that come from outside: from a state dict, or from a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding.tensors import is_fake

#: Names that other optimizers use in their state. Other names belong to wrappers of optimizers (Lookahead's "slow").
STATES = {
    "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum",
    # Torch's other optimizers, and well-known ones elsewhere. They are not Adam, although they have its averages.
    "square_avg", "grad_avg", "acc_delta", "exp_inf", "mu_product", "mu", "eta", "ax", "prev", "step_size", "row_var",
    "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "exp_avg_diff",
    "neg_pre_grad", "exp_avg_var", "exp_avg_slow", "exp_avg_fast", "hessian", "previous_grad", "pre_grad", "s", "p0",
    "z", "GG", "Q", "projector", "state1", "state2",
}  # fmt: skip


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be read. Meta tensors and fake tensors have none."""
    return tensor.device.type != "meta" and not is_fake(tensor)


def why_not_plain(tensor: Tensor) -> str | None:
    """Why a tensor cannot be copied into state, or None if it is plain.

    A plain tensor is strided, and its numbers are in memory of its own.
    """
    if tensor.layout != torch.strided:
        return f"with layout {tensor.layout}"
    if tensor.device.type == "meta":
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    # Subclasses that handle operations themselves (fake tensors, DTensor, quantized weights) may have no memory.
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"of type {type(tensor).__name__}"
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + size) * tensor.element_size():
        return "whose memory has been freed"
    return None


def described(value: Any) -> str:
    """A value for a message. torch cannot print every tensor: if its memory is gone, the process would crash."""
    why = why_not_plain(value) if isinstance(value, Tensor) else None
    return repr(value) if why is None else f"a tensor {why}"


def steps_taken(counter: Tensor) -> Any:
    """The number in a step counter, read without dispatching an operation. On the CPU nothing waits for it."""
    return counter.tolist() if type(counter) is Tensor and not counter.ndim else counter.item()


def exact_step(step: Any) -> Tensor | None:
    """A saved step counter as ours (0-d float32), or None if it is not a number that float32 holds exactly."""
    if not isinstance(step, Tensor) or step.numel() != 1 or why_not_plain(step) is not None:
        return None
    if step.is_complex() or step.dtype == torch.bool:
        return None
    number = step.item()
    # The bound is checked first, because NaN and infinity cannot be converted to an integer.
    if not 0 <= number < 1e18 or number != int(number):
        return None
    exact = torch.tensor(float(number), dtype=torch.float32, device=step.device)
    return exact if exact.item() == number else None


def why_impossible(tensor: Tensor, least: float | None, infinite: bool) -> str | None:
    """A number in a plain tensor that no step leaves behind, or None.

    Args:
        tensor: a tensor of floating point numbers.
        least: the smallest allowed number, or None if any is allowed.
        infinite: whether infinity is allowed.
    """
    if not tensor.numel():
        return None
    low, high = (float(number) for number in torch.aminmax(tensor.detach()))
    if low != low:
        return "NaN"
    if least is not None and low < least:
        return f"{low:g}"
    if not infinite and (high == float("inf") or low == float("-inf")):
        return "an infinite number"
    return None


def copied(value: Any, device: torch.device) -> Any:
    """A copy on a device, with its own dtype. Values without tensors are returned unchanged."""
    if isinstance(value, Tensor):
        # Copies are contiguous, because the tensor may be a part of a larger one. Tensors that are not plain belong to
        # other code.
        plain = why_not_plain(value) is None
        layout = torch.contiguous_format if plain else torch.preserve_format
        return value.detach().to(device, copy=True, memory_format=layout)
    if isinstance(value, Mapping):
        return {key: copied(v, device) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v, device) for v in value)
    return value

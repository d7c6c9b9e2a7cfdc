"""What tensors have to be like before an optimizer takes them: from a state dict, or from a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding.parts import is_fake

#: What other optimizers keep of a parameter. Other keys are of their wrappers (Lookahead's "slow").
STATES = {
    "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum",
    # Of torch's other ones, and of well-known ones elsewhere, which are not Adam though they have its averages.
    "square_avg", "grad_avg", "acc_delta", "exp_inf", "mu_product", "mu", "eta", "ax", "prev", "step_size", "row_var",
    "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "exp_avg_diff",
    "neg_pre_grad", "exp_avg_var", "exp_avg_slow", "exp_avg_fast", "hessian", "previous_grad", "pre_grad", "s", "p0",
    "z", "GG", "Q", "projector", "state1", "state2",
}  # fmt: skip


def has_numbers(tensor: Tensor) -> bool:
    """Whether there is something to look at: a meta tensor has no numbers, nor has a fake one."""
    return tensor.device.type != "meta" and not is_fake(tensor)


def why_not_plain(tensor: Tensor) -> str | None:
    """Why a tensor cannot be copied into state; None: it can.

    Plain is a strided tensor whose numbers lie in memory of its own.
    """
    if tensor.layout != torch.strided:
        return f"with layout {tensor.layout}"
    if tensor.device.type == "meta":
        return "on the meta device, without values"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_nested:
        return "nested"
    # Subclasses that see operations themselves (fake tensors, DTensor, quantized weights) need not have memory at all.
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"of type {type(tensor).__name__}"
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and tensor.untyped_storage().nbytes() < (tensor.storage_offset() + size) * tensor.element_size():
        return "whose memory has been freed"
    return None


def described(value: Any) -> str:
    """A value in a message. torch cannot print every tensor: where the memory is gone, the process would end."""
    why = why_not_plain(value) if isinstance(value, Tensor) else None
    return repr(value) if why is None else f"a tensor {why}"


def steps_taken(counter: Tensor) -> Any:
    """The number in a counter of steps: a CPU tensor, so nobody waits, and no operation is dispatched for it."""
    return counter.tolist() if type(counter) is Tensor and not counter.ndim else counter.item()


def exact_step(step: Any) -> Tensor | None:
    """A saved number of steps as this package counts them: 0-d float32. None: it is no number that float32 can hold."""
    if not isinstance(step, Tensor) or step.numel() != 1 or why_not_plain(step) is not None:
        return None
    if step.is_complex() or step.dtype == torch.bool:
        return None
    number = step.item()
    # The bound comes first: NaN and infinity have no integer part.
    if not 0 <= number < 1e18 or number != int(number):
        return None
    exact = torch.tensor(float(number), dtype=torch.float32, device=step.device)
    return exact if exact.item() == number else None


def why_impossible(tensor: Tensor, least: float | None, infinite: bool) -> str | None:
    """Which number of a plain tensor no step leaves behind; None: there is none.

    Args:
        tensor: of floating point numbers.
        least: the least number that is allowed; None: any.
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
    """A copy on a device, in its own dtype; what is neither a tensor nor holds any stays as it is."""
    if isinstance(value, Tensor):
        # Contiguous: it may be cut from a larger one. What is not plain is another's, of whatever kind.
        plain = why_not_plain(value) is None
        layout = torch.contiguous_format if plain else torch.preserve_format
        return value.detach().to(device, copy=True, memory_format=layout)
    if isinstance(value, Mapping):
        return {key: copied(v, device) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v, device) for v in value)
    return value

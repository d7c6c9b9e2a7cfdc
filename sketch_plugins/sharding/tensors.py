"""Where the numbers of a tensor are, and whether they can be read and written."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def has_address(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are in its own memory, in the order that its strides say.

    A subclass with operations of its own (`torch.Tensor.__torch_dispatch__`) may have no such memory (quantized
    weights, fake tensors, unfinished results of collectives), or may keep something else there.
    """
    own = type(tensor) in _PLAIN or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not own or tensor.layout != torch.strided or tensor._is_zerotensor():
        return False
    try:
        return tensor.numel() == 0 or tensor.device.type == "meta" or tensor.data_ptr() != 0
    except RuntimeError:  # within a transformation of torch.func
        return False


def is_freed(tensor: Tensor) -> bool:
    """Whether the memory of an ordinary tensor, or a part of it, was freed (``untyped_storage().resize_(0)``)."""
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not own or tensor.numel() == 0 or tensor.device.type == "meta" or tensor._is_zerotensor():
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


def overlaps(tensor: Tensor) -> bool:
    """Whether several elements of a strided tensor are at the same place in memory, as in an expanded tensor."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    axes = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    if axes[0][0] == 0:
        return True
    reach, nested = 0, True  # each stride exceeds all that the smaller ones reach, in transposed and sliced tensors
    for step, size in axes:
        nested = nested and step > reach
        reach += (size - 1) * step
    if nested:
        return False
    places = torch.zeros(1, dtype=torch.int64)
    for step, size in axes:
        places = (places.unsqueeze(-1) + torch.arange(size) * step).flatten()
    return len(places.unique()) < len(places)


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a tensor of `FakeTensorMode`, which has a shape but no numbers."""
    return any(cls.__name__ == "FakeTensor" for cls in type(tensor).__mro__)


def plain(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the numbers of a subclass that has operations of its own; other tensors unchanged.

    Raises:
        ValueError: the subclass cannot be copied into an ordinary tensor.
    """
    if has_address(tensor) or tensor.layout != torch.strided or is_fake(tensor) or is_freed(tensor):
        return tensor
    try:
        if hasattr(tensor, "wait"):  # result of an unfinished collective
            return tensor.wait()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is a {type(tensor).__name__}, whose values cannot be "
            f"read: copying it to a plain tensor failed ({error}). Supported are plain tensors, DTensors, and "
            "subclasses that support copy_"
        ) from error


# Subclasses of Tensor that steps have read and written.
_WRITABLE: set[type] = set()


def check_writable(tensor: Tensor, label: str) -> None:
    """Check that a step can write a parameter.

    What `opened` does to a subclass with operations of its own is tried on a copy.

    Raises:
        ValueError: it is an inference tensor outside of inference mode, several of its elements share memory, or it
            cannot be read or written (the message names the type).
    """
    kind = type(tensor)
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{label} is an inference tensor, which can only be written in torch.inference_mode. Take the step in that "
            "mode, or clone the parameter outside of it"
        )
    if has_address(tensor) and overlaps(tensor):
        raise ValueError(
            f"{label} has strides {tensor.stride()}, with which several elements share memory (as after expand), so "
            "they cannot change one by one. Use parameter.contiguous()"
        )
    if has_address(tensor) or is_fake(tensor) or kind in _WRITABLE:
        return
    numbers = plain(tensor)
    try:
        tensor.detach().clone().copy_(numbers)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{label} is a {kind.__name__}, which cannot be written: copying a plain tensor into it failed "
            f"({error}). Supported are plain tensors, DTensors, and subclasses that support copy_"
        ) from error
    _WRITABLE.add(kind)

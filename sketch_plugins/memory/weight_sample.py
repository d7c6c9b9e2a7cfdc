"""A sample of an optimizer's weights, read before and after a step. Reading changes nothing and does not wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.hashing import random32
from sketch_plugins.kernels.weight_code import decode
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.weight_bits import corrections, corrects
from sketch_plugins.sharding.dtensors import is_dtensor, local_of
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.tensors import has_address, is_fake, is_freed


@dataclass
class Sample:
    """Sampled weights of a part, before a step."""

    number: int
    index: int
    part: Part
    places: Tensor  # positions in the flat part
    mask: Tensor  # which of them have a gradient
    values: Tensor
    steps: Any  # number of steps taken before
    standing_for: float  # number of weights of the part that each sampled one represents


def parts_of(optimizer: Any, index: int, owner: Tensor) -> Iterator[Part]:
    """The parts of a parameter that take a step on this rank and have their numbers in memory."""
    if isinstance(optimizer, SketchOptimizer):
        with optimizer._parts.looking():
            parts = optimizer._parts.of(index, owner)
    else:
        parts = [Part(local_of(owner), owner, index, tuple(owner.shape))]
    if any(part.key is not None for part in parts):
        raise ValueError(
            "NumericsProbe does not support DeepSpeed's ZeRO: its optimizers step float32 partitions, whatever the "
            "model's dtype is, so that no update is lost to the rounding of bfloat16"
        )
    return (part for part in parts if has_address(part.data) and not is_fake(part.data) and not is_freed(part.data))


def gradient_of(part: Part) -> Tensor | None:
    """This rank's gradient of a part; None if it cannot be read without communication."""
    owner: Any = part.owner
    grad = owner.grad
    if is_dtensor(owner) != is_dtensor(grad) or (is_dtensor(grad) and grad.placements != owner.placements):
        return None
    grad = local_of(grad)
    if grad.layout == torch.sparse_coo:
        return grad
    return grad if has_address(grad) and not is_freed(grad) and grad.shape == part.shape else None


def sampled(grad: Tensor, shape: torch.Size, each: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """``(places, gradients there, weights that each place represents)``; places with entries if it is sparse."""
    if grad.layout != torch.sparse_coo:
        places = places_of(grad.numel(), each, seed, grad.device)
        return places, _at(grad, places), grad.numel() / len(places)
    grad = grad.coalesce()
    values, indices = grad.values(), grad.indices()
    chosen = places_of(values.numel(), each, seed, grad.device)
    width = math.prod(shape[grad.sparse_dim() :])
    rows = torch.zeros_like(indices[0])
    for axis in range(grad.sparse_dim()):
        rows = rows * shape[axis] + indices[axis]
    return rows[chosen // width] * width + chosen % width, _at(values, chosen), values.numel() / max(1, len(chosen))


def places_of(n: int, k: int, seed: int, device: torch.device) -> Tensor:
    """Places of a sample in order, k of n: one in each of k equal stretches; all places if k >= n."""
    if k >= n:
        return torch.arange(n, device=device)
    stretch = torch.arange(k, device=device)
    first, end = stretch * n // k, (stretch + 1) * n // k
    return first + random32(stretch, seed, 0) % (end - first)


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """Elements of a tensor with any strides, by their number."""
    if tensor.is_contiguous():
        return tensor.view(-1)[places]
    return tensor[torch.unravel_index(places, tensor.shape)]


def values_of(part: Part, state: Mapping[str, Any] | None, places: Tensor) -> Tensor:
    """Weights with all the bits that the next step reads."""
    weight, found = _at(part.data.detach(), places), corrections(part, state)
    return weight if found is None else decode(weight, _at(found[0].view(part.shape), places))


def steps_of(state: Mapping[str, Any] | None) -> Any:
    """Number of steps that a parameter has taken; a copy, read without waiting for a device. None: not counted."""
    steps = (state or {}).get("step")
    if isinstance(steps, Tensor):
        return float(steps) if steps.device.type == "cpu" else steps.detach().clone()
    return steps


def by_chance(part: Part, group: Mapping[str, Any]) -> bool:
    """Whether a weight that stays has lost nothing on average, because it is rounded stochastically."""
    if corrects(part, group):
        return bool(group["weight_bits"] == 24)
    return bool(group.get("stochastic_rounding")) and part.dtype == torch.bfloat16


def precision_of(part: Part, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype to which updates are rounded. With ``weight_bits`` they are rounded to a part of float32."""
    return torch.float32 if corrects(part, group) else part.dtype


def in_numbers(counts: list[Tensor]) -> list[tuple[int, int]]:
    """Pairs of counts as numbers, with one wait for each device."""
    out: list[tuple[int, int]] = [(0, 0)] * len(counts)
    for device in {one.device for one in counts}:
        places = [i for i, one in enumerate(counts) if one.device == device]
        for i, (seen, stay) in zip(places, torch.stack([counts[i] for i in places]).tolist(), strict=True):
            out[i] = seen, stay
    return out

"""How far a fused step may be from the eager definition. The tests and every check use these bounds.

Kernel and definition compute the same numbers in another order. Compiled, interpreted and eager arithmetic round
products and sums differently, and a GPU rounds a product and a sum once (fma). So a float32 number may differ by a few
units in its last place, and a bfloat16 number or an int8 code by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import decode
from sketch_plugins.sharding.state_names import CORRECTION, is_ours, kind_of

#: The fraction of codes, or of cells of bfloat16 tables, that may round to the other neighbour. That happens if a
#: number lies half-way, or if the two results lie on different sides of the noise that rounds them.
NEIGHBOURS = 0.02
#: Dtypes of parameters in which only a large step can be seen.
HALF = (torch.bfloat16, torch.float16)


def moments(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of the tensors in a parameter's state that kernels write."""
    for name, tensor in state.items():
        # No kernel writes preconditioners. `weight_difference` compares corrections together with their weights.
        if is_ours(name) and "." in name and kind_of(name) not in ("preconditioner", CORRECTION):
            yield name, tensor


def rate_for(dtype: torch.dtype) -> float:
    """The learning rate that the bounds are made for.

    In half precision a step has to be a large part of the parameter (use numbers around 0.1 then, and around 1
    otherwise), because rounding would hide a smaller one.
    """
    return 5e-2 if dtype in HALF else 1e-3


def parameter_difference(ours: Tensor, eager: Tensor, rounded: bool) -> str | None:
    """What is wrong with a parameter after two or three steps at `rate_for` its dtype, or None.

    Args:
        ours: the parameter after the kernels' steps.
        eager: the parameter after the definition's steps.
        rounded: a moment is kept in bfloat16.
    """
    rtol, atol = _parameter_bounds(eager.dtype, rounded)
    return _apart("the parameter", ours, eager, rtol, atol)


def weight_difference(
    ours: Tensor, state: Mapping[str, Any], eager: Tensor, other: Mapping[str, Any], rounded: bool
) -> str | None:
    """`parameter_difference`, and for corrected parameters (``weight_bits``) also the difference of corrected weights.

    Args:
        ours: the parameter after the kernels' steps.
        state: its state.
        eager: the parameter after the definition's steps.
        other: its state.
        rounded: see `parameter_difference`.
    """
    found, name = parameter_difference(ours, eager, rounded), f"{CORRECTION}.codes"
    if found is not None or name not in other:
        return found
    a, b = (decode(p, kept[name].view(p.shape)) for p, kept in ((ours, state), (eager, other)))
    # Two units in the last place of 24 bits, because noise may round to either side.
    return _apart(
        "the weights with their corrections", a, b, 2**-14, (0.1 if rounded else 2e-3) * rate_for(eager.dtype)
    )


def _parameter_bounds(dtype: torch.dtype, rounded: bool) -> tuple[float, float]:
    rate = rate_for(dtype)
    if dtype in HALF:
        # One or two roundings: a unit in the last place is 2**-8 of the number, or 2**-11, and Triton's interpreter
        # truncates where hardware rounds. A moment that differs by a unit moves a parameter by a few hundredths of a
        # step.
        return (2**-6 if dtype == torch.bfloat16 else 2**-9), 0.1 * rate
    # Moments that differ by a unit in their last place, times the learning rate and a few steps.
    return 2e-5, (0.1 if rounded else 2e-3) * rate


def moment_difference(name: str, ours: Tensor, eager: Tensor) -> str | None:
    """What is wrong with the tensor of a moment, or None. ``name`` is as `moments` returns it."""
    if not eager.is_floating_point():
        # A number half-way between two codes may round to either.
        difference = (ours.int() - eager.int()).abs()
        if difference.numel() and difference.max() > 1:
            return f"{name}: codes differ by up to {int(difference.max())}; 1 is allowed"
        return _often(name, difference > 0)
    if eager.dtype == torch.bfloat16:
        found = _apart(name, ours, eager, 2**-7, 2**-8)
        # The noise is the same, but a cell rounds the other way if the unrounded numbers lie on different sides of it.
        return found or (_often(name, ours != eager) if name.endswith("table") else None)
    return _apart(name, ours, eager, 1e-4, 1e-6)


def state_difference(ours: Mapping[str, Any], eager: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """`moment_difference` of the first moment that differs, for the state of a parameter of this dtype; or None."""
    for (name, a), (other, b) in zip(moments(ours), moments(eager), strict=True):
        assert name == other
        if name == "rms.last" and dtype in HALF:
            # The RMS of a parameter may differ as much as its numbers may.
            found = _apart(name, a, b, *_parameter_bounds(dtype, True))
        else:
            found = moment_difference(name, a, b)
        if found is not None:
            return found
    return None


def is_rounded(state: Mapping[str, Any]) -> bool:
    """Whether a moment in a parameter's state is kept in bfloat16."""
    return any(tensor.dtype == torch.bfloat16 for _, tensor in moments(state))


def _often(name: str, differs: Tensor) -> str | None:
    share = differs.float().mean().item() if differs.numel() else 0.0
    if share < NEIGHBOURS:
        return None
    return f"{name}: {share:.1%} of the values round to another neighbour; less than {NEIGHBOURS:.0%} is allowed"


def _apart(name: str, ours: Tensor, eager: Tensor, rtol: float, atol: float) -> str | None:
    try:
        torch.testing.assert_close(ours, eager, rtol=rtol, atol=atol)
    except AssertionError as error:
        said = " ".join(str(error).split())
        return f"{name}: {said}"
    return None

"""How far a fused step may be from the eager definition: the bounds of the tests and of every check.

Both compute the same numbers in another order. Compiled, interpreted and eager arithmetic differ by how products and
sums are rounded, and a GPU rounds a product and a sum once (fma). A float32 number may therefore be a few units in its
last place apart, a bfloat16 number or a code of int8 one unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import decode
from sketch_plugins.sharding.state_names import CORRECTION, is_ours, kind_of

#: Codes, or cells of bfloat16 tables, that may round to the other neighbour: where a number lies half-way, or on the
#: two sides of the noise that rounds it.
NEIGHBOURS = 0.02
#: Of a parameter that a step has to be large for, to be seen.
HALF = (torch.bfloat16, torch.float16)


def moments(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """``(name, tensor)`` of what kernels keep in a parameter's state."""
    for name, tensor in state.items():
        # A preconditioner is no kernel's; corrections are looked at together with the weights: `weight_difference`.
        if is_ours(name) and "." in name and kind_of(name) not in ("preconditioner", CORRECTION):
            yield name, tensor


def rate_for(dtype: torch.dtype) -> float:
    """The learning rate that the bounds are made for.

    In half precision a step has to be a large part of the parameter (whose numbers are to be around 0.1 then, and
    around 1 otherwise), or nothing of it would be seen behind the rounding.
    """
    return 5e-2 if dtype in HALF else 1e-3


def parameter_difference(ours: Tensor, eager: Tensor, rounded: bool) -> str | None:
    """What is wrong with a parameter after two or three steps at `rate_for` its dtype; None: nothing.

    Args:
        ours: as the kernels left it.
        eager: as the definition left it.
        rounded: some moment is kept in bfloat16.
    """
    rtol, atol = _parameter_bounds(eager.dtype, rounded)
    return _apart("the parameter", ours, eager, rtol, atol)


def weight_difference(
    ours: Tensor, state: Mapping[str, Any], eager: Tensor, other: Mapping[str, Any], rounded: bool
) -> str | None:
    """`parameter_difference`; of parameters with corrections (``weight_bits``) also of what both stand for.

    Args:
        ours: as the kernels left it,
        state: with its state.
        eager: as the definition left it,
        other: with its state.
        rounded: see `parameter_difference`.
    """
    found, name = parameter_difference(ours, eager, rounded), f"{CORRECTION}.codes"
    if found is not None or name not in other:
        return found
    a, b = (decode(p, kept[name].view(p.shape)) for p, kept in ((ours, state), (eager, other)))
    # Two units in the last place of 24 bits, whose noise may lead to either side.
    return _apart(
        "the weights with their corrections", a, b, 2**-14, (0.1 if rounded else 2e-3) * rate_for(eager.dtype)
    )


def _parameter_bounds(dtype: torch.dtype, rounded: bool) -> tuple[float, float]:
    rate = rate_for(dtype)
    if dtype in HALF:
        # A step or two of rounding apart: a unit in the last place is 2**-8 of the number, or 2**-11, and Triton's
        # interpreter truncates where hardware rounds. A moment that is a unit apart moves a parameter by a few
        # hundredths of a step.
        return (2**-6 if dtype == torch.bfloat16 else 2**-9), 0.1 * rate
    # Moments a unit in their last place apart, times the learning rate and a few steps.
    return 2e-5, (0.1 if rounded else 2e-3) * rate


def moment_difference(name: str, ours: Tensor, eager: Tensor) -> str | None:
    """What is wrong with a tensor of a moment; None: nothing. ``name``: as `moments` has it."""
    if not eager.is_floating_point():
        # A code of the other neighbour where the number lay half-way between two.
        difference = (ours.int() - eager.int()).abs()
        if difference.numel() and difference.max() > 1:
            return f"{name}: codes differ by up to {int(difference.max())}; 1 is allowed"
        return _often(name, difference > 0)
    if eager.dtype == torch.bfloat16:
        found = _apart(name, ours, eager, 2**-7, 2**-8)
        # The same noise: a cell rounds the other way where the unrounded numbers lie on its two sides.
        return found or (_often(name, ours != eager) if name.endswith("table") else None)
    return _apart(name, ours, eager, 1e-4, 1e-6)


def state_difference(ours: Mapping[str, Any], eager: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """`moment_difference` of the first moment that differs in the state of a parameter of this dtype."""
    for (name, a), (other, b) in zip(moments(ours), moments(eager), strict=True):
        assert name == other
        if name == "rms.last" and dtype in HALF:
            # The RMS of a parameter is as far apart as its numbers may be.
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

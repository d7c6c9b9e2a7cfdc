"""Chooses the kernels for a parameter's step, and turns its rule into the numbers that they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.interpretation import interpreted
from sketch_plugins.kernels.work import NUMBERS, Work
from sketch_plugins.notices import warn
from sketch_plugins.optim.clipping import largest_rms
from sketch_plugins.optim.rule import Rule
from sketch_plugins.sharding.state_names import CORRECTION
from sketch_plugins.sharding.tensors import has_address
from sketch_plugins.stores import Gradient, Store

#: The words of the warning about a tensor that no kernel takes. `sketch-plugins check` searches for them.
EAGERLY = "takes eager steps, which are slower"
# On a CPU, unless ``fused`` asks for kernels, an optimizer of smaller tensors only takes the eager path.
CPU_MIN_SIZE = 1 << 15


@dataclass(frozen=True, eq=False)
class Backend:
    """One set of kernels.

    Attributes:
        name: name of the compiler.
        unsupported: returns why the kernels cannot take a work, or None if they can.
        task: turns a work into a `Task` that later steps can use again, or returns None if they cannot.
        prepare_tasks: makes steps ready without changing anything, from (tasks, rows of numbers, each task's row,
            addresses of the gradients, the last program). Returns the program, for the next step, and for each launch
            the places of its tasks in the list and the function that takes their steps. ``moves`` is None, or a
            function that returns a flag for a device (0-d bool): if it is not set, no weight moves in this step.
        moved: returns the tasks for parameters that have moved by a number of bytes, from (tasks, their program,
            bytes). The program is changed to the new tasks. If it is None, the tasks have to be made again.
        prepare: makes the steps of a list of works ready, for this step alone, from (works, moves). None if every work
            has a task.
    """

    name: str
    unsupported: Callable[[Work], str | None]
    task: Callable[[Work], Any]
    prepare_tasks: Callable[..., tuple[Any, Sequence[tuple[Sequence[int], Callable[[], None]]]]]
    prepare: Callable[..., list[tuple[list[int], Callable[[], None]]]] | None = None
    moved: Callable[[list[Any], Any, int], list[Any]] | None = None


def backend(device: torch.device, fused: bool | None) -> Backend | None:
    """The kernels for a device: Triton's on CUDA and ROCm, Numba's on a CPU; None: the eager path.

    With ``TRITON_INTERPRET=1`` and ``fused=True`` Triton's interpreter runs the kernels on a CPU: for tests, slowly.

    Raises:
        ValueError: ``fused=True`` and there are no kernels, or they cannot be imported (the message says why).
    """
    if fused is False:
        return None
    found: Backend | str = "there are kernels for cuda (Triton) and cpu (Numba) only"
    if device.type == "cuda":
        found = _triton()
    elif device.type == "cpu":
        found = _triton() if fused and interpreted() else _numba()
    if isinstance(found, Backend):
        return found
    if fused:
        raise ValueError(
            f"fused=True is not possible on {device}: {found}. Use fused=None to take eager steps where there are no "
            "kernels"
        )
    return None


@lru_cache(maxsize=1)
def _triton() -> Backend | str:
    """Triton's kernels, or why they cannot be used. A broken installation may raise any error when it is imported."""
    try:
        import triton  # noqa: F401

        from sketch_plugins.kernels.gpu import launch
    except Exception as error:
        return f"Triton cannot be imported ({_said(error)})"
    return Backend("triton", launch.unsupported, launch.task, launch.prepare_step, launch.prepare)


@lru_cache(maxsize=1)
def _numba() -> Backend | str:
    """Numba's kernels, or why they cannot be used."""
    try:
        import numba

        if getattr(numba.config, "DISABLE_JIT", False):
            return "Numba compiles nothing, because NUMBA_DISABLE_JIT is set"
        from sketch_plugins.kernels import cpu
    except ImportError as error:
        return f"Numba cannot be imported ({error}): pip install 'sketch-plugins[cpu]'"
    except Exception as error:
        return f"Numba cannot be imported ({_said(error)})"
    return Backend("numba", cpu.unsupported, cpu.prepare, cpu.prepare_step, moved=cpu.moved)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def describe(
    p: Tensor,
    group: Mapping[str, Any],
    grad: Gradient,
    rule: Rule,
    stores: tuple[Store | None, Store | None],
    state: Mapping[str, Any],
    new: bool = False,
) -> Work | None:
    """One parameter's step as a fused kernel gets it; None if its layout is not a matrix of rows.

    ``new``: no step has measured anything yet (`lagged_rms`).
    """
    parameter, gradient = grad.like(p)._flat, grad.matrix._flat
    if parameter is None or gradient is None or grad.dtype != torch.float32:
        return None
    first, second = stores
    last = state["rms"]["last"] if "rms" in state else None
    fresh = new or grad.rows is not None
    return Work(
        parameter, gradient, grad.rows, grad.packed,
        (first, ordered(first, grad, state["first_moment"])) if first else None,
        (second, ordered(second, grad, state["second_moment"])) if second else None,
        after=rule.precondition_first and first is not None,
        measure=fresh if last is not None else bool(group.get("scale_parameter") or group.get("update_clip")),
        stochastic=group["stochastic_rounding"] and p.dtype == torch.bfloat16 and CORRECTION not in state,
        seed=group["seed"],
        # These flags decide which kernels can take the step and what they are compiled for. `vector` sets the others.
        flags=(0 if grad.l2 is None else 1 << places.L2)
        | (1 << places.LOOKAHEAD if rule.lookahead and rule.first is not None else 0)
        | (1 << places.UNIT if rule.sign else 0),
        emas=(rule.first, rule.second),
        last=last,
        correction=state[CORRECTION]["codes"] if CORRECTION in state else None,
        matrices=grad.measured,
    )  # fmt: skip


def ordered(store: Store, grad: Gradient, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in the order of the store's layout: kernels take tensors by place, and a state dict may be sorted."""
    if len(state) < 2:
        return dict(state)
    return {name: state[name] for name in store.layout(grad.shape, grad.dtype)}


def choose(
    p: Tensor,
    group: Mapping[str, Any],
    grad: Gradient,
    rule: Rule,
    stores: tuple[Store | None, Store | None],
    state: Mapping[str, Any],
    large: bool,
    new: bool = False,
) -> tuple[Backend | None, Work | None]:
    """The kernels that take this step and the step as they get it, or (None, None) for the eager path.

    ``large``: the optimizer has a tensor of `CPU_MIN_SIZE` elements or more. For ``new`` see `describe`.
    """
    kernels = None if group["compile"] else backend(p.device, group["fused"])
    if kernels is not None and not (has_address(p) and has_address(grad.matrix.tensor)):
        if group["fused"]:
            odd = p if not has_address(p) else grad.matrix.tensor
            warn(
                f"fused=True: a parameter of shape {tuple(p.shape)} {EAGERLY}: a kernel "
                f"reads memory by its address, and a {type(odd).__name__} has no memory of its own"
            )
        return None, None
    if kernels is None or (p.device.type == "cpu" and not group["fused"] and not large):
        return None, None
    work = describe(p, group, grad, rule, stores, state, new)
    why = kernels.unsupported(work) if work else "no kernel supports its layout or dtype"
    if why is None:
        return kernels, work
    if group["fused"]:
        warn(f"fused=True: a parameter of shape {tuple(p.shape)} {EAGERLY} ({why})")
    return None, None


def numbers(rule: Rule, group: Mapping[str, Any], step: float | Tensor, l2: float | None = None) -> dict[int, Any]:
    """The numbers of a rule, by place; tensors if the rule has tensors. ``l2`` is the coupled weight decay."""
    denominator = rule.denominator
    out: dict[int, Any] = {
        places.STEP: rule.step_size * rule.correction,
        places.SHRINK: 1.0 - rule.decay,
        places.SIGN: -1.0 if group["maximize"] else 1.0,
        places.CORRECTION: rule.correction,
        places.INNER: 1.0,
        places.CLIP: group.get("update_clip", 0.0),
        places.RELATIVE: largest_rms(group) if group.get("scale_parameter") else 0.0,
        places.MEAN: float(group.get("bucket", "mean") == "mean"),
        places.NUMBER: step,
    }
    if rule.first is not None:
        out |= {places.DECAY1: rule.first.decay, places.GAIN1: rule.first.gain}
    if rule.second is not None:
        out |= {places.DECAY2: rule.second.decay, places.GAIN2: rule.second.gain}
    if denominator is not None:
        out |= {
            places.SCALE: 1.0 / denominator.divisor,
            places.SHIFT: denominator.shift,
            places.INSIDE: rule.floor,
            places.FLOOR: denominator.floor(torch.float32),
        }
    if rule.lookahead and rule.first is not None:
        out[places.LOOKAHEAD] = rule.lookahead
    if rule.sign:
        out[places.UNIT] = 1.0
    if l2 is not None:
        out[places.L2] = l2
    return out


def vector(values: Mapping[int, Any], device: torch.device, rows: int = 0) -> tuple[list[float] | Tensor, int]:
    """``(numbers, flags)`` for a `Work`. With ``rows``, the numbers are a matrix of so many rows.

    The numbers are a list, or a tensor on a device if a value is there (a learning rate, ``capturable``): it is not
    read.
    """
    flags = sum(1 << place for place, value in values.items() if isinstance(value, Tensor) or value)

    def stays(value: Any) -> bool:
        return isinstance(value, Tensor) and (rows > 0 or value.device.type != "cpu")

    plain = [0.0 if stays(v) else float(v) for v in (values.get(i, 0.0) for i in range(NUMBERS))]
    if not any(map(stays, values.values())):
        return plain, flags
    out = torch.tensor(plain, dtype=torch.float32)
    out = out.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else out.to(device)
    if rows:
        out = out.repeat(rows, 1)
    for place, value in values.items():
        if stays(value):
            out[..., place] = value.to(device=device, dtype=torch.float32)
    return out, flags

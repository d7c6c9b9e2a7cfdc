"""Checks of a part's state: it has to be what the options of its group describe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.optim.checks import (
    described,
    exact_step,
    has_numbers,
    steps_taken,
    why_impossible,
    why_not_plain,
)
from sketch_plugins.optim.layout import StateLayout, arithmetic
from sketch_plugins.optim.rule import Layout
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.state_names import PLACE, is_ours
from sketch_plugins.sharding.tensors import has_address, is_fake, overlaps


class StateChecks(StateLayout):
    """Checks the state of a part: saved state before it is loaded, and present state before a step."""

    def _check_state(self, p: Part, group: Mapping[str, Any], saved: Any, label: str, which: str = "saved") -> None:
        """Raise ValueError unless ``saved`` is the state that the group's options describe. Other code may add keys.

        Args:
            p: the part that the state belongs to.
            group: its group.
            saved: the state.
            label: the name of the part in messages.
            which: "saved" for a state dict, whose numbers are all checked, or "present".
        """
        stores = dict(zip(("first_moment", "second_moment"), self._stores(p, group), strict=True))
        further = self._beside(p, group)
        expected = self._expected(p, group)
        if isinstance(saved, Mapping):
            ours = {name for name in saved if is_ours(name) or name in expected}
            if not ours:
                return
        if not isinstance(saved, Mapping) or ours != expected:
            found = ", ".join(map(str, ours)) if isinstance(saved, Mapping) else repr(saved)
            raise ValueError(f"the {which} state of {label} contains {found}; expected {', '.join(sorted(expected))}")
        step = saved["step"]
        if which == "saved":
            if exact_step(step) is None:
                raise ValueError(
                    f"the saved step of {label} is {described(step)}; expected a tensor of one whole number >= 0 "
                    "that float32 holds exactly"
                )
        elif not (
            isinstance(step, Tensor)
            and step.numel() == 1
            and step.dtype == torch.float32
            and step.device.type != "meta"
            # A counter on a device (capturable) is checked when it is loaded, and not in every step.
            and (step.device.type != "cpu" or is_fake(step) or 0 <= steps_taken(step) < 1e18)
        ):
            raise ValueError(
                f"the {which} step of {label} is {described(step)}; expected a float32 tensor of one number >= 0"
            )
        if p.piece is not None and (
            not isinstance(saved[PLACE], Tensor)
            or why_not_plain(saved[PLACE]) is not None
            or saved[PLACE].tolist() != p.piece.place.tolist()
        ):
            raise ValueError(
                f"the {which} state of {label} belongs to another part of the parameter (row, column and the "
                f"whole shape are {_listed(saved[PLACE])}; expected {p.piece.place.tolist()}): it was saved with "
                "another number of processes or another layout. Convert a sharded checkpoint: sketch-plugins "
                "reshard CHECKPOINT --world-size N"
            )
        dtype = arithmetic(p)
        for name, store in stores.items():
            if store is not None:
                layout = store.layout(self._matrix_shape(p, group), dtype)
                _check_tensors(saved.get(name), layout, f"the {which} {name}", label)
                if which == "saved":
                    _check_numbers(p, saved[name], name, label, store.why_impossible)
                else:
                    _check_writable(p, saved[name], f"the {which} {name}", label)
        for name, part in further.items():
            _check_tensors(saved.get(name), part.layout(dtype), f"the {which} {name}", label)
            if which == "saved":
                _check_numbers(p, saved[name], name, label)
            else:
                _check_writable(p, saved[name], f"the {which} {name}", label)


def _check_tensors(have: Any, layout: Layout, what: str, label: str) -> None:
    if not isinstance(have, Mapping) or set(have) != set(layout):
        found = ", ".join(map(str, have)) if isinstance(have, Mapping) else "none"
        raise ValueError(f"{what} of {label} contains {found}; expected {', '.join(layout)}")
    for key, (size, kind) in layout.items():
        tensor = have[key]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} of {label} has {key!r} = {tensor!r}; expected a tensor")
        if tuple(tensor.shape) != tuple(size) or tensor.dtype != kind:
            raise ValueError(
                f"{what} of {label} has {key!r} of shape {tuple(tensor.shape)}, {tensor.dtype}; expected "
                f"{tuple(size)}, {kind}. The options of its group describe another state, or the parameter's "
                "shape or dtype has changed"
            )


def _check_writable(p: Part, have: Mapping[str, Tensor], what: str, label: str) -> None:
    """Raise ValueError if a step could not write the state in place."""
    for key, tensor in have.items():
        why = None
        if tensor.layout != torch.strided:
            why = f"with layout {tensor.layout}"
        elif tensor.device != p.device:
            why = f"on {tensor.device}, while the parameter is on {p.device}"
        elif tensor.is_inference() and not torch.is_inference_mode_enabled():
            why = "that was made in torch.inference_mode and cannot be written outside of it"
        elif has_address(tensor) and overlaps(tensor):
            why = f"with strides {tensor.stride()}, with which several elements share memory"
        if why is not None:
            raise ValueError(
                f"{what} of {label} has a tensor {key!r} {why}. Put a plain copy on {p.device} in its place"
            )


def _check_numbers(
    p: Part,
    have: Mapping[str, Tensor],
    name: str,
    label: str,
    why_else: Callable[[str, Tensor], str | None] = lambda key, tensor: None,
) -> None:
    """Raise ValueError if a saved tensor cannot be copied, or has numbers that no step leaves behind."""
    for key, tensor in have.items():
        why = why_not_plain(tensor)
        if why is not None:
            # If the parameter has no numbers, its state has none either.
            if (tensor.device.type == "meta" and p.device.type == "meta") or (is_fake(tensor) and is_fake(p.data)):
                continue
            raise ValueError(
                f"the saved {name} of {label} has a tensor {key!r} {why}; expected a plain strided tensor with values"
            )
        if not has_numbers(tensor):
            continue
        odd = why_else(key, tensor)
        if odd is not None:
            raise ValueError(
                f"the saved {name} of {label} has impossible values in {key!r}: {odd}. The checkpoint is damaged: "
                "load another one"
            )
        if not tensor.is_floating_point():
            continue
        squares = name in ("second_moment", "rms")
        # Squares of large gradients overflow, and the run goes on. Their factors must be finite, because infinity times
        # 0 is NaN.
        least, infinite = (0.0 if squares or key == "scales" else None), squares and key != "row"
        wrong = why_impossible(tensor, least, infinite)
        if wrong is not None:
            allowed = "finite numbers" if not infinite else "numbers"
            raise ValueError(
                f"the saved {name} of {label} has impossible values in {key!r}: {wrong}; allowed are "
                f"{allowed}{'' if least is None else ' >= 0'}. The run had probably diverged: load an earlier "
                "checkpoint"
            )


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) and why_not_plain(value) is None else described(value)

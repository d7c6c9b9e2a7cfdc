"""The usual learning rates of the optimizers, and a warning if a rate is far from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sketch_plugins.notices import warn
from sketch_plugins.optim.family import TYPICAL_RMS
from sketch_plugins.optim.layout import StateLayout
from sketch_plugins.sharding.tensors import is_fake

#: A rate is far from the usual one if it is this many times as large, or as small.
FAR = 30.0
#: Rates with which models are usually trained from scratch, for steps that are not relative to the weights.
ADAMW, ADAGRAD, LION = 1e-3, 1e-2, 1e-4


def why_large(optimizer: str, group: Mapping[str, Any], lr: float, usual: float) -> str | None:
    """What is wrong with a group's learning rate if it is far too large, or None.

    Args:
        optimizer: name of its class.
        group: the parameter group.
        lr: the learning rate that a step takes.
        usual: the rate for steps that are not relative to the weights: `ADAMW`, `ADAGRAD` or `LION`.
    """
    whose, usual = "Adagrad's" if usual == ADAGRAD else "AdamW's", _relative(group, usual)
    if lr <= FAR * usual:
        return None
    what = f"lr={lr:g} is {lr / usual:.0f} times the usual learning rate of {optimizer} with these options, {usual:.2g}"
    if group.get("scale_parameter") and not _is_relative(group):
        return (
            f"{what}, and the training may diverge. With reference_rms={group['reference_rms']:g} it takes {whose}: "
            "use that, or set reference_rms=1 for a learning rate that is relative to the weights"
            + (', or preset="paper" for the published SM3, whose learning rate is larger' if optimizer == "SM3" else "")
        )
    return f"{what}, and the training may diverge. Use a smaller learning rate"


def why_small(optimizer: str, group: Mapping[str, Any], lr: float, usual: float) -> str | None:
    """What is wrong with a group's learning rate if it is far too small, or None. The arguments are `why_large`'s.

    AdamW's rate may be arbitrarily small: 1e-5 fine-tunes a pretrained model. But if the options need another kind of
    rate, such a small one is probably AdamW's, by mistake.
    """
    sums, relative, usual = usual == ADAGRAD, _is_relative(group), _relative(group, usual)
    if lr == 0 or lr * FAR >= usual or not (sums or relative):  # a rate of 0 is intended
        return None
    what = (
        f"lr={lr:g} is {usual / lr:.0f} times smaller than the usual learning rate of {optimizer} with these options, "
        f"{usual:.2g}, and the model will hardly train"
    )
    if relative:
        return (
            f"{what}: scale_parameter makes it relative to the weights. Use a larger one, or set "
            f"reference_rms={TYPICAL_RMS:g} to use AdamW's"
        )
    instead = ', or the presets "default" or "ema", which take AdamW\'s' if optimizer == "SM3" else ""
    return f"{what}: its second moments are sums. Use a larger one{instead}"


def _is_relative(group: Mapping[str, Any]) -> bool:
    """Whether the learning rate is relative to the weights, unlike AdamW's or Adagrad's."""
    return bool(group.get("scale_parameter")) and group["reference_rms"] > 10 * TYPICAL_RMS


def _relative(group: Mapping[str, Any], usual: float) -> float:
    return usual * group["reference_rms"] / TYPICAL_RMS if group.get("scale_parameter") else usual


class RateWatch:
    """Checks the learning rates in some steps, and warns once of a rate that is far too large or far too small.

    Rates are checked in steps 1, 2, 4, 8, ..., because a schedule may begin with a small one. Whether a rate is too
    small is decided in the first step whose rates are not all 0, by the largest rate that is known: the one that the
    group was built with, its present one, and those that schedulers keep in the group. Rates on a device are not read.
    """

    def __init__(self) -> None:
        self.steps, self.built = 0, dict[int, float]()
        self.said_large = self.judged_small = False

    def add(self, group: Mapping[str, Any]) -> None:
        """Register a group that was added, with its learning rate."""
        for rate in _known(group, ("lr",)):
            self.built[id(group["params"])] = rate
        self.steps = 0  # so that rates are checked in the next step

    def step(self, optimizer: StateLayout) -> None:
        """Check the rates before a step."""
        self.steps += 1
        if self.steps & (self.steps - 1) or (self.said_large and self.judged_small):
            return
        groups = [(number, group) for number, group in enumerate(optimizer.param_groups) if group["params"]]
        if all(rate == 0 for _, group in groups for rate in _known(group, ("lr",))):
            self.steps = 0
            return
        name = type(optimizer).__name__
        for number, group in groups:
            usual = optimizer._usual_rate(group)
            now = _known(group, ("lr",))
            if usual is None or not now:
                continue
            largest = max([*_known(group, ("lr", "initial_lr", "max_lr")), self.built.get(id(group["params"]), 0.0)])
            large = None if self.said_large else why_large(name, group, now[0], usual)
            small = None if self.judged_small else why_small(name, group, largest, usual)
            for why in filter(None, (large, small)):
                warn(f"parameter group {number}: {why}")
            self.said_large = self.said_large or large is not None
            self.judged_small = self.judged_small or small is not None
        self.judged_small = True


def _known(group: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    """The rates under these keys, as far as they can be read without waiting for a device."""
    rates = [group[key] for key in keys if group.get(key) is not None]
    return [float(r) for r in rates if not isinstance(r, Tensor) or (r.device.type == "cpu" and not is_fake(r))]

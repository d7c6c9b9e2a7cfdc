"""Learning rates that an optimizer usually takes, and one warning where a rate is far from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sketch_plugins.notices import warn
from sketch_plugins.optim.family import TYPICAL_RMS
from sketch_plugins.optim.layout import StateLayout

#: A rate is far from the usual one where it is so many times as large, or as small.
FAR = 30.0
#: The rates with which models are usually trained from scratch, of steps that are not relative to the weights.
ADAMW, ADAGRAD, LION = 1e-3, 1e-2, 1e-4


def why_far(optimizer: str, group: Mapping[str, Any], given: float, usual: float) -> str | None:
    """What is wrong with a group's rate; None: it is not far from the usual one.

    AdamW's rate may be as small as anybody likes: 1e-5 fine-tunes a pretrained model. Other rates that are so small are
    AdamW's in the place of what the options need.

    Args:
        optimizer: name of its class.
        group: the parameter group.
        given: its learning rate.
        usual: that of steps that are not relative to the weights: `ADAMW`, `ADAGRAD`, `LION`.
    """
    relative, sums = bool(group.get("scale_parameter")), usual == ADAGRAD
    carries_over = not relative or group["reference_rms"] == TYPICAL_RMS
    if relative:
        usual *= group["reference_rms"] / TYPICAL_RMS
    if given > FAR * usual:
        what = f"it is {given / usual:.0f} times {usual:.2g}, which {optimizer} usually takes with these options"
        if relative and carries_over:
            return (
                f"{what}: since reference_rms={group['reference_rms']:g}, rates are those of steps that are not "
                "relative to the weights. The training may diverge. Use such a rate, or reference_rms=1, with which "
                "rates are relative"
            )
        return f"{what}. The training may diverge: use a smaller rate"
    if given * FAR >= usual or (carries_over and not sums):
        return None
    what = (
        f"it is {usual / given:.0f} times smaller than {usual:.2g}, which {optimizer} usually takes with these options"
    )
    if sums and carries_over:
        instead = ', or preset="ema", which takes AdamW\'s' if optimizer == "SM3" else ""
        return f"{what}: its second moments are sums. It will hardly train: use a larger rate{instead}"
    return (
        f"{what}: scale_parameter makes them relative to the weights. It will hardly train: use a larger rate, or "
        f"reference_rms={TYPICAL_RMS:g}, with which a rate carries over from steps that are not relative"
    )


def warn_of_far_rates(optimizer: StateLayout) -> None:
    """Warn once, of the first group whose rate is far from what its options usually take.

    The largest rate that is known counts: a schedule may have begun with a small one. Rates on a device are not read.
    """
    for number, group in enumerate(optimizer.param_groups):
        usual = optimizer._usual_rate(group) if group["params"] else None
        rates = [group[key] for key in ("lr", "initial_lr", "max_lr") if key in group]
        if usual is None or any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            continue
        given = max(map(float, rates))
        why = why_far(type(optimizer).__name__, group, given, usual) if given > 0 else None
        if why is not None:
            warn(f"parameter group {number} has lr={given:g}: {why}")
            return

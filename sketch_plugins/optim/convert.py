"""Converts state of torch's own optimizers to ours, so that a run that AdamW began goes on with less memory."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.checks import STATES, described, why_not_plain
from sketch_plugins.optim.clipping import bounded, excess
from sketch_plugins.optim.family import FAMILY
from sketch_plugins.optim.loading import check_containers
from sketch_plugins.optim.options import unboxed
from sketch_plugins.optim.sketchy import Sketchy
from sketch_plugins.optim.written import written_by
from sketch_plugins.sharding.blocks import matrix_shape
from sketch_plugins.sharding.dtensors import is_dtensor, largest, leading, local_of, wrap
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.state_names import PLACE, flattened, is_ours
from sketch_plugins.stores import Ema

#: Keys of torch's parameter groups that no schedule changes. Our groups have their own values, or no such key.
_TORCHS_OWN = {
    "params", "param_names", "amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused", "dampening",
    "nesterov", "lr_decay", "initial_accumulator_value", "decoupled_weight_decay", "weight_decay", "eps",
}  # fmt: skip


class _Kept(NamedTuple):
    """An accumulator ``s <- decay * s + gain * x`` of the optimizer that wrote the state."""

    values: Tensor
    decay: float
    gain: float

    def under(self, ema: Ema, steps: float) -> Tensor:
        """Its values if it had been kept as ``ema`` says. They are exact if the decays are the same."""
        if ema.decay == self.decay:
            factor = ema.gain / self.gain
        else:
            factor = ema.gain * _weight(ema.decay, steps) / (self.gain * _weight(self.decay, steps))
        return self.values if factor == 1.0 else self.values * factor


class _Source(NamedTuple):
    """What torch's optimizer kept of one parameter."""

    step: float
    first: _Kept | None
    second: _Kept | None


def convert_state(state_dict: Mapping[str, Any], optimizer: SketchOptimizer, *, keep: Collection[str] = ()) -> Any:
    r"""The state dict of `torch.optim.AdamW`, `Adam`, `SGD` or `Adagrad` as one that ``optimizer`` can load.

        optimizer.load_state_dict(convert_state(torch.load("optimizer.pt"), optimizer))

    The dense moments are put into the stores (`Store.assign`), so the run goes on where it was, with the estimates that
    the sketches give of them. If a store is dense, nothing is lost: ``CSAdam(preset="exact")`` continues AdamW,
    ``CSAdagrad(preset="exact")`` Adagrad and ``CSMomentum(preset="exact")`` SGD.

    From Adam, with :math:`\hat m = m / (1 - \beta_1^t)` and :math:`\hat v = v / (1 - \beta_2^t)`:

    =========== ====================================================================================================
    CSAdam      m and v. With other betas than Adam's, the averages that these betas would give if all gradients had
                been alike
    CSRMSprop   v
    CSLion      m, with Lion's own second beta
    CSMomentum  :math:`m / (1 - \beta_1)`, which is the sum that SGD keeps
    CSAdagrad   :math:`t \hat v`, which is the sum of squares
    SM3         v, or with ``betas[1] = 1`` as CSAdagrad; momentum: m divided by its root, elementwise. A run of Adagrad
                continues with ``preset="paper"``, whose second moments are sums, as Adagrad's are
    Sketchy     the graft's second moment as in the rows above. Momentum: m itself, or m divided by the graft's
                denominator, clipped and scaled, whichever it averages (``momentum_placement="after"``: it starts at 0).
                Covariances were never gathered: they start empty, and until the first solve the steps are the graft's
    =========== ====================================================================================================

    SGD keeps no squares, so only `CSMomentum` can be made from it. Adagrad keeps no momentum, so it starts at 0.

    Values of the groups that a schedule changes are taken over: ``lr``, ``betas`` (if Adam's betas have the same
    meaning for the optimizer) or ``momentum``, and the keys that schedulers keep there. Weight decay, epsilon and all
    other options are the optimizer's own.

    Args:
        state_dict: written by torch's optimizer for the same parameters in the same groups. For DTensors, and for the
            flat partitions of DeepSpeed's ZeRO, it is what that optimizer kept on this rank.
        optimizer: an optimizer of ours. It is not changed.
        keep: any of ``"lr"``, ``"betas"``, ``"momentum"``, which then stay as they are in ``optimizer``.

    Returns:
        A state dict for ``optimizer.load_state_dict``.

    Raises:
        TypeError: ``optimizer`` is none of ours.
        ValueError: groups, shapes or ``maximize`` differ; the state was written by another kind of optimizer (the
            message says what it contains) or by AMSGrad, or has numbers that are not finite; the optimizer needs
            squares of gradients and the state has none.
    """
    if not isinstance(optimizer, SketchOptimizer):
        raise TypeError(f"convert_state needs a sketched optimizer, not {type(optimizer).__name__}")
    for name in keep:
        if name not in ("lr", "betas", "momentum"):
            raise ValueError(f"keep={name!r} is not allowed: keep may contain 'lr', 'betas' and 'momentum'")
    check_containers(state_dict)
    out: dict[str, Any] = {"state": {}, "param_groups": optimizer._packed_groups()}
    given, kind = state_dict["param_groups"], type(optimizer).__name__
    if len(given) != len(out["param_groups"]):
        raise ValueError(
            f"the state dict has {len(given)} parameter groups, but this {kind} has {len(out['param_groups'])}"
        )
    for number, (group, own, saved) in enumerate(zip(optimizer.param_groups, out["param_groups"], given, strict=True)):
        writer = written_by(saved)
        if writer is not None:
            raise ValueError(f"the state dict was written by {writer} and needs no conversion: load it directly")
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"group {number} of the state dict has {len(saved['params'])} parameters, but this {kind}'s has "
                f"{len(own['params'])}"
            )
        own.update(_scheduled(optimizer, group, saved, keep))
        for index, (p, key, there) in enumerate(zip(group["params"], own["params"], saved["params"], strict=True)):
            state = state_dict["state"].get(there, {})
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"the state of {optimizer._label(group, index)} is {described(state)}; expected a mapping"
                )
            if state:
                made = _converted(optimizer, group, {**group, **own, "params": group["params"]}, index, p, state, saved)
                # State that wrappers of the optimizer keep there is taken over.
                made |= {name: value for name, value in state.items() if name not in STATES and not is_ours(name)}
                if made:
                    out["state"][key] = made
    known = {key for saved in given for key in saved["params"]}
    return {**out, "state": {**out["state"], **{k: v for k, v in state_dict["state"].items() if k not in known}}}


def is_foreign(state_dict: Mapping[str, Any]) -> bool:
    """Whether none of our optimizers wrote a state dict."""
    groups = state_dict.get("param_groups", ())
    return bool(groups) and all(written_by(group) is None for group in groups)


def _scheduled(
    optimizer: SketchOptimizer, group: Mapping[str, Any], saved: Mapping[str, Any], keep: Collection[str]
) -> dict[str, Any]:
    values = {
        key: value
        for key, value in saved.items()
        if key not in _TORCHS_OWN and key not in ("betas", "momentum") and (key == "lr" or key not in FAMILY)
    }
    if "betas" in saved and optimizer.ADAM_SETTINGS:
        if "momentum" in group:
            values["momentum"] = _betas(saved)[0]
        else:
            values["betas"] = _betas(saved)
    elif "momentum" in saved and "momentum" in group:
        values["momentum"] = saved["momentum"]
    if "lr" in keep:
        values.pop("initial_lr", None)
    own = optimizer.OPTIONS
    return {
        key: optimizer._group_value(key, value) if key in own else value
        for key, value in values.items()
        if key not in keep
    }


def _converted(
    optimizer: SketchOptimizer,
    present: dict[str, Any],
    group: dict[str, Any],
    index: int,
    p: Tensor,
    state: Mapping[str, Any],
    saved: Mapping[str, Any],
) -> dict[str, Any]:
    parts = optimizer._parts.of(index, p)
    if bool(saved.get("maximize", False)) != group["maximize"] and {"exp_avg", "momentum_buffer"} & state.keys():
        raise ValueError(
            f"the state dict was written with maximize={bool(saved.get('maximize', False))}, but this "
            f"{type(optimizer).__name__} has maximize={group['maximize']}, so its momentum would have the "
            "wrong sign. Build the optimizer with the saved value"
        )
    made: dict[str, Any] = {}
    for part in parts:
        if part.numel() == 0 and not is_dtensor(p):
            continue  # it takes no steps
        label = optimizer._label(present, part)  # `present` is the optimizer's own group, which has a number
        new = _part_state(optimizer, group, part, _source(part, state, saved, label), label)
        if part.key is not None:
            made |= flattened(new, part.key)
        elif is_dtensor(p) and leading(p):
            made = {"step": new["step"], **flattened(wrap(p, new, optimizer._layout(largest(p), group, part)))}
        else:
            made = flattened(new)
    return made


def _source(part: Part, state: Mapping[str, Any], saved: Mapping[str, Any], label: str) -> _Source:
    found = {key for key, value in state.items() if value is not None and key in STATES} - {"step"}
    if "max_exp_avg_sq" in found:
        raise ValueError(
            f"the state of {label} was written with amsgrad=True, and no sketched optimizer keeps AMSGrad's maxima"
        )
    least = 0 if found == {"sum"} else 1  # Adagrad has state before its first step
    step = _step(state["step"], label, least) if state.get("step") is not None else 1.0
    if found == {"exp_avg", "exp_avg_sq"}:
        beta1, beta2 = _betas(saved)
        return _Source(
            step,
            _Kept(_values(part, state, "exp_avg", label), beta1, 1.0 - beta1),
            _Kept(_values(part, state, "exp_avg_sq", label), beta2, 1.0 - beta2),
        )
    if found <= {"momentum_buffer"} and "momentum_buffer" in state:
        if not found:  # SGD without momentum
            return _Source(step, None, None)
        buffer = _values(part, state, "momentum_buffer", label)
        momentum, gain = _number(saved, "momentum"), 1.0 - _number(saved, "dampening", 0.0)
        if gain == 0.0:
            raise ValueError(
                f"the state of {label} was written with dampening=1, so its momentum has no gradients but the first, "
                "and cannot be converted"
            )
        return _Source(step, _Kept(buffer, momentum, gain), None)
    if found == {"sum"}:
        return _Source(step, None, _Kept(_values(part, state, "sum", label), 1.0, 1.0))
    held = ", ".join(sorted(map(str, set(state) - {"step"}))) or "nothing"
    raise ValueError(
        f"the state of {label} contains {held}; expected the state of AdamW or Adam (exp_avg, "
        "exp_avg_sq), SGD (momentum_buffer) or Adagrad (sum)"
    )


def _step(step: Any, label: str, least: int) -> float:
    """The number of steps, which must be at least ``least``."""
    odd = isinstance(step, Tensor) and (step.numel() != 1 or why_not_plain(step) is not None or step.is_complex())
    number: Any = unboxed(step) if not isinstance(step, Tensor) else None if odd else step.item()
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not real or not least <= number < 1e18 or number != int(number):
        raise ValueError(f"the step of {label} is {described(step)}; expected one whole number >= {least}")
    return float(number)


def _number(saved: Mapping[str, Any], name: str, default: Any = None) -> float:
    value = unboxed(saved.get(name, default))
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"a group of the state dict has {name}={saved.get(name, default)!r}; expected a number")
    return float(value)


def _betas(saved: Mapping[str, Any]) -> tuple[float, float]:
    try:
        beta1, beta2 = map(float, saved["betas"])
    except (TypeError, ValueError):
        beta1 = beta2 = math.nan
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"a group of the state dict has betas={saved['betas']!r}; expected two numbers in [0, 1)")
    return beta1, beta2


def _values(part: Part, state: Mapping[str, Any], name: str, label: str) -> Tensor:
    """One tensor of torch's state, for this part and in the arithmetic dtype."""
    if not isinstance(state[name], Tensor):
        raise ValueError(f"{name} of {label} is {described(state[name])}; expected a tensor")
    values = local_of(state[name])
    why = why_not_plain(values)
    if why is not None and not (values.device.type == "meta" and part.device.type == "meta"):
        raise ValueError(f"{name} of {label} is a tensor {why}; expected a plain strided tensor with values")
    if not values.is_floating_point():
        raise ValueError(f"{name} of {label} has dtype {values.dtype}; expected floating point numbers")
    if part.key is not None:
        assert part.piece is not None
        end = part.piece.offset + part.piece.numel
        if values.ndim != 1 or values.numel() < end:
            raise ValueError(f"{name} of {label} has shape {tuple(values.shape)}; expected a vector of {end} or more")
        values = part.piece.of(values)
    if values.shape != part.shape:
        raise ValueError(f"{name} of {label} has shape {tuple(values.shape)}; expected {tuple(part.shape)}")
    values = values.detach().to(part.device, torch.float64 if part.dtype == torch.float64 else torch.float32)
    if values.device.type == "meta":
        return values
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} of {label} contains values that are not finite")
    if name in ("exp_avg_sq", "sum") and values.numel() and bool(values.min() < 0):
        raise ValueError(f"{name} of {label} contains {values.min().item():g}; squares must be >= 0")
    return values


def _part_state(
    optimizer: SketchOptimizer, group: Mapping[str, Any], part: Part, source: _Source, label: str
) -> dict[str, Any]:
    dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
    batch = optimizer._batch(part, group)
    matrix = matrix_shape(part.shape, batch)
    stores = dict(zip(("first_moment", "second_moment"), optimizer._stores(part, group), strict=True))
    state: dict[str, Any] = {"step": torch.tensor(source.step, dtype=torch.float32, device="cpu")}
    for name, store in stores.items():
        if store is not None:
            state[name] = store.allocate(matrix, part.device, dtype)
    for name, further in optimizer._beside(part, group).items():
        state[name] = further.allocate(part.device, dtype)
    if part.piece is not None:
        state[PLACE] = part.piece.place
    if part.numel() == 0:
        return state
    rule = optimizer._rule(group, source.step, False)
    second = None
    first_store, second_store = stores["first_moment"], stores["second_moment"]
    if second_store is not None and rule.second is not None:
        if source.second is None:
            raise ValueError(
                f"{type(optimizer).__name__} needs averages of squared gradients, and the state of {label} has "
                "none: only CSMomentum can continue from SGD"
            )
        second = source.second.under(rule.second, source.step)
        second_store.assign(state["second_moment"], second.flatten(0, batch))
    if first_store is not None and source.first is not None:
        first = _first(optimizer, group, part, source, second)
        if first is not None:
            first_store.assign(state["first_moment"], first.flatten(0, batch))
    if "rms" in state:  # lagged_rms
        state["rms"]["last"].copy_(_measured(optimizer, group, part, source, second))
    return state


def _first(
    optimizer: SketchOptimizer, group: Mapping[str, Any], part: Part, source: _Source, second: Tensor | None
) -> Tensor | None:
    """The new first moment; None if it starts at 0."""
    assert source.first is not None
    rule = optimizer._rule(group, source.step, False)
    if not isinstance(optimizer, Sketchy):
        assert rule.first is not None
        m = source.first.under(rule.first, source.step)
        return _over_root(optimizer, group, m, second, source.step) if rule.precondition_first else m
    preconditioned = optimizer.preconditioner_of(part, group) is not None
    if preconditioned and group["momentum_placement"] == "after":
        return None
    beta1 = group["betas"][0]
    m = source.first.under(Ema(beta1, 1.0 - beta1), source.step)
    if group["graft"] == "none" or (preconditioned and group["input"] == "gradient"):
        return m
    update, matrices = _over_root(optimizer, group, m, second, source.step), optimizer._matrices(part, group)
    each = () if matrices is None else (matrices, *[1] * (update.ndim - 1))  # a factor for each matrix of a batch
    if (clip := excess(_rms(update, matrices), group)) is not None:
        update = update / clip.view(each)
    if preconditioned and group["scale_parameter"]:  # for other tensors the step contains this factor
        update = update * bounded(_rms(part.data.detach().to(update.dtype), matrices), group).view(each)
    return update


def _rms(x: Tensor, matrices: int | None) -> Tensor:
    """The root mean square, 0-d; of each matrix of a batch, ``(matrices,)``."""
    return (x.square().mean() if matrices is None else x.square().flatten(1).mean(1)).sqrt()


def _measured(
    optimizer: SketchOptimizer, group: Mapping[str, Any], part: Part, source: _Source, second: Tensor | None
) -> Tensor:
    """RMS of the last update and of the parameter, for ``lagged_rms``.

    Of the gradient only its mean square is known, so the root of that stands for the gradient.
    """
    rule = optimizer._rule(group, source.step, False)
    p = part.data.detach()
    if source.first is not None and rule.first is not None and not rule.precondition_first:
        numerator = source.first.under(rule.first, source.step)
    elif source.second is not None:
        numerator = source.second.under(Ema(1.0, 1.0 / source.step), source.step).sqrt()
    else:
        numerator = torch.zeros_like(p)
    update = _over_root(optimizer, group, numerator, second, source.step) * rule.correction
    matrices = optimizer._matrices(part, group)
    return torch.stack([_rms(x.to(update.dtype), matrices) for x in (update, p)], dim=-1)


def _over_root(
    optimizer: SketchOptimizer, group: Mapping[str, Any], m: Tensor, second: Tensor | None, step: float
) -> Tensor:
    rule = optimizer._rule(group, step, False)
    if second is None or rule.denominator is None:
        return m
    root = rule.denominator.of((second + rule.floor).sqrt_())
    return torch.where(m == 0, torch.zeros_like(m), m / root)  # 0 / 0 counts as no step


def _weight(decay: float, steps: float) -> float:
    """The sum of the weights of ``steps`` inputs."""
    return steps if decay == 1.0 else (1.0 - decay**steps) / (1.0 - decay)

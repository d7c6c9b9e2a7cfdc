"""Sparsified SGD with memory, as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor
from sketch_plugins.comm.randk import RandK
from sketch_plugins.comm.topk import TopK
from sketch_plugins.optim.ambient import neutral, outside_graphs
from sketch_plugins.optim.checks import STATES, copied, described, exact_step, is_fake, why_impossible, why_not_plain
from sketch_plugins.optim.declaring import without_effect
from sketch_plugins.optim.family import FAMILY, Torchs
from sketch_plugins.optim.groups import check_rate_device
from sketch_plugins.optim.loading import check_containers, load
from sketch_plugins.optim.options import NoEffect, Option, rate, validate
from sketch_plugins.sharding.names import names_of
from sketch_plugins.sharding.tensors import check_writable, has_address, is_freed, overlaps, plain

_OPTIONS = {
    "lr": FAMILY["lr"],
    "k": Option("k", int, "entries", allowed="None or an integer >= 1", check=lambda v: v >= 1),
    "density": Option("density", float, "k / d", allowed="a number in (0, 1]", check=lambda v: 0 < v <= 1),
    "compressor": Option("compressor", str, "which entries", choices=("topk", "randk")),
    "shift": Option("shift", float, "a", allowed="None or a number > 0", check=lambda v: v > 0),
    "weight_decay": FAMILY["weight_decay"],
    "averaging": Option("averaging", bool, "keep the weighted average"),
    "memory": Option("memory", bool, "keep what is not applied"),
    "seed": FAMILY["seed"],
}
_OPTIONAL = ("k", "shift")
_NO_EFFECT = {
    **without_effect(Torchs),
    "maximize": NoEffect("maximize", bool, "it only descends", choices=(False,)),
    "fused": NoEffect("fused", bool, "it has no kernels", choices=(None, False)),
    "capturable": NoEffect("capturable", bool, "its steps cannot be captured in a CUDA graph", choices=(False,)),
}


class MemSGD(torch.optim.Optimizer):
    r"""SGD that applies k of the d entries of each step and keeps the others in an error memory.

    .. math::
        m \leftarrow m + \eta_t g_t, \quad I = \text{the } k \text{ largest of } |m| \text{, or } k \text{ random ones},
        \quad x_I \leftarrow x_I - m_I, \quad m_I \leftarrow 0

    Each parameter is treated by itself. :math:`x_t - m_t` is the iterate of plain SGD on the same gradients. With
    :math:`k = d` there is no memory, and every step is ``torch.optim.SGD``'s. For strongly convex problems the paper
    has

    .. math:: \eta_t = \frac{c}{a + t}, \qquad \bar x_T = \frac{1}{S_T} \sum_{t < T} (a + t)^2\, x_t

    with a shift a of the order of d / k. Here that is ``shift=a`` and ``lr`` :math:`= c / a`, the rate of the first
    step.

    State of a parameter: the memory, 4 bytes an entry (8 for float64), the same again with ``averaging``, and a step
    counter. This is the method on one process; `sketch_plugins.comm.memsgd_hook` makes several processes send less.

    Args:
        params: parameters or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor (default 0.1).
        k: number of entries of each parameter, at most all of them. None (default): ``density`` decides.
        density: k / d, rounded to an integer of at least 1 (default 0.01).
        compressor: ``"topk"`` (default), or ``"randk"``, drawn from ``seed``, the parameter's number and its step.
        shift: a > 0: the rate of step t (from 0) is ``lr * a / (a + t)``. None (default): it is ``lr``.
        weight_decay: lambda, :math:`g \leftarrow g + \lambda x` (default 0).
        averaging: keep the weighted average of the iterates for `averaged_parameters` (default False).
        memory: False drops the entries that are not applied, which does not converge; for comparisons (default True).
        seed: seed of random entries (default 0).
        amsgrad, foreach, differentiable, maximize, fused, capturable: accepted for compatibility with torch's
            optimizers; only the defaults.

    Raises:
        ValueError: an option has a value that is not allowed; in `step`, a parameter is a DTensor, complex or cannot be
            written, its state was changed to something else, or a sparse gradient meets weight decay. Nothing has been
            changed then.

    Source: https://arxiv.org/abs/1809.07599, Alg. 1. Deviations: parameters are sparsified one by one; without
    ``shift`` the weights of the average have a = 1; the memory also keeps what half-precision parameters round off.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        *,
        k: int | None = None,
        density: float = 0.01,
        compressor: str = "topk",
        shift: float | None = None,
        weight_decay: float = 0.0,
        averaging: bool = False,
        memory: bool = True,
        seed: int = 0,
        amsgrad: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        _accept_without_effect(locals())
        super().__init__(params, _checked({name: value for name, value in locals().items() if name in _OPTIONS}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose options are checked."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        _accept_without_effect(param_group)
        param_group.update(_checked({name: param_group[name] for name in _OPTIONS if name in param_group}))
        super().add_param_group(param_group)

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. Returns the closure's result, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found: list[tuple[Tensor, Tensor, dict[str, Any], int]] = []
        before = 0
        for number, group in enumerate(self.param_groups):
            # An option may have been changed in the group.
            _accept_without_effect(group)
            group.update(_checked({name: group[name] for name in _OPTIONS}))
            if isinstance(group["lr"], Tensor):
                check_rate_device(group["lr"], group["params"], f"param_groups[{number}]")
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    label = _label(group, number, index)
                    _check(p, group, label)
                    _check_state(p, self.state.get(p, {}), "present", label)
                    found.append((p, _gradient(p.grad, label), group, before + index))
            before += len(group["params"])
        with neutral():
            for p, g, group, place in found:
                self._one(p, g, group, place)
        return loss

    def averaged_parameters(self) -> list[Tensor]:
        r"""The weighted average :math:`\bar x_T` of the iterates before each step, in the order of the parameters.

        Parameters that have not moved yet are returned as they are. All are copies, in float32 for half precision.

        Raises:
            ValueError: a group has ``averaging=False``.
        """
        out = []
        for index, group in enumerate(self.param_groups):
            if not group["averaging"]:
                raise ValueError(
                    f"group {index} has averaging=False, so there is no average: build MemSGD with averaging=True"
                )
            for p in group["params"]:
                kept = self.state.get(p, {}).get("average")
                out.append(p.detach().to(_arithmetic(p), copy=True) if kept is None else kept.clone())
        return out

    def _one(self, owner: Tensor, g: Tensor, group: Mapping[str, Any], number: int) -> None:
        """Take one parameter's step. Everything is computed first, and written when nothing can fail any more."""
        # Subclasses without memory of their own are changed in an ordinary copy.
        p = owner if has_address(owner) else plain(owner)
        state, size, kind = self.state.get(owner, {}), p.numel(), _arithmetic(p)
        # The state may have keys of other code.
        t = int(state["step"]) if "step" in state else 0
        new = {"step": torch.tensor(t + 1.0, dtype=torch.float32)}
        if group["averaging"]:
            new["average"] = self._average(p, state, t, group["shift"] or 1.0)
        if not size:
            self._keep(owner, new)
            return
        lr = rate(group)
        if group["shift"] is not None:
            lr = lr * (group["shift"] / (group["shift"] + t))
        g = g if g.is_sparse else g.to(kind)
        if group["weight_decay"]:
            g = g.add(p, alpha=group["weight_decay"])
        density = group["density"] if group["k"] is None else min(1.0, group["k"] / size)
        compressor: Compressor = TopK() if group["compressor"] == "topk" else RandK(group["seed"])
        if compressor.count(size, density) == size and "error" not in state and p.dtype == kind:
            # There is nothing to remember, so this is torch's own step, to the last bit.
            alpha: Any = -lr
            new = {name: self._own(owner, name, value) for name, value in new.items()}
            p.add_(g, alpha=alpha)
            if p is not owner:
                owner.copy_(p)
            self._keep(owner, new)
            return
        m = state["error"] if "error" in state else torch.zeros(size, dtype=kind, device=p.device)
        step = g * lr if isinstance(lr, Tensor) else g
        m = torch.add(m.view(p.shape), step, alpha=1 if isinstance(lr, Tensor) else lr).reshape(-1)
        payload = compressor.compress(m, density, step=t, key=number)
        where = compressor.positions(payload.at, size, density)
        flat = p.detach().view(-1) if p.is_contiguous() else p.detach().flatten()
        old = flat[where]
        values = (old.to(kind) - payload.values).to(p.dtype)
        if not group["memory"]:
            m.zero_()
        elif p.dtype == kind:
            m.index_fill_(0, where, 0.0)
        else:  # the memory keeps what rounding has kept from the parameter
            m.index_copy_(0, where, payload.values - (old.to(kind) - values.to(kind)))
        new["error"] = m
        new = {name: self._own(owner, name, value) for name, value in new.items()}
        flat[where] = values
        if not p.is_contiguous():
            p.copy_(flat.view(p.shape))
        if p is not owner:
            owner.copy_(p)
        self._keep(owner, new)

    def _own(self, p: Tensor, name: str, value: Tensor) -> Tensor:
        """A tensor that can stay in the state. State that exists is written in place later, and needs no such tensor.

        A step outside of torch.inference_mode could not change inference tensors.
        """
        if _in_place(self.state.get(p, {}), name) or not value.is_inference():
            return value
        with torch.inference_mode(False):
            own = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        return own.copy_(value)

    def _keep(self, p: Tensor, new: Mapping[str, Tensor]) -> None:
        """Write the state in place, because other processes may share its memory (Hogwild)."""
        state = self.state[p]
        for name, value in new.items():
            if _in_place(state, name):
                state[name].copy_(value.view(state[name].shape))
            else:
                state[name] = value

    def _average(self, p: Tensor, state: Mapping[str, Any], t: int, a: float) -> Tensor:
        if "average" not in state:
            return p.detach().to(_arithmetic(p), copy=True)
        total = (t + 1) * a * a + a * t * (t + 1) + t * (t + 1) * (2 * t + 1) / 6  # the sum of (a + i)^2 up to t
        kept: Tensor = state["average"]
        return kept.lerp(p.detach().to(kept.dtype), (a + t) ** 2 / total)

    def _check_incoming(self, incoming: Any) -> None:
        check_containers(incoming, "the state dict of MemSGD")
        for group in incoming["param_groups"]:
            _checked({name: group[name] for name in _OPTIONS if name in group})
        for saved, i, p in _triples(incoming["param_groups"], self.param_groups):
            if i not in incoming["state"]:
                continue
            state, what = incoming["state"][i], f"the saved state of parameter {i}"
            if not isinstance(state, Mapping):
                raise ValueError(f"{what} is {described(state)}; expected a mapping")
            ours = "compressor" in saved  # groups of MemSGD have this option; other code may keep tensors beside ours
            others = [name for name in state if name in STATES and name not in _STATE]
            if others and not ours:
                raise ValueError(
                    f"{what} contains {others[0]!r}, which another optimizer wrote; "
                    "expected the tensors 'step', 'error' and 'average'"
                )
            kept = {name: value for name, value in state.items() if name in _STATE}
            if kept and "step" not in kept:
                raise ValueError(f"{what} lacks 'step'; it contains {', '.join(kept)}")
            _check_state(p, kept, "saved", f"parameter {i}")
            for name in kept.keys() - {"step"}:
                wrong = why_impossible(kept[name], None, False)
                if wrong is not None:
                    raise ValueError(
                        f"{what} has {wrong} in {name!r}, but its values must be finite. The "
                        "run had probably diverged: load an earlier checkpoint"
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtype of every tensor.

        Raises:
            ValueError: as in torch; also if an option is not allowed, or a tensor is missing, has another size or
                dtype, or is not finite. Nothing has changed then.
        """

        def prepare(incoming: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
            self._check_incoming(incoming)
            groups = incoming["param_groups"]
            if len(groups) == len(self.param_groups):  # otherwise torch raises the error
                own = [{name: group[name] for name in _OPTIONS} for group in self.param_groups]
                groups = [{**ours, **theirs} for ours, theirs in zip(own, groups, strict=True)]
            incoming = {**incoming, "param_groups": groups}
            made: dict[Any, Any] = {}
            saved = dict(incoming["state"])
            for _, i, p in _triples(incoming["param_groups"], self.param_groups):
                if i in saved:
                    state = saved.pop(i)
                    made[p] = {name: copied(value, p.device) for name, value in state.items() if name != "step"}
                    step = exact_step(state.get("step"))
                    if step is not None:
                        made[p]["step"] = step.cpu()
            return incoming, {**made, **saved}  # entries of no parameter belong to other code

        load(self, state_dict, prepare)


#: Our names in the state of a parameter. Wrappers of optimizers keep tensors of their own beside them.
_STATE = ("step", "error", "average")


def _triples(saved: Any, groups: Any) -> Iterator[tuple[Mapping[str, Any], Any, Tensor]]:
    """(saved group, key of the state, parameter) of each parameter of a state dict."""
    params = (p for group in groups for p in group["params"])
    keys = ((group, key) for group in saved for key in group["params"])
    yield from ((group, key, p) for (group, key), p in zip(keys, params, strict=False))


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if value is not None or name not in _OPTIONAL}
    return {**options, **validate(_OPTIONS, given, "MemSGD")}


def _accept_without_effect(given: Mapping[str, Any]) -> None:
    for name, argument in _NO_EFFECT.items():
        if name in given:
            argument.accept(given[name], "MemSGD")


def _label(group: Mapping[str, Any], number: int, index: int) -> str:
    names, shape = names_of(group), tuple(group["params"][index].shape)
    if names:
        return f"parameter {names[index]!r} of shape {shape}"
    return f"parameter {index} of group {number}, of shape {shape},"


def _gradient(grad: Tensor, label: str) -> Tensor:
    """The gradient as an ordinary tensor."""
    if is_freed(grad):
        raise ValueError(f"{label}: the memory of its gradient has been freed (its storage has 0 bytes)")
    grad = plain(grad)
    return grad if type(grad) is Tensor else grad.as_subclass(Tensor)


def _in_place(state: Mapping[str, Any], name: str) -> bool:
    return name in state and (torch.is_inference_mode_enabled() or not state[name].is_inference())


def _check_state(p: Tensor, state: Mapping[str, Any], which: str, label: str) -> None:
    """Raise ValueError unless the tensors of a parameter's state ("saved" or "present") are as `MemSGD` writes them."""
    what = f"the {which} state of {label}"
    for name, value in state.items():
        if name not in _STATE:
            continue
        if name == "step":
            if exact_step(value) is None:
                raise ValueError(
                    f"the {which} step of {label} is {described(value)}; expected a tensor of one whole number >= 0 "
                    "that float32 holds exactly"
                )
            continue
        shaped = isinstance(value, Tensor) and (
            tuple(value.shape) == tuple(p.shape) if name == "average" else value.numel() == p.numel()
        )
        if not shaped:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{what} has {name!r} ({found}): expected tensors 'step', 'error' of {p.numel()} entries, and "
                f"'average' of shape {tuple(p.shape)}"
            )
        why = why_not_plain(value)
        if why is not None and not (value.device.type == "meta" and p.device.type == "meta"):
            raise ValueError(f"{what} has a tensor {name!r} {why}; expected a plain strided tensor with values")
        if which == "present" and (value.device != p.device or overlaps(value)):
            where = f"on {value.device}" if value.device != p.device else "whose elements share memory"
            raise ValueError(f"{what} has a tensor {name!r} {where}; expected a plain tensor on {p.device}")
        if value.dtype != _arithmetic(p):
            raise ValueError(f"{what} has {name!r} of {value.dtype}; expected {_arithmetic(p)}")


def _check(p: Tensor, group: Mapping[str, Any], label: str) -> None:
    if is_fake(p):
        raise ValueError(f"{label} is a fake tensor (FakeTensorMode) without values, and a step needs values")
    if hasattr(p, "placements"):
        raise ValueError(f"{label} is a DTensor, and MemSGD supports plain tensors only")
    if p.is_complex():
        raise ValueError(f"{label} is complex ({p.dtype}): pass torch.view_as_real(parameter)")
    if is_freed(p):
        raise ValueError(f"{label}: the memory of the parameter has been freed (its storage has 0 bytes)")
    check_writable(p, label)
    if p.grad is not None and p.grad.is_sparse and group["weight_decay"]:
        raise ValueError(
            f"weight_decay={group['weight_decay']!r} does not support a sparse gradient: use weight_decay=0 "
            "for this group"
        )


def _arithmetic(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32

"""Weights with all the bits that a run has of them (``weight_bits``), and models in half precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import HALF, decoded, write_nearest
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.weight_bits import corrections, corrects
from sketch_plugins.sharding.parts import Part, is_dtensor, local_of


def full_precision_state_dict(
    model: torch.nn.Module, optimizer: Any, *, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """``model.state_dict()`` in float32: of weights with corrections all 24 or 32 bits, as the next step reads them.

    Other bfloat16 and float16 parameters and buffers are widened; what is float32, or no number of half precision, is
    as in ``state_dict()``. Names that stand for one tensor (tied weights) have one here, too. DTensors (FSDP2) stay
    DTensors of the same placement. Nothing is changed but corrections that are void, which are set to 0.

    Args:
        model: whose parameters the optimizer has.
        optimizer: an optimizer of sketch-plugins, or what a framework has wrapped around one (``.optimizer``).
        device: where to put each tensor as it is made; None: where the parameter is. They take 4 bytes a parameter.

    Returns:
        Name -> tensor, detached. Float32 weights are the model's own memory unless ``device`` is another one.

    Raises:
        ValueError: there is no optimizer of sketch-plugins; it steps flat partitions (ZeRO), whose float32 weights
            DeepSpeed has.
    """
    own = _unwrapped(optimizer)
    kept = _corrections(own)
    made: dict[int, Tensor] = {}
    found = model.state_dict(keep_vars=True)
    out = type(found)() if isinstance(found, dict) else {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            out[name] = value
            continue
        if id(value) not in made:
            made[id(value)] = _widened(value, kept.get(id(value)), device)
        out[name] = made[id(value)]
    if hasattr(found, "_metadata"):
        out._metadata = found._metadata  # type: ignore[attr-defined]
    return out


def load_full_precision_state_dict(
    model: torch.nn.Module, optimizer: Any, state_dict: Mapping[str, Any], *, strict: bool = True
) -> None:
    """The inverse of `full_precision_state_dict`: weights, and what they have beyond the model's dtype.

    Into bfloat16 and float16 parameters of an optimizer with ``weight_bits``: the nearest weight and its correction
    (24 bits to nearest, without noise), whether or not the optimizer has stepped yet. Into all others as
    ``model.load_state_dict`` does. A float32 model needs nothing but that.

    Args:
        model: whose parameters the optimizer has.
        optimizer: an optimizer of sketch-plugins, or what a framework has wrapped around one.
        state_dict: name -> tensor; of a sharded parameter (DTensor) a DTensor or the whole tensor.
        strict: names that are missing, or that the model does not have, are an error.

    Raises:
        ValueError: names or shapes are not the model's (nothing has been changed then), or as in
            `full_precision_state_dict`.
    """
    own, found = _unwrapped(optimizer), model.state_dict(keep_vars=True)
    missing = [name for name in found if name not in state_dict]
    unknown = [name for name in state_dict if name not in found]
    if strict and (missing or unknown):
        raise ValueError(
            f"the state dict does not fit the model: missing {_some(missing)}; not of the model {_some(unknown)}. "
            "strict=False takes what fits"
        )
    for name, value in found.items():
        given = state_dict.get(name)
        if isinstance(value, Tensor) and isinstance(given, Tensor) and given.shape != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(given.shape)} in the state dict and {tuple(value.shape)} here")
    _corrections(own)  # those that are void are 0 now
    with torch.no_grad():
        values = {name: _placed(value, found[name]) for name, value in state_dict.items() if name in found}
        model.load_state_dict(values, strict=False)
        places = {id(value): name for name, value in found.items() if name in values}
        parts = []
        for group in own.param_groups:
            for index, owner in enumerate(group["params"]):
                if id(owner) not in places:
                    continue
                for part in own._parts.of(index, owner):
                    if corrects(part, group) and part.numel():
                        parts.append((part, group, local_of(values[places[id(owner)]])))
        for part, group, value in parts:
            own._start(part, group)
            codes = corrections(part, own.state[part.owner])
            assert codes is not None
            write_nearest(value.to(part.device, torch.float32), part.data, codes[0].view(part.shape))
            codes[1].zero_()
        assert own._written is not None
        own._written.note((part, own.state[part.owner]) for part, _, _ in parts)


def cast_model(
    model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, keep: Iterable[str | type] = ()
) -> torch.nn.Module:
    """Cast a model's floating point parameters to half precision, in place, but for what has to stay as it is.

    These stay: modules with running statistics (batch norms), whole; non-persistent buffers, which hold constants that
    a model computes for itself (rotary frequencies); what ``keep`` names; a parameter that one of these shares with
    other modules. A checkpoint that was saved in float32 is loaded in float32 first and cast then.

    Args:
        model: to be cast, before it is sharded and before an optimizer has state for it.
        dtype: torch.bfloat16 or torch.float16; torch.float32 is the way back.
        keep: names of modules or parameters (``"lm_head"``, ``"layers.*.norm"`` by `fnmatch`; a module stays with all
            in it), or classes of modules.

    Returns:
        The model.

    Raises:
        ValueError: another dtype; something in ``keep`` is nowhere in the model: nothing has been changed then.
    """
    if dtype not in (*HALF, torch.float32):
        raise ValueError(f"dtype={dtype} is not one of torch.bfloat16, torch.float16, torch.float32")
    staying, kept = _staying(model, (keep,) if isinstance(keep, (str, type)) else tuple(keep))

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and id(tensor) not in kept else tensor

    for module in model.modules():
        if module not in staying:
            constants = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
            module._apply(cast, recurse=False)
            module._buffers.update(constants)
    return model


def _staying(model: torch.nn.Module, keep: tuple[str | type, ...]) -> tuple[set[torch.nn.Module], set[int]]:
    """Modules that are not cast, and the identities of tensors that are not."""
    staying = {one for one in model.modules() if getattr(one, "running_mean", None) is not None}
    kept: set[int] = set()
    for what in keep:
        found = False
        for name, module in model.named_modules():
            named = isinstance(what, str) and name and fnmatch.fnmatchcase(name, what)
            if named or (isinstance(what, type) and isinstance(module, what)):
                found = True
                staying.update(module.modules())
        for name, p in model.named_parameters(remove_duplicate=False):
            if isinstance(what, str) and fnmatch.fnmatchcase(name, what):
                found = True
                kept.add(id(p))
        if not found:
            said = repr(what) if isinstance(what, str) else what.__name__
            raise ValueError(f"keep={said} is no module, parameter or class of modules of {type(model).__name__}")
    for module in staying:
        kept.update(map(id, module.parameters(recurse=False)))
    return staying, kept


def _unwrapped(optimizer: Any) -> SketchOptimizer:
    inner = optimizer
    for _ in range(4):
        if isinstance(inner, SketchOptimizer):
            return inner
        inner = getattr(inner, "optimizer", None)
    raise ValueError(
        f"{type(optimizer).__name__} is no optimizer of sketch-plugins with weight_bits, and wraps none: without one "
        "model.state_dict() holds all there is"
    )


def _corrections(optimizer: SketchOptimizer) -> dict[int, tuple[Part, Tensor]]:
    """Identity of a parameter -> its part on this rank and the codes, where there are some; none that are void."""
    optimizer._check_weights()
    out = {}
    for group in optimizer.param_groups:
        for part, state in optimizer._parts_with_state([group]):
            if part.key is not None:
                raise ValueError(
                    "the optimizer steps flat partitions of parameters (ZeRO), whose float32 weights DeepSpeed keeps: "
                    "use its zero_to_fp32"
                )
            found = corrections(part, state)
            if found is not None:
                out[id(part.owner)] = part, found[0]
    return out


def _widened(value: Tensor, kept: tuple[Part, Tensor] | None, device: torch.device | str | None) -> Tensor:
    value = value.detach()
    if kept is not None:
        part, codes = kept
        local = decoded(part.data.detach(), codes.view(part.shape))
        value = _like(local, value)
    elif value.dtype in HALF:
        value = value.to(torch.float32)
    return value if device is None else value.to(device)


def _like(local: Tensor, whole: Tensor) -> Tensor:
    """A shard as a DTensor where the whole is one."""
    if not is_dtensor(whole):
        return local
    given: Any = whole
    return type(given).from_local(
        local, given.device_mesh, given.placements, run_check=False, shape=given.shape, stride=given.stride()
    )


def _placed(value: Any, owner: Any) -> Any:
    """A value for a tensor of the model, spread over ranks as that is."""
    if not isinstance(value, Tensor):
        return value
    if not is_dtensor(owner):
        whole: Any = value
        return whole.full_tensor() if is_dtensor(value) else value
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements)
    given: Any = value
    return given if given.placements == owner.placements else given.redistribute(owner.device_mesh, owner.placements)


def _some(names: list[str]) -> str:
    listed: Iterator[str] = map(repr, names[:3])
    return (", ".join(listed) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "nothing"

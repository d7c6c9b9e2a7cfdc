"""Saves and loads weights with the bits that ``weight_bits`` keeps, and casts models to half precision."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import HALF, decoded, write_nearest
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.weight_bits import corrections, corrects
from sketch_plugins.sharding.dtensors import is_dtensor, local_of
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.sharding.state_names import is_ours


def full_precision_state_dict(
    model: torch.nn.Module,
    optimizer: Any,
    *,
    device: torch.device | str | None = None,
    whole: bool = False,
    keep: bool = True,
) -> dict[str, Any]:
    """``model.state_dict()`` in float32: weights with corrections have all 24 or 32 bits, as the next step reads them.

    Other bfloat16 and float16 parameters and buffers are widened. Everything else is as in ``state_dict()``. Names of
    one tensor (tied weights) share one tensor here, too. DTensors (FSDP2) stay DTensors of the same placement, unless
    ``whole`` is set. Nothing is changed, except that void corrections are set to 0.

    Args:
        model: has all parameters with corrections of the optimizer (or of the optimizers).
        optimizer: an optimizer of sketch-plugins, or a framework's wrapper of one (``.optimizer``). A list of them, if
            several step the model.
        device: where to put the tensors. They are made one after the other, so the parameters' device only needs room
            for one of them. None: they stay where the parameters are. All together take 4 bytes a parameter.
        whole: gather DTensors, one after the other. Every process of their meshes has to call this.
        keep: False on processes that only take part in gathering: they make only what is gathered, and return nothing.

    Returns:
        The detached tensors, by name. Float32 weights share the model's memory unless ``device`` is another one.

    Raises:
        ValueError: there is no optimizer of sketch-plugins, or none with ``weight_bits``; parameters with corrections
            do not belong to the model (it is a copy, or a part of what is trained); or the optimizer steps flat
            partitions (ZeRO), whose float32 weights DeepSpeed has.
    """
    optimizers, found = _unwrapped(optimizer), model.state_dict(keep_vars=True)
    kept = _corrected(optimizers, model, found)
    for own in optimizers:
        own._check_weights()
    made: dict[int, Any] = {}
    out = type(found)() if isinstance(found, dict) else {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            if keep:
                out[name] = value
            continue
        if id(value) not in made:
            if not keep and not (whole and is_dtensor(value)):
                continue
            wide: Any = _widened(value, kept.get(id(value)))
            if whole and is_dtensor(wide):
                wide = wide.full_tensor()
            # Tensors that are not kept are noted, too, so that all processes gather tied weights once.
            made[id(value)] = None if not keep else wide if device is None else wide.to(device)
            del wide
        if keep:
            out[name] = made[id(value)]
    if hasattr(found, "_metadata"):
        out._metadata = found._metadata  # type: ignore[attr-defined]
    return out


def load_full_precision_state_dict(
    model: torch.nn.Module, optimizer: Any, state_dict: Mapping[str, Any], *, strict: bool = True
) -> None:
    """The inverse of `full_precision_state_dict`: loads weights and what they have beyond the model's dtype.

    A bfloat16 or float16 parameter of an optimizer with ``weight_bits`` gets the nearest weight and its correction (24
    bits are rounded to nearest, without noise), whether or not the optimizer has stepped yet. All others are loaded as
    by ``model.load_state_dict``. That includes parameters of an optimizer that is not given; their corrections are void
    then. A float32 model only needs ``load_state_dict``.

    Args:
        model: has all parameters with corrections of the optimizer (or of the optimizers).
        optimizer: an optimizer of sketch-plugins, a framework's wrapper of one, or a list of them.
        state_dict: tensors by name. For a sharded parameter (DTensor), a DTensor or the whole tensor.
        strict: whether missing names, and names that the model does not have, are an error.

    Raises:
        ValueError: names, shapes or types do not match the model, a group's options are not allowed or do not match its
            state, or for the reasons in `full_precision_state_dict`. Nothing has been changed then.
    """
    optimizers, found = _unwrapped(optimizer), model.state_dict(keep_vars=True)
    _check_fits(found, state_dict, strict)
    kept = _corrected(optimizers, model, found)
    for own in optimizers:
        for number, group in enumerate(own.param_groups):
            own._check_options({}, number, group)
    with torch.no_grad():
        values = {name: _placed(value, found[name]) for name, value in state_dict.items() if name in found}
        given = {id(found[name]): value for name, value in values.items() if id(found[name]) in kept}
        parts = [(kept[key], local_of(value)) for key, value in given.items() if kept[key].part.numel()]
        _start(one for one, _ in parts)
        for own in optimizers:
            own._check_weights()  # sets void corrections to 0, also of weights that are not loaded
        # All errors have been found by now. This writes no weight that has a correction:
        rest = {name: value for name, value in values.items() if id(found[name]) not in kept}
        model.load_state_dict(rest, strict=False)
        for one, value in parts:
            codes = corrections(one.part, one.optimizer.state[one.part.owner])
            assert codes is not None
            write_nearest(value.to(one.part.device, torch.float32), one.part.data, codes[0].view(one.part.shape))
            codes[1].zero_()
        for own in optimizers:
            assert own._written is not None
            own._written.note((one.part, own.state[one.part.owner]) for one, _ in parts if one.optimizer is own)


def cast_model(
    model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, keep: Iterable[str | type] = ()
) -> torch.nn.Module:
    """Cast a model's floating point parameters to half precision, in place, except those that have to stay.

    These stay: whole modules with running statistics (batch norms); non-persistent buffers, which hold constants that a
    model computes itself (rotary frequencies); what ``keep`` names; and parameters that one of these shares with other
    modules. To load a checkpoint that was saved in float32, load it into the float32 model and cast afterwards.

    Args:
        model: the model, before it is sharded and before an optimizer has state for it.
        dtype: torch.bfloat16 or torch.float16; torch.float32 casts back.
        keep: names of modules or parameters (``"lm_head"``, or a pattern of `fnmatch` such as ``"layers.*.norm"``; a
            module stays with everything in it), or classes of modules.

    Returns:
        The model.

    Raises:
        ValueError: the dtype is another one, or something in ``keep`` is not in the model. Nothing has been changed.
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
    """The modules that are not cast, and the identities of the tensors that are not."""
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


class _Corrected(NamedTuple):
    """A parameter whose group has ``weight_bits``, and its part on this rank."""

    optimizer: SketchOptimizer
    group: dict[str, Any]
    part: Part


def _unwrapped(optimizer: Any) -> list[SketchOptimizer]:
    """The optimizers of sketch-plugins, without the wrappers around them."""
    out = []
    for one in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        inner = one
        for _ in range(4):
            if isinstance(inner, SketchOptimizer):
                break
            inner = getattr(inner, "optimizer", None)
        if not isinstance(inner, SketchOptimizer):
            raise ValueError(
                f"{type(one).__name__} is no optimizer of sketch-plugins with weight_bits, and wraps none: without "
                "one model.state_dict() holds all there is"
            )
        out.append(inner)
    if not any(group.get("weight_bits") for own in out for group in own.param_groups):
        kinds = ", ".join(type(own).__name__ for own in out) or "an empty list"
        raise ValueError(
            f"weight_bits is None in every parameter group of {kinds}: model.state_dict() holds all bits of the "
            "weights. Build the optimizer with weight_bits=24 or 32 to keep more"
        )
    return out


def _corrected(
    optimizers: Sequence[SketchOptimizer], model: torch.nn.Module, found: Mapping[str, Any]
) -> dict[int, _Corrected]:
    """The parameters that have corrections, or will have them after the first step, by identity."""
    out, missing = {}, []
    here, names = {id(value) for value in found.values()}, {id(p): name for name, p in model.named_parameters()}
    for own in optimizers:
        for group in own.param_groups:
            for index, owner in enumerate(group["params"]):
                if is_lazy(owner) or not group.get("weight_bits"):
                    continue
                for part in own._parts.of(index, owner):
                    if not corrects(part, group):
                        continue
                    if part.key is not None:
                        raise ValueError(
                            "the optimizer steps flat partitions of parameters (ZeRO), whose float32 weights DeepSpeed "
                            "keeps: use its zero_to_fp32"
                        )
                    out[id(owner)] = _Corrected(own, group, part)
                    # A hook may leave a parameter out of the state dict. A copy under its name has no corrections.
                    if id(owner) not in here and (id(owner) not in names or names[id(owner)] in found):
                        missing.append(own._label(group, part).rstrip(","))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{'; '.join(missing[:3])}{more} of {', '.join(type(own).__name__ for own in optimizers)}: not among the "
            f"tensors of this {type(model).__name__}, so that their further bits (weight_bits) would be lost. Give the "
            "model that the optimizer was built with, not a copy (an average of weights has the bits of its own dtype: "
            "keep it in float32), and of several modules one that has them all, such as torch.nn.ModuleDict"
        )
    return out


def _check_fits(found: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> None:
    """Raise ValueError if names, shapes or types of a state dict do not match the model."""
    missing = [name for name in found if name not in given]
    unknown = [name for name in given if name not in found]
    if strict and (missing or unknown):
        raise ValueError(
            f"the state dict does not fit the model: missing {_some(missing)}; not of the model {_some(unknown)}. "
            "strict=False takes what fits"
        )
    for name, value in found.items():
        if name not in given or not isinstance(value, Tensor):
            continue
        one = given[name]
        if not isinstance(one, Tensor):
            raise ValueError(f"{name!r} is of type {type(one).__name__} in the state dict and a tensor here")
        if one.shape != value.shape:
            raise ValueError(f"{name!r} has shape {tuple(one.shape)} in the state dict and {tuple(value.shape)} here")
        if one.is_floating_point() != value.is_floating_point() or one.is_complex() or one.device.type == "meta":
            where = " without memory" if one.device.type == "meta" else ""
            raise ValueError(
                f"{name!r} is a tensor of {one.dtype}{where} in the state dict and of {value.dtype} here: give "
                f"{'floating point numbers' if value.is_floating_point() else str(value.dtype)}"
            )


def _start(members: Iterable[_Corrected]) -> None:
    """Make state for all parts that have taken no step. After an error none of this state is left."""
    started: list[_Corrected] = []
    try:
        for one in members:
            own, owner = one.optimizer, one.part.owner
            if own._state_of(one.part) is None:
                started.append(one)
                own._start(one.part, one.group)
            elif corrections(one.part, own.state[owner]) is None:
                raise ValueError(
                    f"{own._label(one.group, one.part).rstrip(',')} has state without corrections, but weight_bits="
                    f"{one.group['weight_bits']}: the option, or the parameter's dtype, was changed after the last step"
                )
    except BaseException:
        for one in started:
            state = one.optimizer.state.get(one.part.owner, {})
            for name in [name for name in state if is_ours(name)]:
                del state[name]
            if not state:
                one.optimizer.state.pop(one.part.owner, None)
        raise


def _widened(value: Tensor, kept: _Corrected | None) -> Tensor:
    value = value.detach()
    found = None if kept is None else corrections(kept.part, kept.optimizer.state.get(kept.part.owner))
    if kept is not None and found is not None:
        return _like(decoded(kept.part.data.detach(), found[0].view(kept.part.shape)), value)
    return value.to(torch.float32) if value.dtype in HALF else value


def _like(local: Tensor, whole: Tensor) -> Tensor:
    """A shard as a DTensor, if the whole is one."""
    if not is_dtensor(whole):
        return local
    given: Any = whole
    return type(given).from_local(
        local, given.device_mesh, given.placements, run_check=False, shape=given.shape, stride=given.stride()
    )


def _placed(value: Any, owner: Any) -> Any:
    """A value for a tensor of the model, with that tensor's placements."""
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

"""What a checkpoint says about an optimizer: how it keeps any piece of a parameter. No model is needed."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import optim
from sketch_plugins.checkpoints.recut import recut
from sketch_plugins.checkpoints.recut_geometry import Held
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.family import BEFORE
from sketch_plugins.optim.written import written_by
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.pieces import Fragment, Piece, pieces
from sketch_plugins.sharding.state_names import CORRECTION, PLACE, kind_of

#: Called with the number of finished steps, the number of all steps, and the name of the current one.
Progress = Callable[[int, int, str], None]


class CannotReshard(ValueError):
    """Something is wrong with the request or the checkpoint; nothing was written."""


@dataclass
class Report:
    """The result of resharding.

    Attributes:
        output: directory that was written.
        framework: the framework that wrote the checkpoint.
        optimizer: name of its class.
        before: number of ranks that wrote the checkpoint.
        after: number of ranks that it is for now.
        parameters: number of elements of the trainable parameters.
        exact: kind of state -> number of pieces whose state is bit for bit the old one.
        cut: kind of state -> number of pieces whose state was recut.
        nbytes: bytes of all state, before and after.
    """

    output: Path
    framework: str
    optimizer: str
    before: int
    after: int
    parameters: int = 0
    exact: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    nbytes: tuple[int, int] = (0, 0)


class SavedOptimizer:
    """How the optimizer that wrote a checkpoint keeps the state of a piece.

    Args:
        groups: its parameter groups, as its state dict has them.

    Raises:
        CannotReshard: the optimizer is not one of sketch-plugins, or an option has a value that is not allowed.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.groups = [dict(group) for group in groups]
        try:
            kinds: set[Any] = {written_by(group) for group in self.groups}
        except ValueError as error:
            raise CannotReshard(f"the checkpoint: {error}") from error
        kind = next(iter(kinds)) if len(kinds) == 1 else None
        classes: dict[Any, Any] = {cls.__name__: cls for cls in vars(optim).values() if isinstance(cls, type)}
        cls = classes.get(kind)
        if cls is None or not issubclass(cls, SketchOptimizer) or cls is SketchOptimizer:
            raise CannotReshard(
                f"the state was written by {kind or 'another optimizer'}. Only the state of sketch-plugins' "
                "optimizers can be resharded"
            )
        self.kind: str = cls.__name__
        # It only says how state is kept; its own parameter is not used.
        self.optimizer: SketchOptimizer = cls([torch.zeros(1)])
        for group in self.groups:
            for name, value in BEFORE.items():
                if name in self.optimizer.OPTIONS:
                    group.setdefault(name, value)
            for name, value in self.optimizer.defaults.items():
                group.setdefault(name, value)  # the option is newer than the checkpoint
            for name, option in self.optimizer.OPTIONS.items():
                try:
                    group[name] = option.validate(group[name])
                except ValueError as error:
                    raise CannotReshard(f"the checkpoint's parameter groups: {error}") from error

    def held(
        self, piece: Piece, group: int, dtype: torch.dtype, state: dict[str, Any] | None = None, label: str = ""
    ) -> Held:
        """The piece, with the stores that its group's options give it.

        Args:
            piece: the rectangle.
            group: number of its parameter group.
            dtype: dtype of the parameter that the optimizer steps.
            state: its state; None or empty before its first step.
            label: name of the piece in messages.

        Raises:
            CannotReshard: the state does not have the form that the options describe.
        """
        options, part = self.groups[group], _part(piece, dtype)
        if state:
            state = {**state, **self.optimizer.spread_part(state, part, options)}
            try:
                self.optimizer._check_state(part, options, state, label)
            except ValueError as error:
                raise CannotReshard(str(error)) from error
        stores = dict(zip(("first_moment", "second_moment"), self.optimizer._stores(part, options), strict=True))
        preconditioner: Any = self.optimizer._further(part, options).get("preconditioner")
        # S-AdaGrad has no such option, and keeps the tail of the paper.
        tail = options.get("tail", "paper")
        present = {name: store for name, store in stores.items() if store is not None}
        batch, apart = (
            self.optimizer.batch_axes(piece.whole, options),
            self.optimizer.measured_axes(piece.whole, options),
        )
        return Held(piece, present, preconditioner, state or {}, tail, batch, bool(apart))

    def pieces(self, fragments: Sequence[Fragment], group: int) -> list[Piece]:
        """Cut the parameters of a group that a flat tensor holds into the pieces that the optimizer handles."""
        return list(pieces(fragments, lambda f: self.optimizer.batch_axes(f.whole, self.groups[group])))

    def layout(self, piece: Piece, group: int, dtype: torch.dtype) -> dict[str, Any]:
        """Name -> (size, dtype), nested, of all state of a piece except the number of steps."""
        part = _part(piece, dtype)
        return self.optimizer._layout(part, self.groups[group], part)

    def recut(
        self, old: Sequence[Held], piece: Piece, group: int, dtype: torch.dtype, report: Report
    ) -> dict[str, Any]:
        """The state of a new piece; empty if no step was taken.

        Raises:
            CannotReshard: see `sketch_plugins.checkpoints.recut.recut`.
        """
        new = self.held(piece, group, dtype)
        near = [h for h in old if all(a.meet(b).size for a, b in zip(h.rectangle, new.rectangle, strict=True))]
        try:
            (same,) = recut(near, [new], torch.float64 if dtype == torch.float64 else torch.float32)
        except ValueError as error:
            raise CannotReshard(str(error)) from error
        if new.state:
            kinds = {name: f"{name.replace('_', ' ')} ({type(store).__name__})" for name, store in new.stores.items()}
            if new.preconditioner is not None:
                kinds["preconditioner"] = "preconditioner"
            if CORRECTION in new.state:
                kinds[CORRECTION] = "weight correction"
            for name, kind in kinds.items():
                (report.exact if name in same else report.cut)[kind] += 1
        return new.state


def nbytes(value: Any) -> int:
    """Bytes of the tensors of a state; step numbers and places are not counted."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() if value.ndim else 0
    return sum(nbytes(v) for key, v in value.items() if kind_of(key) != PLACE) if isinstance(value, Mapping) else 0


def output_of(root: Path, world_size: int, output: str | os.PathLike[str] | None) -> Path:
    """The directory to write: ``output``, or one beside the checkpoint.

    Raises:
        CannotReshard: it exists; or the number of ranks is less than 1.
    """
    if world_size < 1:
        raise CannotReshard(f"world size {world_size} is not allowed: it must be an integer of at least 1")
    target = Path(output) if output is not None else root.with_name(f"{root.resolve().name}-world{world_size}")
    if target.exists() or target.is_symlink():
        raise CannotReshard(f"{target} exists already: choose another --output")
    if root.resolve() in target.resolve().parents:
        raise CannotReshard(f"{target} is inside the checkpoint, which must not be changed: choose another --output")
    return target


@contextmanager
def whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A new directory beside ``target``. It gets the name of the target at the end, or is removed after an error.

    Raises:
        CannotReshard: it cannot be written; or another process has created the target in the meantime.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        if target.exists():  # a rename would replace an empty directory
            raise CannotReshard(f"{target} exists already: choose another --output")
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CannotReshard(f"{target} cannot be written: {error}") from error
        raise


def save(value: Mapping[str, Any], file: Path) -> None:
    """Save with ``torch.save``, whose errors for a full disk have no common type.

    Raises:
        CannotReshard: the file cannot be written.
    """
    try:
        torch.save(dict(value), file)
    except (OSError, RuntimeError) as error:
        raise CannotReshard(f"{file.name} cannot be written: {error}") from error


def _part(piece: Piece, dtype: torch.dtype) -> Part:
    """The piece as a part without memory."""
    data = torch.empty(piece.shape, dtype=dtype, device="meta")
    return Part(data, data, 0, piece.whole, piece, piece.key)

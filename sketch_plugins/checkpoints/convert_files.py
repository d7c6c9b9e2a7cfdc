"""The files of a conversion: which ones are read, where the output goes, and how all of it is written or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sketch_plugins.checkpoints import reading


class CannotConvert(ValueError):
    """Something is wrong with the request or the checkpoint; nothing was written."""


def optimizer_files(root: Path) -> list[Path]:
    """The files of a checkpoint that contain state dicts of optimizers."""
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise CannotConvert(reading.absent(root))
    for pattern in ("optimizer.pt", "optimizer*.bin"):
        found = sorted(file for file in root.glob(pattern) if file.is_file())
        if found:
            return found
    anew = "load only the weights, and start with a new optimizer state"
    if (root / ".metadata").is_file() or any(root.glob("optimizer*/.metadata")):
        raise CannotConvert(f"{root} is a sharded checkpoint of torch.distributed, which cannot be converted: {anew}")
    if (root / "latest").is_file() or any(root.glob("*_states.pt")) or any(root.glob("global_step*")):
        raise CannotConvert(f"{root} is a checkpoint of DeepSpeed, which cannot be converted: {anew}")
    within = sorted(p.name for p in (*root.glob("checkpoint-*"), *root.glob("*.ckpt")))
    hint = f"; it contains {', '.join(within)}: give one of these" if within else ""
    raise CannotConvert(f"{root} holds no optimizer state: there is no optimizer.pt and no optimizer.bin in it{hint}")


def framework_of(root: Path) -> str:
    """Name of the framework that wrote a checkpoint."""
    if root.is_dir():
        return "Trainer" if (root / "optimizer.pt").is_file() else "accelerate"
    return "Lightning" if root.suffix == ".ckpt" else "torch"


def target_of(root: Path, name: str, out: str | os.PathLike[str] | None, force: bool) -> Path:
    """Where the output goes.

    Raises:
        CannotConvert: it exists already, or it is the checkpoint, inside of it or around it.
    """
    place = root.resolve()
    label = f"{root.stem}-{name}{root.suffix}" if root.is_file() else f"{place.name}-{name}"
    target = Path(out) if out is not None else (root if root.name else place).with_name(label)
    separators = tuple(filter(None, (os.sep, os.altsep)))
    if root.is_file() and (target.is_dir() or (out is not None and os.fspath(out).endswith(separators))):
        target = target / root.name
    if target.exists() and target.samefile(root):  # also by a link
        raise CannotConvert(
            f"{target} is the checkpoint {root} itself, which is not changed, because the conversion cannot be undone: "
            "choose another --out"
        )
    if target.exists() or target.is_symlink():
        if not force:
            raise CannotConvert(f"{target} exists already: choose another --out, or replace it with --force")
        if target.is_dir() != root.is_dir():
            raise CannotConvert(
                f"{target} is {'a directory' if target.is_dir() else 'a file'} and {root} is not: choose another --out"
            )
    inside, outside = target.resolve(), place
    if root.is_dir() and (outside in inside.parents or inside in outside.parents):
        raise CannotConvert(f"{target} is inside the checkpoint {root}, or contains it: choose another --out")
    return target


def write(root: Path, target: Path, values: Mapping[str, Any], force: bool) -> None:
    """Write all of it or nothing: each output gets its name when it is complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if root.is_file():
            with _partial(target.parent, target.name) as folder:
                (value,) = values.values()
                part = folder / "new"
                _save(value, part)
                if target.exists():
                    if not force:  # another process has created it in the meantime
                        raise CannotConvert(f"{target} exists already: choose another --out")
                    shutil.copymode(target, part)
                os.replace(part, target)
            return
        with _partial(target.parent, target.name) as folder:
            new = folder / "new"
            shutil.copytree(root, new, symlinks=True, ignore=lambda d, _: values if Path(d) == root else ())
            for name, value in values.items():
                _save(value, new / name)
            if target.exists():
                if not force:
                    raise CannotConvert(f"{target} exists already: choose another --out")
                _check_replaceable(target, root)
                target.rename(folder / "old")
                try:
                    new.rename(target)
                except BaseException:
                    (folder / "old").rename(target)
                    raise
            else:
                new.rename(target)
    except OSError as error:
        raise CannotConvert(f"{target} cannot be written: {error}") from error


def _check_replaceable(target: Path, root: Path) -> None:
    """Raise `CannotConvert` unless a folder holds a checkpoint like ``root``: all its contents would be lost."""
    own = {path.name for path in root.iterdir()}
    there = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    others = sorted(there - own)
    if others:
        some = ", ".join(others[:5]) + (" and more" if len(others) > 5 else "")
        raise CannotConvert(
            f"{target} contains {some}, which {root} does not contain. --force replaces the output of an "
            f"earlier conversion, and nothing else. Use --out {target / (root.name + '-new')}"
        )


@contextmanager
def _partial(parent: Path, name: str) -> Iterator[Path]:
    """A directory beside the output, on the same file system; it is removed at the end."""
    folder = parent / f".{name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save(value: Any, file: Path) -> None:
    try:
        with file.open("wb") as stream:
            torch.save(value, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:  # torch's writer has no specific error for a full disk
        raise CannotConvert(f"{file.name} cannot be written: {error}") from error

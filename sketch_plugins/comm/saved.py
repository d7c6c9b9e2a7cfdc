"""Memories as saved: what a state contains, the files of all ranks, and memories for another number of ranks."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.comm.memories import KINDS

VERSION = 1
FILE = "memsgd-{rank:05d}-of-{world:05d}.pt"


def redistribute(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    r"""Make one memory for each of any number of ranks from those of all ranks of another number.

    Each rank gets the mean :math:`\frac{1}{n} \sum_i m_i` of the old memories (and velocities). The mean over the ranks
    is the part that the parameters still lack. It stays the same up to rounding, and the share of a rank does not
    depend on its number.

    Args:
        states: `MemSGDState.state_dict` of all ranks, in any order. From an iterator, one state is taken at a time and
            none is kept, so this holds one state and the sums, 8 bytes an entry.

    Raises:
        ValueError: they are not the states of all ranks of one run, or one of them lacks something.
    """
    world: int | None = None
    ranks: list[int] = []
    iterations: set[int] = set()
    sums: dict[str, dict[str, Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def add(state: Mapping[str, Any]) -> None:
        nonlocal world
        checked(state)
        world, rank = state["world_size"] if world is None else world, state["rank"]
        if rank is None or state["world_size"] != world or rank in ranks:
            raise ValueError(
                f"expected one state of each of the {world} ranks of a run; one of them comes from rank {rank} of "
                f"{state['world_size']}"
            )
        ranks.append(rank)
        iterations.add(state["iteration"])
        for name, slot in state["memory"].items():
            kept = sums.setdefault(name, {})
            dtypes.setdefault(name, slot["error"].dtype)
            for kind, tensor in slot.items():
                if kind not in kept:
                    kept[kind] = tensor.to("cpu", torch.float64, copy=True)
                elif kept[kind].numel() != tensor.numel():
                    raise ValueError(
                        f"the saved {kind} of {name!r} has {tensor.numel()} entries on rank {rank}, but "
                        f"{kept[kind].numel()} on another rank"
                    )
                else:
                    kept[kind] += tensor.cpu()

    for state in states:
        add(state)
        del state  # or it would stay in memory while the next one is read
    if world is None:
        raise ValueError("there are no states: pass the states of all ranks")
    if sorted(ranks) != list(range(world)) or len(iterations) != 1:
        raise ValueError(
            f"the states must come from all {world} ranks after the same iteration; they come from ranks "
            f"{sorted(ranks)} after iterations {sorted(iterations)}"
        )
    for name, kept in sums.items():
        for kind, total in kept.items():
            kept[kind] = total.div_(world).to(dtypes[name])
    return {"version": VERSION, "world_size": None, "rank": None, "iteration": iterations.pop(), "memory": sums}


def checked(state: Any) -> None:
    """Raise ValueError unless a state has everything that `MemSGDState.state_dict` returns."""
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        raise ValueError(f"this is not the state of a MemSGDState of version {VERSION}: {shorten(state)}")
    for key in ("world_size", "rank", "iteration", "memory"):
        if key not in state:
            raise ValueError(f"the saved state of a MemSGDState lacks {key!r}; it contains {shorten(state)}")
    whole = {key: state[key] for key in ("world_size", "rank", "iteration")}
    nobody = whole["world_size"] is None and whole["rank"] is None  # it comes from `redistribute`
    for key, value in whole.items():
        number = isinstance(value, int) and not isinstance(value, bool) and value >= (key == "world_size")
        if not number and not (nobody and key != "iteration"):
            raise ValueError(f"{key}={value!r} in the saved state of a MemSGDState is not allowed: it must be a number")
    if not isinstance(state["memory"], Mapping):
        raise ValueError(
            f"the saved memory is a {type(state['memory']).__name__}; expected a dict of names and tensors"
        )
    for name, slot in state["memory"].items():
        if not isinstance(slot, Mapping) or "error" not in slot:
            raise ValueError(f"the saved memory of {name!r} lacks 'error'; it contains {shorten(slot)}")
        for kind, tensor in slot.items():
            if kind not in KINDS or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"the saved memory of {name!r} contains {kind!r}, a {type(tensor).__name__}; expected the tensors "
                    "'error' and 'momentum'"
                )


def write_file(state: Mapping[str, Any], folder: Path) -> None:
    """Write a rank's state to its file in ``folder``, and remove the files of another number of ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE.format(rank=state["rank"], world=state["world_size"])
    part = path.with_suffix(".part")
    torch.save(state, part)
    # Complete or absent: a process that is killed while it saves leaves no partial file under this name.
    part.replace(path)
    for world, files in _files(folder).items():
        if world != state["world_size"]:
            for old in files.values():
                old.unlink(missing_ok=True)  # every rank removes them, because folders need not be shared


def read_files(folder: Path, rank: int, ranks: int) -> Mapping[str, Any]:
    """The state of rank ``rank`` of ``ranks``: from its own file, or made from all if another number of ranks saved.

    Raises:
        ValueError: there are no files, files of several numbers of ranks, or not the files of all ranks; a file cannot
            be read; see `redistribute`.
    """
    found = _files(folder)
    if not found:
        raise ValueError(
            f"{folder} has no files memsgd-*-of-*.pt: give the folder in which the ranks of a run have saved theirs"
        )
    if len(found) > 1:
        raise ValueError(
            f"{folder} has files of runs of {' and of '.join(map(str, sorted(found)))} ranks, and it is not "
            "clear which of them belong to this checkpoint: remove the others"
        )
    ((world, files),) = found.items()
    wanted = [rank] if world == ranks else list(range(world))
    missing = [one for one in wanted if one not in files]
    if missing:
        raise ValueError(
            f"{folder} lacks the memory of rank {missing[0]} of {world}. With {ranks} ranks, every "
            "rank needs the files of all ranks that saved: put them into one folder"
        )
    # Files are mapped, so that only the parts in use are in memory; of several files, one at a time is open.
    states = (_read(files[one]) for one in wanted)
    return next(states) if world == ranks else redistribute(states)


def _files(folder: Path) -> dict[int, dict[int, Path]]:
    """The files that `MemSGDState.save` has written: number of ranks -> rank -> file."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("memsgd-*.pt")):
        match = re.fullmatch(r"memsgd-(\d+)-of-(\d+)\.pt", path.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    return found


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a file of MemSGDState.save: {shorten(error)}") from error


def shorten(value: Any) -> str:
    """A value, or the keys of a mapping, in at most 80 characters for a message."""
    text = (", ".join(map(str, value)) or "nothing") if isinstance(value, Mapping) else repr(value)
    return text if len(text) < 80 else text[:77] + "..."

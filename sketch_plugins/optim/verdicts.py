"""The results of checking kernels on this device, in a file beside Triton's cache.

A file belongs to one combination of device, torch, Triton and our sources. It is not read for any other combination.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import platform
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from sketch_plugins.version import __version__

#: The sources that decide what a fused step computes, and what it is compared with.
_SOURCES = ("kernels", "optim", "stores", "hashing.py")
_PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=64)
def combination(device: torch.device, compiler: str) -> tuple[tuple[str, str], ...]:
    """Everything that a verdict depends on, as (name, value). ``compiler`` is "triton" or "numba"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {getattr(properties, 'gcnArchName', '') or (properties.major, properties.minor)}"
    else:
        name = f"{device.type}: {platform.processor() or platform.machine()}"
    return (
        ("device", name),
        ("torch", torch.__version__),
        (compiler, version_of(compiler)),
        ("sketch_plugins", __version__),
        ("sources", sources()),
    )


def version_of(compiler: str) -> str:
    """The version of "triton" or "numba", or "none"."""
    try:
        return str(importlib.import_module(compiler).__version__)
    except (ImportError, AttributeError):
        return "none"


@lru_cache(maxsize=1)
def sources() -> str:
    """A digest of our sources, because the version number does not change while they are worked on."""
    found = hashlib.sha256()
    for entry in _SOURCES:
        place = _PACKAGE / entry
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            with contextlib.suppress(OSError):  # if the package has no sources, the version is enough
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def folder() -> Path:
    """Triton's cache. No other place asks Triton where it is."""
    try:
        from triton import knobs

        return Path(str(knobs.cache.dir))
    except (ImportError, AttributeError):  # Triton is older than 3.4 or missing
        home = os.environ.get("TRITON_HOME") or Path.home()
        return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def path(what: tuple[tuple[str, str], ...]) -> Path:
    """The file of a combination."""
    return folder() / f"sketch-plugins-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def read(what: tuple[tuple[str, str], ...]) -> dict[str, str | None]:
    """What is wrong with each specialisation (None: nothing). Empty if the file is missing or damaged."""
    try:
        found = json.loads(path(what).read_text(encoding="utf-8"))
        if found["combination"] != dict(what):
            return {}
        return {str(key): None if why is None else str(why) for key, why in found["kernels"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):  # RuntimeError: no home directory
        return {}


def write(what: tuple[tuple[str, str], ...], found: dict[str, str | None]) -> bool:
    """Add verdicts to the file, and return whether that was possible. Other processes never see a partial file.

    If two processes write at once, the results of one may be lost. They are then checked again.
    """
    text = json.dumps({"combination": dict(what), "kernels": {**read(what), **found}}, indent=1)
    temporary = None
    try:
        place = path(what)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, place)
    except (OSError, RuntimeError):
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    return True

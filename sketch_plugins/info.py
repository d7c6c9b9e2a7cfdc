"""``sketch-plugins info``: the installed packages, the registered names, and the kernels on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sketch_plugins import __version__, registry
from sketch_plugins.import_hooks import entries, triggers
from sketch_plugins.memory.report import state_report
from sketch_plugins.optim.fused import backend

#: Distributions whose versions matter to a run, beside the frameworks that have integrations.
PACKAGES = ("torch", "triton", "numba", "numpy", "bitsandbytes", "safetensors", "tokenizers", "rich", "matplotlib")
#: Shapes of the example for bytes a parameter: a layer of BERT-base.
EXAMPLE = ((768, 768), (768,)) * 4 + ((3072, 768), (3072,), (768, 3072), (768,)) + ((768,),) * 4


def information() -> dict[str, Any]:
    """All information, as plain values."""
    return {
        "sketch_plugins": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *_distributions())},
        "devices": _devices(),
        "kernels": _kernels(),
        "optimizers": _optimizers(),
        "frameworks": _frameworks(),
        "integrations": [f"{entry.name} -> {entry.value}" for entry in entries()],
    }


def main(as_json: bool) -> int:
    """Run the command."""
    # DeepSpeed, for example, writes its log to stdout when it is imported.
    with redirect_stdout(sys.stderr):
        found = information()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    # The names of extras contain brackets, which are not meant as markup.
    out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    for table in _tables(found):
        out.print(table)
    return 0


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)  # with the build, which the metadata does not contain
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


def _kernels() -> dict[str, dict[str, Any]]:
    """Name -> whether its kernels can take steps here, and what they are for, or why they cannot."""
    out: dict[str, dict[str, Any]] = {}
    for name, device in (("triton", "cuda"), ("numba", "cpu")):
        try:
            found = backend(torch.device(device), True)
            why = f"the fused step on {device}" if found is not None else "none"
            available = found is not None
        except ValueError as error:
            available, why = False, str(error)
        if available and device == "cuda" and not torch.cuda.is_available():
            available = False
            why = "no CUDA device: " + (
                f"this torch ({torch.__version__}) is built without CUDA"
                if torch.version.cuda is None and torch.version.hip is None
                else "none was found"
            )
        out[name] = {"available": available, "note": why}
    out["eager"] = {"available": True, "note": "eager torch, on any device"}
    return out


def _optimizers() -> dict[str, dict[str, Any]]:
    out = {}
    for name in registry.names():
        entry = registry.get(name)
        with torch.device("meta"):
            params = [torch.nn.Parameter(torch.empty(shape)) for shape in EXAMPLE]
        optimizer: Any = entry.cls
        report = state_report(optimizer(params))
        out[name] = {
            "class": entry.cls.__name__,
            "bytes_per_param": round(report.bytes_per_param, 3),
            "adamw_bytes_per_param": report.adamw_bytes / report.params,
            "presets": list(entry.cls.PRESETS),
        }
    return out


def _distributions() -> list[str]:
    """Distributions of the frameworks that have integrations."""
    return list(dict.fromkeys(_package(trigger).replace("_", "-") for trigger in triggers()))


def _frameworks() -> dict[str, dict[str, Any]]:
    """Framework -> the names that it knows once its integration is registered, or why it knows none.

    An integration (the package of an entry point) has ``known_names()`` and ``USAGE``, which says where its framework
    takes ``{name}``.
    """
    out: dict[str, dict[str, Any]] = {}
    integrations: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in entries():
        integrations.setdefault(entry.module, []).append(entry)
    for package, found in integrations.items():
        framework = _package(found[0].name)
        out[framework] = {"names": [], "usage": "", "note": ""}
        if all(importlib.util.find_spec(_package(entry.name)) is None for entry in found):
            out[framework]["note"] = "not installed" + _how(found[0], framework)
            continue
        try:
            found[0].load()()
            integration = sys.modules[package]
            names = integration.known_names()
        except Exception as error:  # the import of a framework may raise any error, and the others are still shown
            out[framework]["note"] = f"{type(error).__name__}: {error}"
            continue
        # This includes the names that end in _layerwise.
        out[framework]["names"] = sorted(name for name in names if name.startswith(registry.names()))
        out[framework]["usage"] = integration.USAGE
        if not out[framework]["names"]:
            out[framework]["note"] = "has no names: give it an optimizer object"
    return out


def _how(entry: importlib.metadata.EntryPoint, framework: str) -> str:
    """The command that installs the framework, if the distribution of its integration has an extra for it."""
    extras = (entry.dist.metadata.get_all("Provides-Extra") or []) if entry.dist is not None else []
    return f": pip install '{entry.dist.name}[{framework}]'" if entry.dist is not None and framework in extras else ""


def _package(module: str) -> str:
    return module.partition(".")[0]


def _tables(found: dict[str, Any]) -> list[Table]:
    versions = Table(title=f"sketch-plugins {found['sketch_plugins']}, Python {found['python']}", title_justify="left")
    versions.add_column("package")
    versions.add_column("version")
    for name, version in found["packages"].items():
        versions.add_row(name, version or "not installed", style=None if version else "dim")
    kernels = Table(title=f"kernels; devices: {', '.join(found['devices'])}", title_justify="left")
    for heading in ("kernels", "here", ""):
        kernels.add_column(heading, overflow="fold")
    for name, kernel in found["kernels"].items():
        kernels.add_row(name, "yes" if kernel["available"] else "no", kernel["note"])
    optimizers = Table(
        title="optimizers; bytes of state for each parameter, measured on a layer of BERT-base", title_justify="left"
    )
    for heading in ("name", "class", "B/param", "AdamW", "presets"):
        optimizers.add_column(heading, justify="right" if heading in ("B/param", "AdamW") else "left", overflow="fold")
    for name, one in found["optimizers"].items():
        sizes = f"{one['bytes_per_param']:.2f}", f"{one['adamw_bytes_per_param']:.2f}"
        optimizers.add_row(name, one["class"], *sizes, ", ".join(one["presets"]))
    frameworks = Table(title="names in frameworks", title_justify="left")
    for heading in ("framework", "names", "as in"):
        frameworks.add_column(heading, overflow="fold")
    for name, framework in found["frameworks"].items():
        usage = framework["usage"].format(name="cs_adam")
        frameworks.add_row(name, ", ".join(framework["names"]) or framework["note"], usage)
    return [versions, kernels, optimizers, frameworks]

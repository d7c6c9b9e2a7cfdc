"""``sketch-plugins info``: what is installed, registered and compiled here."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from contextlib import redirect_stdout
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sketch_plugins import __version__, registry
from sketch_plugins.import_hooks import GROUP
from sketch_plugins.memory.report import state_report
from sketch_plugins.optim.fused import backend

#: Distributions that matter to a run, framework by framework.
PACKAGES = (
    "torch", "triton", "numba", "numpy", "transformers", "accelerate", "lightning", "pytorch-lightning", "deepspeed",
    "bitsandbytes", "safetensors", "tokenizers", "rich", "matplotlib",
)  # fmt: skip
#: Shapes of the example that bytes for a parameter are given of: a layer of BERT-base.
EXAMPLE = ((768, 768), (768,)) * 4 + ((3072, 768), (3072,), (768, 3072), (768,)) + ((768,),) * 4
#: Framework -> (the package that is imported for it, how an optimizer is named there).
NAMED = {
    "transformers": ("transformers", 'TrainingArguments(optim="{name}")'),
    "lightning": ("lightning", 'Trainer(strategy="{name}")'),
    "deepspeed": ("deepspeed", '"optimizer": {{"type": "{name}"}}'),
}


def information() -> dict[str, Any]:
    """All of it, as plain values."""
    return {
        "sketch_plugins": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "kernels": _kernels(),
        "optimizers": _optimizers(),
        "frameworks": _frameworks(),
        "integrations": sorted({f"{e.name} -> {e.value}" for e in importlib.metadata.entry_points(group=GROUP)}),
    }


def main(as_json: bool) -> int:
    """Run the command."""
    # DeepSpeed, for one, writes its log to stdout when it is imported.
    with redirect_stdout(sys.stderr):
        found = information()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    # The names of extras have brackets, which are no markup.
    out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    for table in _tables(found):
        out.print(table)
    return 0


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)  # with the build, which the metadata leaves out
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))]


def _kernels() -> dict[str, dict[str, Any]]:
    """Name -> whether it takes steps here, and what it is for or why it does not."""
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
    out["eager"] = {"available": True, "note": "the step in tiles, on any device"}
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


def _frameworks() -> dict[str, dict[str, Any]]:
    """Framework -> the names that it knows once its integration is imported, or why it knows none."""
    out: dict[str, dict[str, Any]] = {}
    for framework, (package, usage) in NAMED.items():
        if _version(package) is None:
            out[framework] = {"names": [], "usage": usage, "note": "not installed"}
            continue
        try:
            importlib.import_module(f"sketch_{framework}").register()
            names = _REGISTERED[framework]()
        except Exception as error:  # whatever a framework's import fails with, the rest is worth showing
            out[framework] = {"names": [], "usage": usage, "note": f"{type(error).__name__}: {error}"}
            continue
        ours = sorted(n for n in names if n.startswith(registry.names()))  # those that end in _layerwise, too
        out[framework] = {"names": ours, "usage": usage, "note": ""}
    return out


def _in_transformers() -> set[str]:
    from transformers.training_args import OptimizerNames

    return {str(name.value) for name in OptimizerNames}


def _in_lightning() -> set[str]:
    from lightning.pytorch.strategies import StrategyRegistry

    return set(StrategyRegistry.available_strategies())


def _in_deepspeed() -> set[str]:
    # Its engine has no list: registered, it asks `sketch_deepspeed` for the name that a configuration gives.
    return set(registry.names())


_REGISTERED = {"transformers": _in_transformers, "lightning": _in_lightning, "deepspeed": _in_deepspeed}


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
    optimizers = Table(title="optimizers; bytes of state a parameter, of a layer of BERT-base", title_justify="left")
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

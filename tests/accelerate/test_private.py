"""The contract with accelerate: every name that is used exists, and a missing one is reported by name."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from sketch_accelerate import _private  # noqa: E402
from sketch_plugins import import_hooks  # noqa: E402


def owner_of(module, name):
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    return owner, last


@pytest.mark.parametrize(("module", "name"), _private.TOUCHED)
def test_touched_name_is_where_it_was(module, name):
    owner, last = owner_of(module, name)
    assert hasattr(owner, last), f"{module}.{name} has moved in accelerate {accelerate.__version__}"


def test_prepare_takes_what_it_took():
    signature = inspect.signature(accelerate.Accelerator.prepare)  # of the original: functools.wraps
    assert [p.kind.name for p in signature.parameters.values()][:2] == ["POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL"]


@pytest.mark.parametrize("name", ["Accelerator.prepare", "Accelerator.distributed_type"])
def test_check_names_what_is_missing(name, monkeypatch):
    module = next(module for module, touched in _private.TOUCHED if touched == name)
    monkeypatch.delattr(*owner_of(module, name))
    with pytest.raises(_private.MovedSymbolError, match=rf"{name} is missing in accelerate {accelerate.__version__}"):
        _private.register()


def test_registering_twice_changes_nothing():
    prepare = accelerate.Accelerator.prepare
    _private.register()
    assert accelerate.Accelerator.prepare is prepare


def test_the_installed_distribution_names_the_trigger():
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=import_hooks.GROUP)}
    assert entries["accelerate.accelerator"] == "sketch_accelerate:register"


def test_registered_by_an_unmodified_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import accelerate\nprint(hasattr(accelerate.Accelerator.prepare, '_sketch_plugins'))")
    command = [sys.executable, "-m", "sketch_plugins", "run", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True"], done.stderr[-3000:]

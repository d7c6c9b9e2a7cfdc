"""The contract with transformers: every name that is touched is there, and its absence is reported by name."""

import importlib
import inspect
import subprocess
import sys

import pytest
import transformers

from sketch_transformers import _private


@pytest.mark.parametrize(("module", "name"), _private.TOUCHED)
def test_touched_name_is_where_it_was(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} has moved in transformers {transformers.__version__}"
        found = getattr(found, part)


def test_signatures():
    # What the wrappers rely on beyond the names. `signature` sees through functools.wraps to the original.
    trainer = transformers.Trainer
    assert list(inspect.signature(trainer.get_optimizer_cls_and_kwargs).parameters) == ["args", "model"]
    assert isinstance(inspect.getattr_static(trainer, "get_optimizer_cls_and_kwargs"), staticmethod)
    assert list(inspect.signature(trainer.log).parameters)[:2] == ["self", "logs"]
    assert list(inspect.signature(transformers.TrainingArguments.__post_init__).parameters) == ["self"]


@pytest.mark.parametrize(("module", "name"), _private.TOUCHED)
def test_check_names_what_is_missing(module, name, monkeypatch):
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    monkeypatch.delattr(owner, last)
    with pytest.raises(_private.MovedSymbolError) as error:
        _private.check()
    assert f"{module}.{name} is missing in transformers {transformers.__version__}" in str(error.value)


def test_importing_fails_loudly(tmp_path):
    script = (
        "import transformers.trainer\n"
        "del transformers.trainer.Trainer.get_optimizer_cls_and_kwargs\n"
        "import sketch_transformers\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MovedSymbolError: transformers.trainer.Trainer.get_optimizer_cls_and_kwargs is missing" in done.stderr


def test_an_enum_of_another_kind_is_reported(monkeypatch):
    import enum

    monkeypatch.setattr("transformers.training_args.OptimizerNames", enum.Enum("OptimizerNames", {"A": 1}))
    with pytest.raises(_private.MovedSymbolError, match="OptimizerNames is no longer a str Enum"):
        _private.check()


def test_a_name_that_transformers_has_itself_is_not_taken_over(monkeypatch):
    monkeypatch.setattr("sketch_plugins.registry.names", lambda: ("adafactor",))
    with pytest.raises(ValueError, match="has an optimizer 'adafactor' of its own"):
        _private.register()


def test_only_one_module_touches_private_names():
    from pathlib import Path

    for file in Path(_private.__file__).parent.glob("*.py"):
        if file.name != "_private.py":
            assert "setattr(" not in file.read_text(), file
            assert "_OPTIMIZER_HANDLERS" not in file.read_text(), file

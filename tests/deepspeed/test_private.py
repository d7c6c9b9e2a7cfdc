"""The contract with DeepSpeed: every name that is touched is there, and its absence is reported by name."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch

from sketch_plugins import registry


@pytest.fixture(scope="module")
def private():
    import sketch_deepspeed

    return sketch_deepspeed._private


def touched():
    import sketch_deepspeed._private as private

    return private.TOUCHED


@pytest.mark.parametrize(("module", "name"), touched())
def test_touched_name_is_where_it_was(module, name):
    import deepspeed

    found = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} has moved in deepspeed {deepspeed.__version__}"
        found = getattr(found, part)


def test_signatures():
    # What the wrappers rely on beyond the names. `signature` sees through functools.wraps to the original.
    from deepspeed.runtime.engine import DeepSpeedEngine as Engine
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def parameters(function):
        return list(inspect.signature(function).parameters)

    assert parameters(Engine._is_supported_optimizer) == ["self", "optimizer_name"]
    assert parameters(Engine._configure_basic_optimizer) == ["self", "model_parameters"]
    assert parameters(Engine._configure_optimizer) == ["self", "client_optimizer", "model_parameters"]
    assert parameters(Engine._load_zero_checkpoint) == ["self", "load_dir", "tag", "load_optimizer_states"]
    assert parameters(FP16_UnfusedOptimizer.initialize_optimizer_states) == ["self"]
    for cls in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert parameters(cls.offload_states)[:2] == ["self", "include"]
        assert "offloaded_states" in inspect.getsource(cls.offload_states)


def test_registering_again_changes_nothing(private):
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    method, supported = DeepSpeedEngine._configure_optimizer, list(ZERO_SUPPORTED_OPTIMIZERS)
    private.register()
    assert DeepSpeedEngine._configure_optimizer is method
    assert supported == ZERO_SUPPORTED_OPTIMIZERS
    for name in registry.names():
        assert supported.count(registry.get(name).cls) == 1
        assert not hasattr(torch.optim, name)  # torch is left as it is


@pytest.mark.parametrize(("module", "name"), touched())
def test_check_names_what_is_missing(module, name, private, monkeypatch):
    import deepspeed

    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    if isinstance(owner, type) and owner.__name__ == "OffloadStateTypeEnum":  # members of an Enum cannot be deleted
        monkeypatch.setattr(importlib.import_module(module), owner.__name__, object())
        name = f"{owner.__name__}.{last}"
        if last != "optim_states":
            pytest.skip("the members of this Enum are removed together, and the first of them is named")
    else:
        monkeypatch.delattr(owner, last)
    with pytest.raises(private.MovedSymbolError) as error:
        private.check()
    assert f"{module}.{name} is missing in deepspeed {deepspeed.__version__}" in str(error.value)


def test_importing_fails_loudly(tmp_path):
    script = (
        "import deepspeed.runtime.engine\n"
        "del deepspeed.runtime.engine.DeepSpeedEngine._configure_basic_optimizer\n"
        "import sketch_deepspeed\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    name = "deepspeed.runtime.engine.DeepSpeedEngine._configure_basic_optimizer"
    assert f"MovedSymbolError: {name} is missing" in done.stderr


def test_a_name_that_deepspeed_has_itself_is_not_taken_over(private, monkeypatch):
    monkeypatch.setattr("sketch_plugins.registry.names", lambda: ("adam",))
    with pytest.raises(ValueError, match="already has an optimizer 'adam'"):
        private.register()


def test_accelerate_is_changed_as_soon_as_it_is_there(private):
    accelerator = pytest.importorskip("accelerate.accelerator", reason="accelerate is not installed")
    from sketch_plugins import CSAdam

    optimizer = CSAdam([torch.nn.Parameter(torch.ones(2))])
    # Without the change: a DeepSpeedCPUAdam, which would have to be compiled first.
    assert accelerator.map_pytorch_optim_to_deepspeed(optimizer) is optimizer


def test_only_one_module_touches_private_names(private):
    from pathlib import Path

    for file in Path(private.__file__).parent.glob("*.py"):
        if file.name != "_private.py":
            assert "setattr(" not in file.read_text() and "wrap(" not in file.read_text(), file

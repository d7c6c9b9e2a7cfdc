"""The contract with transformers: every name that is used exists, and a missing one is reported by name."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
import transformers

from sketch_transformers import _private, registration


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


def test_what_trials_of_a_batch_size_rely_on(make_trainer):
    assert list(inspect.signature(transformers.Trainer.train).parameters)[:3] == [
        "self",
        "resume_from_checkpoint",
        "trial",
    ]
    assert _private.stock_train() is inspect.unwrap(transformers.Trainer.train)
    trainer = make_trainer()
    # Attributes that this package sets; if they had moved, setting them would have no effect.
    args = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "eval_on_start")
    assert {*args, "include_num_input_tokens_seen", "average_tokens_across_devices"} <= vars(trainer.args).keys()
    own = {"_train_batch_size", "_memory_tracker", "callback_handler", "control", "model_init", "accelerator"}
    assert own <= vars(trainer).keys() and "callbacks" in vars(trainer.callback_handler)
    assert "scaler" in vars(trainer.accelerator)
    assert trainer._train_batch_size == trainer.args.train_batch_size == 8
    trainer._memory_tracker = type(trainer._memory_tracker)(True)
    assert trainer._memory_tracker.skip_memory_metrics
    gradients = trainer.accelerator.gradient_state
    assert gradients.sync_gradients and isinstance(gradients.dataloader_references, list)
    _private.set_batch(trainer, 3, 2)
    assert trainer.get_total_train_batch_size(trainer.args) == 6
    assert [len(batch["input_ids"]) for batch in trainer.get_train_dataloader()] == [3] * 21 + [1]


def test_what_trials_rely_on_in_torch():
    source = inspect.getsource(torch.nn.parallel.DistributedDataParallel)
    assert "self.require_backward_grad_sync = True" in source and "self.require_forward_param_sync = True" in source
    parameter = torch.nn.Parameter(torch.ones(1))
    assert _private.grad_hooks(parameter) == {}
    seen = []
    parameter.register_post_accumulate_grad_hook(seen.append)
    parameter.sum().backward()
    _private.grad_hooks(parameter).clear()
    parameter.sum().backward()
    assert len(seen) == 1


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
    with pytest.raises(ValueError, match="already has an optimizer 'adafactor'"):
        registration.register()


def test_registering_again_changes_nothing():
    trainer, names = transformers.Trainer, list(transformers.training_args.OptimizerNames)
    methods = {name: getattr(trainer, name) for name in vars(trainer)}
    registration.register()
    assert {name: getattr(trainer, name) for name in vars(trainer)} == methods
    assert list(transformers.training_args.OptimizerNames) == names


def test_only_one_module_touches_private_names():
    """Only one more module replaces methods of transformers."""
    from pathlib import Path

    assert Path(registration.__file__).parent == Path(_private.__file__).parent
    for file in Path(_private.__file__).parent.glob("*.py"):
        text = file.read_text()
        if file.name != "_private.py":
            assert "setattr(" not in text, file
            assert "_OPTIMIZER_HANDLERS" not in text, file
        if file.name != "registration.py":
            assert not re.search(r"\bwrap\(", text), file


def test_the_private_module_knows_no_other_one():
    import ast
    from pathlib import Path

    imported = set()
    for node in ast.walk(ast.parse(Path(_private.__file__).read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert "sketch_plugins" in imported and not [name for name in imported if name.startswith("sketch_transformers")]

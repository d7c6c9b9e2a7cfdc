"""The contract with Lightning: every name that is used exists, and a missing one is reported by name."""

import importlib
import inspect
from pathlib import Path

import pytest

import sketch_lightning
from sketch_lightning import _private, names

NAMES = [*_private.STRATEGIES, *_private.CALLBACKS]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_name_is_where_it_was(module, name, namespace):
    assert _private.find(namespace, module, name) is not None


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_check_names_what_is_missing(module, name, monkeypatch):
    # The outermost name, because attributes of a base class cannot be deleted in the class itself.
    monkeypatch.delattr(importlib.import_module(f"lightning.pytorch.{module}"), name.partition(".")[0])
    with pytest.raises(_private.MovedSymbolError, match=rf"{module}\.{name} is missing in lightning \d"):
        _private.check("lightning.pytorch", ((module, name),))


def test_a_missing_module_is_named():
    with pytest.raises(_private.MovedSymbolError, match=r"lightning\.pytorch\.nowhere is missing"):
        _private.find("lightning.pytorch", "nowhere", "name")


def test_signatures(namespace):
    found = importlib.import_module(f"{namespace}.strategies")
    assert list(inspect.signature(found.Strategy.setup_optimizers).parameters) == ["self", "trainer"]
    assert list(inspect.signature(found.Strategy.load_optimizer_state_dict).parameters) == ["self", "checkpoint"]
    assert list(inspect.signature(found.DDPStrategy._register_ddp_hooks).parameters) == ["self"]
    assert list(inspect.signature(found.DeepSpeedStrategy._init_optimizers).parameters) == ["self"]


def test_a_name_that_lightning_has_itself_is_not_taken_over(namespace, monkeypatch):
    found = importlib.import_module(f"{namespace}.strategies").StrategyRegistry
    entry = found["sm3"]
    own = importlib.import_module(f"sketch_lightning.{sketch_lightning._MODULES[namespace]}")
    classes = {name: getattr(own, name) for name in sketch_lightning._STRATEGIES}
    monkeypatch.setattr(names.registry, "names", lambda: ("sm3",))
    found["sm3"] = {**entry, "strategy": object}
    try:
        with pytest.raises(ValueError, match="already has a strategy 'sm3'"):
            names.add_to_registry(namespace, classes)
    finally:  # not by monkeypatch, which calls `get`, and so makes a strategy
        found["sm3"] = entry


def test_registering_twice_changes_nothing(namespace):
    found = importlib.import_module(f"{namespace}.strategies").StrategyRegistry
    before = {name: found[name] for name in found}
    sketch_lightning.register()
    assert "sm3" in before
    assert {name: found[name] for name in found} == before


def test_only_one_module_touches_private_names():
    for file in Path(_private.__file__).parent.glob("*.py"):
        text = file.read_text()
        if file.name != "_private.py":
            for name in ("fit_loop._", "trainer._", "epoch_loop"):
                assert name not in text, (file, name)


def test_attributes_of_a_trainer(trainer, namespace):
    made = trainer(namespace)
    for name in (
        "fit_loop._data_source.instance",
        "fit_loop._combined_loader",
        "fit_loop._data_fetcher",
        "fit_loop.epoch_loop._results.clear",
        "fit_loop.epoch_loop._batches_that_stepped",
        "_logger_connector.should_update_logs",
        "_logger_connector.reset_results",
        "_logger_connector.reset_metrics",
    ):
        found = made
        for part in name.split("."):
            assert hasattr(found, part), f"Trainer.{name} has moved"
            found = getattr(found, part)

"""A mixin for strategies that replaces the module's optimizers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from sketch_lightning import _private
from sketch_lightning.replace import adopt_groups, follow, has_stepped, restored_momentum, retire, rewire
from sketch_plugins import registry
from sketch_plugins.counterpart import Wording, check_options, counterpart, describe
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.convert import convert_state, is_foreign
from sketch_plugins.optim.introduction import hand_over

#: Words of error messages for what the user of a strategy writes.
WORDS = Wording(
    options="optimizer_kwargs",
    owner="the module",
    instead=("Or let configure_optimizers build the sketched optimizer itself; the strategy then does not change it"),
    set_option="optimizer_kwargs={{{key!r}: {value}}}",
)


class Replacing:
    """A mixin for strategies: replaces the module's optimizers as soon as they have been made."""

    optimizers: list[Any]
    lr_scheduler_configs: list[Any]
    lightning_module: Any
    # The namespace of the base class; `build` sets it.
    _namespace = ""

    def __init__(
        self,
        optimizer: str = "cs_adam",
        optimizer_kwargs: Mapping[str, Any] | None = None,
        warm_start: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(warm_start, bool):
            raise ValueError(f"warm_start={warm_start!r} is not one of True, False")
        self._sketch_name = registry.get(optimizer).name
        self._sketch_options = check_options(optimizer, optimizer_kwargs or {}, WORDS)
        self._warm_start = warm_start
        super().__init__(**kwargs)

    def setup_optimizers(self, trainer: Any) -> None:
        """Like Lightning's; afterwards every optimizer is one of ours, or an error is raised."""
        super().setup_optimizers(trainer)  # type: ignore[misc]
        self.optimizers = self._replaced(self.optimizers, [config.scheduler for config in self.lr_scheduler_configs])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Like Lightning's, but the state of one of torch's optimizers is refused, or converted with ``warm_start``.

        Raises:
            ValueError: the checkpoint was written with one of torch's optimizers and ``warm_start`` is False.
        """
        states = checkpoint.get("optimizer_states")
        if states is not None:
            for optimizer in self.optimizers:
                adopt_groups(optimizer)
            states = [self._own(o, s) for o, s in zip(self.optimizers, states, strict=False)]
            for config, state in zip(self.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False):
                restored_momentum(config.scheduler, state)  # Lightning loads these states next
            checkpoint = {**checkpoint, "optimizer_states": states}
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]

    def _own(self, optimizer: Any, state: Any) -> Any:
        if not isinstance(optimizer, SketchOptimizer) or not is_foreign(state):
            return state
        kind = type(optimizer).__name__
        if not self._warm_start:
            raise ValueError(
                f"the checkpoint holds the state of one of torch's optimizers, not of {kind}. To convert it, use "
                f"{type(self).__name__}(optimizer={self._sketch_name!r}, warm_start=True), which puts its moments "
                f"into the state of {kind}. Or load only the weights, and start with a new optimizer state"
            )
        keep = [name for name in ("betas", "momentum") if name in self._sketch_options]
        converted = convert_state(state, optimizer, keep=keep)
        self._info(f"sketch_lightning: warm start, converted the checkpoint's moments to the state of {kind}")
        return converted

    def _replaced(self, optimizers: list[Any], schedulers: list[Any]) -> list[Any]:
        new, replaced, said = [], {}, []
        for old in optimizers:
            if isinstance(old, SketchOptimizer) or _private.is_mock(old):
                if isinstance(old, SketchOptimizer):
                    said.append(f"{type(old).__name__} comes from the module and was not replaced")
                new.append(old)
                continue
            made = counterpart(old, self._sketch_name, self._sketch_options, WORDS)
            if has_stepped(old):  # the module keeps its optimizer from one fit to the next
                made.load_state_dict(self._own(made, old.state_dict()))
            replaced[id(old)] = old, made
            said.append("replaced " + describe(type(old), made, self._sketch_options))
            new.append(made)
        if replaced:  # otherwise a module that keeps its optimizer in an attribute would train with the old one
            rewire([*schedulers, *follow(self.lightning_module, replaced)], replaced)
            for old, made in replaced.values():
                retire(old, made)
        if said:
            self._info(f"sketch_lightning: {'; '.join(said)}")
        for made in new:
            hand_over(made, functools.partial(logging.getLogger, f"{self._namespace}.utilities.rank_zero"))
        return new

    def _info(self, message: str) -> None:
        _private.find(self._namespace, "utilities.rank_zero", "rank_zero_info")(message)

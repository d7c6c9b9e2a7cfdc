"""All names of DeepSpeed that this package changes, or uses although they are not documented.

Other optimizers behave as before. The changes are:

* ``ZERO_SUPPORTED_OPTIMIZERS`` gets every class of the registry.
* ``DeepSpeedEngine`` accepts every name of the registry as the type of an optimizer and builds it
  (``_is_supported_optimizer``, ``_configure_basic_optimizer``). Otherwise it would look the name up in ``torch.optim``
  and pass the entries of the configuration to the constructor unchecked.
* ``DeepSpeedEngine._configure_optimizer`` accepts our optimizers with an offloaded state, without
  ``"zero_force_ds_cpu_optimizer": false``.
* ``DeepSpeedEngine._load_zero_checkpoint`` says what to do if the number of processes has changed.
* ``FP16_UnfusedOptimizer.initialize_optimizer_states`` (stage 0 in bf16 or fp16) takes a step without gradients, at the
  full learning rate, to allocate the state. Weights would decay once too often, and steps would count from 2.
* ``offload_states`` and ``reload_states`` of ZeRO move our state. Those of stage 3 refuse all optimizers but FusedAdam,
  and those of stages 1 and 2 leave nested state behind.
* accelerate's replacement of an optimizer by ``DeepSpeedCPUAdam`` under offloading does not replace ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch

from sketch_deepspeed.configuration import RESHARD, optimizer_from, refuse_impossible
from sketch_plugins import patching, registry
from sketch_plugins.import_hooks import is_initializing, when_imported
from sketch_plugins.notices import warn
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.sharding.names import name_parameters
from sketch_plugins.sharding.state_names import PLACE, kind_of

_ENGINE = "deepspeed.runtime.engine"
_STAGES = (
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3"),
)

#: The classes that DeepSpeed's ZeRO knows.
SUPPORTED = ("deepspeed.runtime.zero.utils", "ZERO_SUPPORTED_OPTIMIZERS")
#: Names of DeepSpeed that this package uses: module, then dotted name in it.
TOUCHED = (
    SUPPORTED,
    ("deepspeed.runtime.config", "DEEPSPEED_OPTIMIZERS"),
    (_ENGINE, "DeepSpeedEngine._is_supported_optimizer"),
    (_ENGINE, "DeepSpeedEngine._configure_basic_optimizer"),
    (_ENGINE, "DeepSpeedEngine._configure_optimizer"),
    (_ENGINE, "DeepSpeedEngine._load_zero_checkpoint"),
    (_ENGINE, "DeepSpeedEngine.zero_offload_optimizer"),
    (_ENGINE, "DeepSpeedEngine.zero_elastic_checkpoint"),
    (_ENGINE, "DeepSpeedEngine.load_universal_checkpoint"),
    (_ENGINE, "DeepSpeedEngine.optimizer_name"),
    (_ENGINE, "DeepSpeedEngine.optimizer_params"),
    ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer.initialize_optimizer_states"),
    ("deepspeed.runtime.zero.offload_config", "OffloadStateTypeEnum.optim_states"),
    ("deepspeed.runtime.zero.offload_config", "OffloadStateTypeEnum.hp_params"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3.offload_states"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3.reload_states"),
)
#: The function of accelerate that replaces optimizers.
ACCELERATE = ("accelerate.accelerator", "map_pytorch_optim_to_deepspeed")


class MovedSymbolError(patching.MovedSymbolError):
    """DeepSpeed lacks a name that this package relies on."""


_DEEPSPEED = patching.Framework(
    package="deepspeed",
    touched=TOUCHED,
    purpose="register its optimizers",
    instead='deepspeed.initialize(optimizer=CSAdam(...)) with "zero_allow_untested_optimizer": true and '
    '"zero_force_ds_cpu_optimizer": false works without registration.',
    error=MovedSymbolError,
)


def register() -> None:
    """Make every optimizer of the registry known to DeepSpeed. Calling it again does no harm.

    While DeepSpeed's engine is only partly imported, nothing is done yet.

    Raises:
        MovedSymbolError: see :func:`check`.
        ValueError: DeepSpeed has an optimizer of its own under one of our names.
    """
    package = sys.modules.get("deepspeed")
    if package and is_initializing(package) and not hasattr(sys.modules.get(_ENGINE), "DeepSpeedEngine"):
        when_imported(_ENGINE, register)  # importing more now could fail on partly imported modules
        return
    check()
    engine = _DEEPSPEED.find(_ENGINE, "DeepSpeedEngine")
    _refuse_taken_names()
    supported = _DEEPSPEED.find(*SUPPORTED)
    for name in registry.names():
        cls = registry.get(name).cls
        if cls not in supported:
            supported.append(cls)
    patching.wrap(engine, "_is_supported_optimizer", _knowing)
    patching.wrap(engine, "_configure_basic_optimizer", _building)
    patching.wrap(engine, "_configure_optimizer", _accepting)
    patching.wrap(engine, "_load_zero_checkpoint", _comparing)
    unfused = _DEEPSPEED.find("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer")
    patching.wrap(unfused, "initialize_optimizer_states", _leaving)
    for module, name in _STAGES:
        stage = _DEEPSPEED.find(module, name)
        if hasattr(stage, "offload_states"):  # stages 1 and 2 have it in recent versions only
            patching.wrap(stage, "offload_states", _offloading)
            patching.wrap(stage, "reload_states", _reloading)
    when_imported(ACCELERATE[0], _patch_accelerate)


def check() -> None:
    """Look up every name that this package uses.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of DeepSpeed.
    """
    _DEEPSPEED.check()
    if not isinstance(_DEEPSPEED.find(*SUPPORTED), list):
        raise _DEEPSPEED.moved(".".join(SUPPORTED), "is no longer a list")


def known_names() -> list[str]:
    """Our names in DeepSpeed's configuration. The engine has no list, so it is asked for each name."""
    return list(registry.names())


def _refuse_taken_names() -> None:
    for name in registry.names():
        if name in _DEEPSPEED.find("deepspeed.runtime.config", "DEEPSPEED_OPTIMIZERS"):
            raise ValueError(f"deepspeed {_DEEPSPEED.version()} already has an optimizer {name!r}")


# -- the engine ------------------------------------------------------------------------------------------------------


def _knowing(is_supported: Callable[..., bool]) -> Callable[..., bool]:
    def wrapped(self: Any, optimizer_name: str) -> bool:
        if optimizer_name in registry.names() or is_supported(self, optimizer_name):
            return True
        plain = str(optimizer_name).lower().replace("_", "")
        near = difflib.get_close_matches(plain, [name.replace("_", "") for name in registry.names()], 1, 0.8)
        if near:
            raise ValueError(
                f'the optimizer {{"type": "{optimizer_name}"}} of the DeepSpeed configuration does not exist; the '
                f"optimizers of sketch-plugins are {', '.join(registry.names())}"
            )
        return False

    return wrapped


def _building(configure: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, model_parameters: Any) -> Any:
        name = self.optimizer_name()
        if name not in registry.names():
            return configure(self, model_parameters)
        optimizer = optimizer_from(name, self.optimizer_params() or {}, model_parameters)
        _accept(self, optimizer)
        return optimizer

    return wrapped


def _accepting(configure: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        given = client_optimizer
        if isinstance(given, SketchOptimizer):
            _accept(self, given)
        elif callable(given) and not isinstance(given, torch.optim.Optimizer):

            def client_optimizer(parameters: Any) -> Any:
                made = given(parameters)
                if isinstance(made, SketchOptimizer):
                    _accept(self, made)
                return made

        configure(self, client_optimizer, model_parameters)

    return wrapped


def _accept(engine: Any, optimizer: SketchOptimizer) -> None:
    """Refuse what cannot work with an optimizer of ours; accept it where DeepSpeed would want its own.

    From here on, messages and reports call parameters by their names in the model, also pieces of a flat partition.
    """
    config = engine._config
    refuse_impossible(
        optimizer,
        engine.zero_offload_optimizer(),
        elastic=bool(engine.zero_elastic_checkpoint()),
        universal=bool(engine.load_universal_checkpoint()),
        zenflow=getattr(config.zero_config, "zenflow", None) is not None,
        masters=bool(engine.bfloat16_enabled() or engine.fp16_enabled()),
    )
    # True is DeepSpeed's default. A user who sets it explicitly expects DeepSpeed's error.
    if config._param_dict.get("zero_force_ds_cpu_optimizer") is not True:
        config.zero_force_ds_cpu_optimizer = False
    name_parameters(optimizer, engine.module)


def _comparing(load: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, load_dir: str, tag: Any, load_optimizer_states: bool = True) -> Any:
        # The number that the checkpoint says; None if DeepSpeed has not read it, which DeepSpeed reports itself.
        saved, present = self.loaded_checkpoint_dp_world_size, self.seq_dp_world_size
        if load_optimizer_states and saved not in (None, present) and isinstance(self.basic_optimizer, SketchOptimizer):
            raise ValueError(
                f"the checkpoint {load_dir}/{tag} was written by {saved} processes, and {present} processes are "
                "loading it: DeepSpeed cannot divide optimizer state differently. Convert the checkpoint: "
                f"{RESHARD.replace('CHECKPOINT', f'{load_dir}/{tag}').replace(' N', f' {present}')}"
            )
        return load(self, load_dir, tag, load_optimizer_states)

    return wrapped


def _leaving(initialize: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any) -> None:
        if not isinstance(self.optimizer, SketchOptimizer):
            initialize(self)

    return wrapped


# -- offload_states --------------------------------------------------------------------------------------------------


def _offloading(offload: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, include: Container[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.optimizer, SketchOptimizer):
            kinds = _DEEPSPEED.find("deepspeed.runtime.zero.offload_config", "OffloadStateTypeEnum")
            if (include is None or kinds.optim_states in include) and kinds.optim_states not in self.offloaded_states:
                _move_state(self.optimizer, torch.device("cpu"))
                self.offloaded_states.add(kinds.optim_states)  # so that DeepSpeed does not move it
            if (
                # Stage 3; stages 1 and 2 move their own tensors with any optimizer.
                hasattr(self, "fp32_partitioned_groups_flat")
                and (include is None or kinds.hp_params in include)
                and kinds.hp_params not in self.offloaded_states
            ):
                for flat in self.fp32_partitioned_groups_flat:
                    flat.data = flat.data.to("cpu")
                self.offloaded_states.add(kinds.hp_params)
        offload(self, include, *args, **kwargs)

    return wrapped


def _reloading(reload: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        kinds = _DEEPSPEED.find("deepspeed.runtime.zero.offload_config", "OffloadStateTypeEnum")
        ours = isinstance(self.optimizer, SketchOptimizer) and kinds.optim_states in self.offloaded_states
        if ours:
            self.offloaded_states.discard(kinds.optim_states)
        reload(self, *args, **kwargs)
        if ours:
            _move_state(self.optimizer, None)

    return wrapped


def _move_state(optimizer: SketchOptimizer, device: torch.device | None) -> None:
    """Move the state to a device; None: to that of the parameters."""
    for p, state in optimizer.state.items():
        if not isinstance(p, torch.Tensor):  # the entry belongs to no parameter
            continue
        where = p.device if device is None else device
        # Counters and places stay on the CPU.
        optimizer.state[p] = {
            name: value if kind_of(name) in ("step", PLACE) else _moved_to(where, value)
            for name, value in state.items()
        }


def _moved_to(device: torch.device, value: Any) -> Any:
    """Move tensors at any depth, because other code may keep nested ones."""
    if isinstance(value, Mapping):
        return {name: _moved_to(device, inner) for name, inner in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value


# -- accelerate ------------------------------------------------------------------------------------------------------


def _patch_accelerate() -> None:
    module = sys.modules[ACCELERATE[0]]
    if not hasattr(module, ACCELERATE[1]):
        warn(
            f"{'.'.join(ACCELERATE)} is missing: with offload_optimizer, this version of accelerate may "
            'replace our optimizers by DeepSpeedCPUAdam. Set "zero_force_ds_cpu_optimizer": false, and check '
            "the optimizer's type"
        )
        return
    patching.wrap(module, ACCELERATE[1], _sparing)


def _sparing(replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrapped(optimizer: Any) -> Any:
        return optimizer if isinstance(optimizer, SketchOptimizer) else replace(optimizer)

    return wrapped

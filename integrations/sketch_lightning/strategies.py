"""The strategies, made once for each of Lightning's two namespaces."""

from __future__ import annotations

import functools
import importlib
import logging
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sketch_lightning import _private
from sketch_lightning.replace import (
    adopt_groups,
    follow,
    has_stepped,
    restored_momentum,
    retire,
    rewire,
)
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
#: The ways in which DDP starts its processes; "" is Lightning's "ddp".
_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


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


# Key of a checkpoint for the error memories of all ranks.
MEMORIES = "sketch_lightning_comm"


class Compressing:
    """DDP whose gradients ``sketch_plugins.comm`` compresses; checkpoints contain the error memories.

    Attributes:
        comm_state: the hook's state, from the start of `fit` on; None if gradients are not compressed.
    """

    model: Any
    precision_plugin: Any
    comm_state: Any = None
    _comm: str | None
    _comm_kwargs: dict[str, Any]

    def _set_comm(self, comm: str | None, comm_kwargs: Mapping[str, Any] | None, hook: Any) -> None:
        if comm is None and comm_kwargs:
            raise ValueError(
                f"comm_kwargs={dict(comm_kwargs)!r} has no effect without comm: set a compressor, as in comm='topk'"
            )
        if comm is not None and hook is not None:
            raise ValueError(
                f"comm={comm!r} and ddp_comm_hook cannot be combined, because DDP has one hook: use one of them"
            )
        if comm is not None:
            _check_comm(comm, comm_kwargs or {})  # now, because later the processes would have been started
        self._comm, self._comm_kwargs = comm, dict(comm_kwargs or {})

    def _register_ddp_hooks(self) -> None:
        if self._comm is None:
            super()._register_ddp_hooks()  # type: ignore[misc]
        else:  # Lightning's method would do nothing on a CPU
            from sketch_plugins.comm import attach

            scaler = {"scaler": self.precision_plugin.scaler} if hasattr(self.precision_plugin, "scaler") else {}
            self.comm_state = attach(self.model, **{"compressor": self._comm, **scaler, **self._comm_kwargs})

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Like Lightning's, on every rank; the rank that writes also gets the memories of all ranks."""
        if self.comm_state is not None and "optimizer_states" in checkpoint:  # not if only the weights are saved
            checkpoint[MEMORIES] = self.comm_state.gather()
        super().save_checkpoint(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Like Lightning's, and load the error memories.

        Raises:
            ValueError: they were kept with other options, or the files are not those of all ranks of one run.
        """
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        if self.comm_state is not None and checkpoint.get(MEMORIES):
            self.comm_state.load_gathered(checkpoint[MEMORIES])


def build(namespace: str, module: str) -> dict[str, Any]:
    """Derive the strategies from Lightning's own classes in ``namespace``.

    Args:
        namespace: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
        module: module that will contain the classes, where pickles look for them.

    Raises:
        _private.MovedSymbolError: Lightning lacks a name that is needed.
    """
    _private.check(namespace)
    strategies: Any = importlib.import_module(f"{namespace}.strategies")

    class SketchStrategy(Replacing, strategies.SingleDeviceStrategy):  # type: ignore[misc, name-defined]
        """One device, with a sketched optimizer in place of the module's.

        Args:
            optimizer: a name of ``sketch_plugins.registry``: ``"cs_adam"``, ``"sm3"``, ``"sketchy"``, ...
            optimizer_kwargs: options for every parameter group, e.g. ``{"compression": 0.05}``; they take precedence
                over the hyperparameters of the module's optimizer, which are carried over otherwise.
            warm_start: convert a checkpoint of Adam, AdamW, SGD or Adagrad when it is loaded; False: it is an error.
            device: device for training; None: that of the trainer's accelerator.
            kwargs: arguments of Lightning's ``SingleDeviceStrategy``.

        Raises:
            ValueError: an unknown optimizer or option, or a value that is not allowed; more than one device; when the
                optimizers are made: one without counterpart, or with a hyperparameter that cannot be carried over.
        """

        def __init__(
            self,
            optimizer: str = "cs_adam",
            optimizer_kwargs: Mapping[str, Any] | None = None,
            warm_start: bool = False,
            device: Any = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(
                optimizer, optimizer_kwargs, warm_start, device="cpu" if device is None else device, **kwargs
            )
            self._given_device = device
            self._devices: list[torch.device] | None = None

        @property
        def parallel_devices(self) -> list[torch.device] | None:
            """The trainer's devices, which is only one."""
            return self._devices

        @parallel_devices.setter
        def parallel_devices(self, devices: list[torch.device] | None) -> None:
            if devices is not None and len(devices) > 1:
                raise ValueError(
                    f"strategy={self._sketch_name!r} trains on one device, but devices={len(devices)} was requested: "
                    f"use strategy='ddp_{self._sketch_name}' or devices=1"
                )
            self._devices = devices
            if devices and self._given_device is None:
                # The name of a strategy says nothing about the device, so Lightning would use the CPU.
                self._root_device = torch.device(devices[0])

    class SketchDDPStrategy(Replacing, Compressing, strategies.DDPStrategy):  # type: ignore[misc, name-defined]
        """DDP with a sketched optimizer, whose state is equal on all ranks, like AdamW's.

        Args:
            optimizer: see `SketchStrategy`.
            optimizer_kwargs: see `SketchStrategy`.
            warm_start: see `SketchStrategy`.
            comm: ``"topk"`` or another compressor of ``sketch_plugins.comm``: gradients are compressed, and entries
                that are left out are added in the next step (error feedback). None: gradients are not compressed.
            comm_kwargs: options of the compression, e.g. ``{"density": 0.01}``.
            kwargs: arguments of Lightning's ``DDPStrategy``.

        Raises:
            ValueError: see `SketchStrategy`; an unknown ``comm`` or option of it, ``comm_kwargs`` without ``comm``, or
                ``comm`` together with a ``ddp_comm_hook``.
        """

        def __init__(
            self,
            optimizer: str = "cs_adam",
            optimizer_kwargs: Mapping[str, Any] | None = None,
            warm_start: bool = False,
            comm: str | None = None,
            comm_kwargs: Mapping[str, Any] | None = None,
            **kwargs: Any,
        ) -> None:
            self._set_comm(comm, comm_kwargs, kwargs.get("ddp_comm_hook"))
            super().__init__(optimizer, optimizer_kwargs, warm_start, **kwargs)

    class MemSGDStrategy(Compressing, strategies.DDPStrategy):  # type: ignore[misc, name-defined]
        """DDP with compressed gradients and error memory; the module's optimizer is not replaced.

        Args:
            comm: a compressor of ``sketch_plugins.comm``.
            comm_kwargs: options of the compression, e.g. ``{"density": 0.01}``.
            kwargs: arguments of Lightning's ``DDPStrategy``.

        Raises:
            ValueError: an unknown ``comm`` or option of it; a ``ddp_comm_hook`` as well.
        """

        def __init__(
            self, comm: str = "block_topk", comm_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
        ) -> None:
            if comm is None:
                raise ValueError(
                    "comm=None sends gradients as Lightning's DDPStrategy does: use DDPStrategy, or name a compressor"
                )
            self._set_comm(comm, comm_kwargs, kwargs.get("ddp_comm_hook"))
            super().__init__(**kwargs)

    class SketchFSDPStrategy(Replacing, strategies.ModelParallelStrategy):  # type: ignore[misc, name-defined]
        """FSDP2 (``torch.distributed.fsdp.fully_shard``) with a sketched optimizer: each rank sketches its own rows.

        Lightning's ``FSDPStrategy`` is FSDP1, whose flat parameters hide the shapes in them; this is its
        ``ModelParallelStrategy``. That strategy needs a ``configure_model`` that shards. If a module has none, it is
        sharded here: every entry of a ``ModuleList`` or ``Sequential`` by itself, then the module's children. They have
        to be called as modules (``self.model(x)``), because FSDP2 gathers weights in that call. It also runs on a CPU
        (gloo).

        Args:
            optimizer: see `SketchStrategy`.
            optimizer_kwargs: see `SketchStrategy`.
            warm_start: False. Checkpoints of FSDP2 are read into the optimizer's existing state, so nothing can be
                converted.
            shard_modules: classes of modules to shard by themselves, instead of entries of lists.
            kwargs: arguments of Lightning's ``ModelParallelStrategy``; ``data_parallel_size`` defaults to all
                processes.

        Raises:
            ValueError: see `SketchStrategy`; ``warm_start=True``; a module that cannot be sharded without further
                information.
        """

        def __init__(
            self,
            optimizer: str = "cs_adam",
            optimizer_kwargs: Mapping[str, Any] | None = None,
            warm_start: bool = False,
            shard_modules: tuple[type[torch.nn.Module], ...] | set[type[torch.nn.Module]] | None = None,
            **kwargs: Any,
        ) -> None:
            if warm_start:
                raise ValueError(
                    "warm_start=True is not possible with FSDP, because a sharded checkpoint is read into the state "
                    "that the optimizer already has. Load only the weights, and start with a new optimizer state"
                )
            self._all_ranks = "data_parallel_size" not in kwargs and "tensor_parallel_size" not in kwargs
            self._shard_modules = tuple(shard_modules or ())
            super().__init__(optimizer, optimizer_kwargs, warm_start, **kwargs)

        def setup_environment(self) -> None:
            """Like Lightning's; a module without ``configure_model`` gets one that shards it."""
            if self._all_ranks:
                self._data_parallel_size, self._tensor_parallel_size = self.num_processes * self.num_nodes, 1
            super().setup_environment()
            module: Any = self.lightning_module
            base = _private.find(self._namespace, "", "LightningModule")
            if type(module).configure_model is base.configure_model and "configure_model" not in vars(module):
                mesh, classes = self.device_mesh["data_parallel"], self._shard_modules

                def configure_model(self: Any) -> None:
                    if not getattr(self, "_sketch_sharded", False):
                        shard(self, mesh, classes)
                        self._sketch_sharded = True

                module.configure_model = types.MethodType(configure_model, module)

        def teardown(self) -> None:
            """Like Lightning's; a ``configure_model`` that was added to the module is removed."""
            module: Any = self.lightning_module
            module.__dict__.pop("configure_model", None)
            super().teardown()

        def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            """Like Lightning's, with a check of the checkpoint.

            Raises:
                ValueError: training would start from a checkpoint that one of torch's optimizers wrote.
            """
            module: Any = self.lightning_module
            if module.trainer.state.fn == "fit":  # otherwise only weights are read
                _refuse_foreign(self.broadcast(checkpoint_path), kwargs.get("weights_only"))
            return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    class SketchDeepSpeedStrategy(Replacing, strategies.DeepSpeedStrategy):  # type: ignore[misc, name-defined]
        """DeepSpeed's ZeRO with a sketched optimizer: each rank sketches the pieces of matrices in its partition.

        DeepSpeed gets the optimizer as a client optimizer. With ``offload_optimizer`` it stays, although DeepSpeed
        would demand its own CPU Adam by default. Unlike Lightning's, this strategy also runs on a CPU if DeepSpeed
        itself does (``DS_ACCELERATOR=cpu``), for tests.

        Args:
            optimizer: see `SketchStrategy`.
            optimizer_kwargs: see `SketchStrategy`.
            warm_start: False. DeepSpeed reads its checkpoints itself, so nothing can be converted.
            kwargs: arguments of Lightning's ``DeepSpeedStrategy``: ``stage``, ``offload_optimizer``, ``config``, ...

        Raises:
            ValueError: see `SketchStrategy`; ``warm_start=True``; an ``optimizer`` block in the configuration.
        """

        def __init__(
            self,
            optimizer: str = "cs_adam",
            optimizer_kwargs: Mapping[str, Any] | None = None,
            warm_start: bool = False,
            **kwargs: Any,
        ) -> None:
            if warm_start:
                raise ValueError("warm_start=True is not possible with DeepSpeed, which reads its checkpoints itself")
            super().__init__(optimizer, optimizer_kwargs, warm_start, **kwargs)
            if "optimizer" in self.config:
                raise ValueError(
                    f'the DeepSpeed configuration has an "optimizer" block ({self.config["optimizer"]!r}), but the '
                    f"strategy's optimizer is {self._sketch_name!r}: remove the block"
                )
            # With offload_optimizer DeepSpeed would refuse every optimizer but its own.
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)
            self.config.setdefault("zero_allow_untested_optimizer", True)

        @property
        def root_device(self) -> torch.device:
            """Like Lightning's; CPUs get a number, too, because DeepSpeed asks for one."""
            device: torch.device = super().root_device
            return torch.device("cpu", 0) if device.type == "cpu" else device

        def setup_environment(self) -> None:
            """Like Lightning's, and also on a CPU if DeepSpeed runs on it."""
            if self._on_cpu():
                strategies.DDPStrategy.setup_environment(self)
            else:
                super().setup_environment()

        def setup_distributed(self) -> None:
            """Like Lightning's; CPUs have no numbers that could be checked."""
            if not self._on_cpu():
                super().setup_distributed()
                return
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _on_cpu(self) -> bool:
            if self.root_device.type != "cpu":
                return False
            from deepspeed.accelerator import get_accelerator

            return bool(get_accelerator().device_name() == "cpu")

        def _init_optimizers(self) -> Any:
            made, config = super()._init_optimizers()
            (new,) = self._replaced([made], [] if config is None else [config.scheduler])
            return new, config

    classes = (SketchStrategy, SketchDDPStrategy, MemSGDStrategy, SketchFSDPStrategy, SketchDeepSpeedStrategy)
    for cls in classes:
        cls._namespace, cls.__module__, cls.__qualname__ = namespace, module, cls.__name__
    return {cls.__name__: cls for cls in classes}


def add_to_registry(namespace: str, classes: Mapping[str, Any]) -> None:
    """Add every name of the family to Lightning's registry. Calling it again does no harm.

    Raises:
        ValueError: Lightning has a strategy of its own under one of our names.
    """
    strategies = _private.find(namespace, "strategies", "StrategyRegistry")
    for name, cls, options in _entries(classes):
        if name in strategies:
            if strategies[name]["strategy"] is not cls:
                raise ValueError(f"{namespace} already has a strategy {name!r}")
            continue
        strategies.register(name, cls, description=f"{cls.__name__}({options})", **options)


def _entries(classes: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    ddp, deepspeed = classes["SketchDDPStrategy"], classes["SketchDeepSpeedStrategy"]
    for suffix, method in _STARTS.items():
        yield f"ddp{suffix}_memsgd", classes["MemSGDStrategy"], {"start_method": method}
    for name in registry.names():
        own: dict[str, Any] = {"optimizer": name}
        yield name, classes["SketchStrategy"], own
        yield f"fsdp_{name}", classes["SketchFSDPStrategy"], own
        for suffix, method in _STARTS.items():
            yield f"ddp{suffix}_{name}", ddp, {**own, "start_method": method}
            yield (
                f"ddp{suffix}_find_unused_parameters_true_{name}",
                ddp,
                {**own, "start_method": method, "find_unused_parameters": True},
            )
        yield f"deepspeed_{name}", deepspeed, own
        for stage in (1, 2, 3):
            yield f"deepspeed_{name}_stage_{stage}", deepspeed, {**own, "stage": stage}
        for stage in (2, 3):
            offload = {"offload_optimizer": True, **({"offload_parameters": True} if stage == 3 else {})}
            yield f"deepspeed_{name}_stage_{stage}_offload", deepspeed, {**own, "stage": stage, **offload}


def _check_comm(comm: Any, options: Mapping[str, Any]) -> None:
    from sketch_plugins.comm import COMPRESSORS
    from sketch_plugins.comm.state import check_options as check

    if not isinstance(comm, str) or comm not in COMPRESSORS:
        raise ValueError(f"comm={comm!r} is not one of None, {', '.join(map(repr, COMPRESSORS))}")
    try:
        check(options)
        if getattr(options.get("compressor"), "name", options.get("compressor")) not in (None, comm):
            raise ValueError(f"it sets compressor={options['compressor']!r}, but comm={comm!r} is another compressor")
    except ValueError as error:
        raise ValueError(f"comm_kwargs={dict(options)!r}: {error}") from error


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def shard(module: torch.nn.Module, mesh: Any, classes: tuple[type[torch.nn.Module], ...]) -> None:
    """Shard a LightningModule: some modules within its children by themselves, and then the children.

    Raises:
        ValueError: a parameter belongs to no child, or to several.
    """
    from torch.distributed.fsdp import fully_shard

    how = "override configure_model and shard it there (torch.distributed.fsdp.fully_shard)"
    for name, _ in module.named_parameters(recurse=False):
        raise ValueError(
            f"parameter {name!r} belongs to the LightningModule itself, which is not called as a module: {how}"
        )
    owner: dict[int, str] = {}
    for name, child in _called(module):
        for label, p in child.named_parameters():
            if owner.setdefault(id(p), name) != name:
                raise ValueError(f"parameter {name}.{label} also belongs to {owner[id(p)]}: {how}")
    for _, child in _called(module):
        containers = (torch.nn.ModuleList, torch.nn.Sequential)
        for inner in list(child.modules()):
            entries = [inner] if isinstance(inner, classes) else []
            if not classes and isinstance(inner, containers):
                entries = list(inner)
            for entry in entries:
                if entry is not child and any(True for _ in entry.parameters()) and not _is_list(entry):
                    fully_shard(entry, mesh=mesh)
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)


def _called(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The children; for lists, which are not called, their entries."""
    for name, child in module.named_children():
        if _is_list(child):
            yield from ((f"{name}.{inner}", entry) for inner, entry in _called(child))
        else:
            yield name, child


def _is_list(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))


def _refuse_foreign(path: Any, weights_only: bool | None) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    if Path(path).is_file():
        saved = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        foreign = any(is_foreign(state) for state in saved.get("optimizer_states", ()))
    elif (Path(path) / ".metadata").is_file():
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        kept = (".exp_avg_sq", ".momentum_buffer", ".sum")
        foreign = any(name.startswith("optimizer_") and name.endswith(kept) for name in names)
    else:
        return
    if foreign:
        raise ValueError(
            f"the checkpoint {path} holds the state of one of torch's optimizers, and a sharded run cannot "
            "convert it: load only the weights, and start with a new optimizer state"
        )

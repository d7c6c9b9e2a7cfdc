"""The strategies, made once for each of Lightning's two namespaces."""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping
from typing import Any

import torch

from sketch_lightning import _private
from sketch_lightning.compressing_mixin import Compressing
from sketch_lightning.fsdp2 import refuse_foreign, shard
from sketch_lightning.replacing_mixin import Replacing


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
                refuse_foreign(self.broadcast(checkpoint_path), kwargs.get("weights_only"))
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

"""An ``accelerator.ddp_handler`` that registers the communication hook with error memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs

from sketch_plugins.comm import MemSGDState, attach
from sketch_plugins.comm.state import check_options

logger = logging.getLogger(__name__)


@dataclass
class MemSGDKwargs(DistributedDataParallelKwargs):
    """``DistributedDataParallelKwargs`` with sparsified gradients: see `sketch_plugins.comm.MemSGDState`.

    Assign it before ``prepare``: ``accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.01})``. The argument
    ``kwargs_handlers`` of ``Accelerator`` accepts accelerate's own classes only, and its ``comm_hook`` a fixed set of
    names. With one process there is nothing to send: a warning says so, and `state` stays None. Under fp16 the state
    gets accelerate's GradScaler, so that memories are kept unscaled.

    ``accelerator.save_state`` saves on one process, but each process has a memory of its own: call
    ``accelerator.ddp_handler.state.save(folder)`` and ``.load(folder)`` on all of them.

    Attributes:
        memsgd: options of `MemSGDState`; all other fields are those of ``DistributedDataParallelKwargs``.
        states: the `MemSGDState` of each model that ``prepare`` has wrapped, in their order.
        state: the last of them; None before ``prepare``.

    Raises:
        ValueError: see `MemSGDState`; in ``prepare``: ``comm_hook`` is set as well; the framework is FSDP, DeepSpeed or
            Megatron-LM, which reduce gradients themselves.
    """

    memsgd: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self.memsgd)
        self.states: list[MemSGDState] = []
        self._scaler: Any = None

    @property
    def state(self) -> MemSGDState | None:
        """The state of the model that was prepared last."""
        return self.states[-1] if self.states else None

    def to_dict(self, ignore_keys: Any = ("comm_hook", "comm_wrapper", "comm_state_option", "memsgd")) -> Any:
        """Arguments of DistributedDataParallel's constructor."""
        return {name: value for name, value in self.__dict__.items() if name not in (*ignore_keys, "states", "_scaler")}

    def prepared_by(self, accelerator: Any) -> None:
        """Check the framework; ``Accelerator.prepare`` calls this before anything else.

        Raises:
            ValueError: the framework does not use DistributedDataParallel.
        """
        kind = accelerator.distributed_type.value
        if not kind.startswith("MULTI_") and kind != "NO":
            raise ValueError(
                f"memsgd is not possible under {kind}, which reduces gradients itself: gradients are compressed "
                "under DistributedDataParallel only"
            )
        if kind == "NO":
            logger.warning("memsgd has no effect: there is one process, so no gradients are sent")
        self._scaler = accelerator.scaler

    def register_comm_hook(self, model: torch.nn.Module) -> None:
        """Register the hook; ``Accelerator.prepare`` calls this with the wrapped model."""
        chosen = getattr(self.comm_hook, "value", self.comm_hook)
        if chosen != "no":
            raise ValueError(
                f"comm_hook={chosen!r} and memsgd cannot be combined, because DistributedDataParallel has one "
                "hook: use one of them"
            )
        self.states.append(attach(model, **{"scaler": self._scaler, **self.memsgd}))  # type: ignore[arg-type]

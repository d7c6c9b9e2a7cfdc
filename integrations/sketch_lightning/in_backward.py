"""Steps in backward, by `sketch_plugins.InBackward`: the callback's work, without Lightning's base class."""

from __future__ import annotations

from typing import Any

from sketch_lightning import _private
from sketch_plugins import InBackward
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.optim import SketchOptimizer


class SteppingInBackward:
    """See `sketch_lightning.callbacks.OptimizerInBackward`."""

    _namespace = ""

    def __init__(self) -> None:
        self._backs: list[InBackward] = []
        self._handles: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse unsupported settings, before anything is made."""
        if stage == "fit":
            self._check(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Add the hooks."""
        self._remove()
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, SketchOptimizer):
                raise ValueError(
                    f"OptimizerInBackward needs a sketched optimizer, not {type(optimizer).__name__}: return one from "
                    'configure_optimizers, or use strategy="cs_adam"'
                )
            if in_backward(optimizer) is None:  # the module may have added its own hooks
                self._backs.append(self._add(optimizer))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hooks."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove()

    def _add(self, optimizer: SketchOptimizer) -> InBackward:
        # Lightning runs the last batch of a cycle in the closure of the optimizer's step, and the others outside of it.
        back = InBackward(optimizer, last=lambda: back.stepping)
        # Steps that were taken before the optimizer's step begins belong to a batch that failed, such as a trial of a
        # batch size that ran out of memory.
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: back.reset()))
        return back

    def _remove(self) -> None:
        for back in self._backs:
            back.remove()
        for handle in self._handles:
            handle.remove()
        self._backs, self._handles = [], []

    def _check(self, trainer: Any, pl_module: Any) -> None:
        base = _private.find(self._namespace, "", "LightningModule")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "OptimizerInBackward does not support manual optimization, in which Lightning does not know "
                "which backward is the last one before a step: use sketch_plugins.InBackward in the module"
            )
        if trainer.gradient_clip_val:
            raise ValueError(
                f"OptimizerInBackward does not support gradient_clip_val={trainer.gradient_clip_val!r}: steps are "
                "taken in backward, when not all gradients exist. Use gradient_clip_val=None; the optimizer's "
                "update_clip bounds the update of each tensor"
            )
        if type(pl_module).configure_gradient_clipping is not base.configure_gradient_clipping:
            raise ValueError(
                f"OptimizerInBackward does not support {type(pl_module).__name__}.configure_gradient_clipping, "
                "because steps in backward have already freed the gradients"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"OptimizerInBackward does not support precision={trainer.precision!r}: GradScaler unscales "
                "gradients after backward, when they have been freed. Use precision='bf16-mixed' or 'bf16-true'"
            )
        single = _private.find(self._namespace, "strategies", "SingleDeviceStrategy")
        fsdp2 = _private.find(self._namespace, "strategies", "ModelParallelStrategy")
        if not isinstance(trainer.strategy, (single, fsdp2)):
            raise ValueError(
                f"OptimizerInBackward does not support {type(trainer.strategy).__name__}: a step in backward "
                "would be taken before DistributedDataParallel's all-reduce, and DeepSpeed and FSDP1 provide "
                'gradients only after backward. Use one device, or FSDP2 (strategy="fsdp_cs_adam")'
            )

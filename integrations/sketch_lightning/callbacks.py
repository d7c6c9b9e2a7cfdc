"""The callbacks, made once for each of Lightning's two namespaces."""

from __future__ import annotations

from typing import Any

from sketch_lightning import _private
from sketch_lightning.cleaning import SketchCleaning
from sketch_lightning.in_backward import SteppingInBackward
from sketch_lightning.monitor import OptimizerStateMonitor
from sketch_lightning.reclaim import Reclaiming


def build(namespace: str, module: str) -> dict[str, Any]:
    """Derive the callbacks from Lightning's own class in ``namespace``.

    Args:
        namespace: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
        module: module that will contain the classes, where pickles look for them.

    Raises:
        _private.MovedSymbolError: Lightning lacks a name that is needed.
    """
    _private.check(namespace, _private.CALLBACKS)
    base = _private.find(namespace, "callbacks", "Callback")
    made = {}
    for cls in (OptimizerStateMonitor, SketchCleaning, ReclaimBatchSize, OptimizerInBackward):
        new = type(cls.__name__, (cls, base), {"__doc__": cls.__doc__, "__module__": module, "_namespace": namespace})
        made[new.__name__] = new
    return made


class ReclaimBatchSize(Reclaiming):
    """Uses the memory that the sketched optimizer saves: finds the largest batch that fits, and trains with it.

    Before training, batches of growing size are trained on for a few steps each, optimizer step included, until the
    memory exceeds the budget or runs out. Then everything is restored: parameters, buffers, states of optimizers,
    schedulers and random number generators. (Changes of a module to its own Python attributes are not undone.) The
    size is set where it came from: in the attribute ``batch_arg_name`` of module, datamodule or their hyperparameters,
    or in the loaders that were given to ``fit``. Unlike Lightning's ``BatchSizeFinder`` it works with DDP, where all
    ranks agree on a size that fits on each of them: in a trial each rank steps by itself.

    A resumed run takes the batch size from its checkpoint, and searches nothing.

    Args:
        budget: bytes (``2 * 2**30`` or ``"2GiB"``) or a fraction of the device's memory (0.9) that the peak may take;
            on a CPU it counts the resident memory of the process. None: until CUDA runs out of memory.
        keep_effective: False: use the largest batch. True: keep the samples per update: the accumulation is lowered as
            far as the memory allows, and the batch is raised accordingly.
        mode: ``"binsearch"``: exact to the sample; ``"power"``: by factors of two.
        steps_per_trial: number of optimizer steps with each size (the first one allocates the state).
        init_val: first size; None: the present batch size.
        max_val: largest size.
        max_trials: maximum number of sizes that are tried.
        batch_arg_name: see above.
        meter: measures memory instead of CUDA's statistics or the resident memory of a process on Linux: an object
            with ``start()`` and ``read()``, which returns the bytes at the peak since ``start``.

    Attributes:
        batch_size: the size that was found; None before the search.
        accumulate_grad_batches: the accumulation that belongs to it; None before the search.

    Raises:
        ValueError: an argument that is not allowed; at the start of ``fit``: no budget and no CUDA, a loader whose size
            cannot be changed, a strategy whose parameters cannot be put back (DeepSpeed), ``keep_effective`` with
            manual optimization or a ``GradientAccumulationScheduler``, or a budget in which not even one sample fits.
    """


class OptimizerInBackward(SteppingInBackward):
    """Takes the optimizer's steps in backward, and frees each gradient at once: see `sketch_plugins.InBackward`.

    The weights are the same as without it, to the last bit, including accumulation, schedules and checkpoints. The
    gradients take about the memory of the largest one. With ``accumulate_grad_batches`` this holds only in the last
    batch of a cycle, because gradients have to be kept before it. It works with automatic optimization. In manual
    optimization the module says which backward is the last one::

        def configure_optimizers(self):
            optimizer = CSAdam(self.parameters())
            InBackward(optimizer)
            return optimizer

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))  # here the weights change
            self.optimizers().step()

    ``on_before_optimizer_step`` and ``on_after_backward`` see no gradients. If this callback comes before
    `ReclaimBatchSize` in the list of callbacks, the batch is searched with steps in backward.

    Raises:
        ValueError: at the start of ``fit``: manual optimization; ``gradient_clip_val``, or a module's own
            ``configure_gradient_clipping``; a precision with GradScaler (16-mixed); DDP, FSDP1 and DeepSpeed; an
            optimizer that is not a sketched one.
    """

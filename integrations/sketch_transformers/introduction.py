"""The line about an optimizer's first step, in the log of transformers; names of its parameters, from the model."""

from __future__ import annotations

import functools
import logging
import weakref
from typing import TYPE_CHECKING, Any

from transformers.utils import logging as transformers_logging

from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.introduction import LATER, hand_over
from sketch_plugins.optim.introduction import logger as ours
from sketch_plugins.sharding.names import name_parameters

if TYPE_CHECKING:
    from transformers import Trainer

#: A child of transformers' own logger, with its handlers and its format.
logger = logging.getLogger("transformers.sketch_plugins")


def introduce_in(trainer: Trainer, optimizer: SketchOptimizer) -> None:
    """Name the parameters, and show the line of the first step together with Trainer's messages.

    Trainer's default, ``log_level="passive"``, leaves transformers at WARNING. The line is shown nevertheless, at level
    INFO of `logger`, whose own level is then INFO. If another ``log_level``, or another verbosity of transformers, is
    set, that level decides. If INFO is on for ``sketch_plugins`` itself, the line goes to that logger alone. If a
    `SketchCallback` logs its table, there is no line.
    """
    name_parameters(optimizer, trainer.model)
    hand_over(optimizer, functools.partial(_logger, weakref.ref(trainer)))


def _logger(trainer: weakref.ref[Trainer]) -> Any:
    from sketch_transformers.callback import SketchCallback

    running = trainer()
    if running is not None:
        callbacks = running.callback_handler.callbacks
        if any(getattr(callback, "is_trial", False) for callback in callbacks):  # this is a trial of a batch size
            return LATER
        if any(isinstance(callback, SketchCallback) and callback.will_report for callback in callbacks):
            return None
    if ours.isEnabledFor(logging.INFO):
        return ours
    if logger.level in (logging.NOTSET, logging.INFO):  # otherwise the user has set another level
        passive = running is None or running.args.log_level == "passive"
        shown = passive and transformers_logging.get_verbosity() == logging.WARNING
        logger.setLevel(logging.INFO if shown else logging.NOTSET)
    return logger

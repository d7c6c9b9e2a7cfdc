"""Memory-compressed optimizers that drop into the training framework people already use."""

from sketch_plugins.memory.report import StateReport, state_report
from sketch_plugins.optim import CSAdagrad, CSAdam, CSMomentum, CSRMSprop

__version__ = "0.1.0"

__all__ = ["CSAdagrad", "CSAdam", "CSMomentum", "CSRMSprop", "StateReport", "state_report"]

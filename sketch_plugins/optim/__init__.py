"""The optimizers, one file for each or for two close relatives. `base` has the step that they share."""

from sketch_plugins.optim.adagrad import CSAdagrad
from sketch_plugins.optim.adam import CSAdam, CSRMSprop
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.lion import CSLion
from sketch_plugins.optim.mem_sgd import MemSGD
from sketch_plugins.optim.momentum import CSMomentum
from sketch_plugins.optim.sadagrad import SAdagrad
from sketch_plugins.optim.schedule import quadratic_warmup
from sketch_plugins.optim.sketchy import Sketchy
from sketch_plugins.optim.sm3 import SM3

__all__ = [
    "SM3",
    "CSAdagrad",
    "CSAdam",
    "CSLion",
    "CSMomentum",
    "CSRMSprop",
    "MemSGD",
    "SAdagrad",
    "SketchOptimizer",
    "Sketchy",
    "quadratic_warmup",
]

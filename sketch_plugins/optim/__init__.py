"""One file for each optimizer family; `base` is the only Optimizer logic."""

from sketch_plugins.optim.adagrad import CSAdagrad
from sketch_plugins.optim.adam import CSAdam, CSRMSprop
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.momentum import CSMomentum

__all__ = ["CSAdagrad", "CSAdam", "CSMomentum", "CSRMSprop", "SketchOptimizer"]

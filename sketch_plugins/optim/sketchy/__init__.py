"""Shampoo with sketched covariances, composed of parts: graft, momentum, preconditioner, learning rate.

`optimizer` has the class and what the base class asks of it. `stacking` decides which tensors are stacked, and `stack`
takes the step of tensors of equal shape. Its parts are `graft`, `momentum`, the covariances (`schedule` says when they
are solved, `axes` which there are) and `write_back`. `kernels` runs the elementwise parts as fused kernels.
"""

from sketch_plugins.optim.sketchy.optimizer import Sketchy

__all__ = ["Sketchy"]

"""Shampoo with sketched covariances, composed of parts: graft, momentum, preconditioner, learning rate.

`optimizer` has the class and what it tells the base. `stacking` says what is stacked, and `stack` composes the step of
tensors of equal shape: `graft`, `momentum`, the covariances (`schedule`: when they are solved, `axes`: which there are)
and `write_back`. `kernels` has the elementwise parts in fused kernels.
"""

from sketch_plugins.optim.sketchy.optimizer import FIXED, Sketchy

__all__ = ["FIXED", "Sketchy"]

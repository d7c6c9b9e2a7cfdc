"""How a parameter appears on this rank: the 2-D blocks that an optimizer works on."""

from sketch_plugins.sharding.blocks import Matrix, matrix_shape

__all__ = ["Matrix", "matrix_shape"]

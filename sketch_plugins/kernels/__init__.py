"""The functions that a step spends its time in: one tile at a time, on plain tensors."""

from sketch_plugins.kernels.tile import compiled, fold_squares, root_mean_square, update

__all__ = ["compiled", "fold_squares", "root_mean_square", "update"]

"""Checkpoints of sharded runs, rewritten for another number of ranks."""

from sketch_plugins.checkpoints.saved import CannotReshard, Report, SavedOptimizer

__all__ = ["CannotReshard", "Report", "SavedOptimizer"]

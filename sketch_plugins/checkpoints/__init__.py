"""Checkpoints of sharded runs, written anew for another number of ranks."""

from sketch_plugins.checkpoints.kept import CannotReshard, Kept, Report

__all__ = ["CannotReshard", "Kept", "Report"]

"""Accounting of optimizer state. `plan` is in `sketch_plugins.memory.plan`, which takes longer to import."""

from sketch_plugins.memory.report import StateReport, state_report

__all__ = ["StateReport", "state_report"]

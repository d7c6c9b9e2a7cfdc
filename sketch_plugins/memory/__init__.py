"""Accounting of optimizer state. The plan is in `sketch_plugins.memory.plan`."""

from sketch_plugins.memory.report import StateReport, state_report

__all__ = ["StateReport", "state_report"]

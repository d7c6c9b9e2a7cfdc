"""Accounting of optimizer state."""

from sketch_plugins.memory.report import StateReport, state_report

__all__ = ["StateReport", "state_report"]

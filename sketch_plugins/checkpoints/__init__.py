"""Checkpoints: conversion from torch's optimizers, resharding for another number of ranks, and reports."""

from sketch_plugins.checkpoints.saved import CannotReshard, Report, SavedOptimizer

__all__ = ["CannotReshard", "Report", "SavedOptimizer"]

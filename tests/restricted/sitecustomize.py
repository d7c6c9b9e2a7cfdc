"""Hides the packages that SKETCH_TESTS_WITHOUT names, as if they were not installed, in every process of a test run.

Python imports this when it starts, from a folder on PYTHONPATH: see run.py.
"""

import importlib.machinery
import importlib.metadata
import os
import types

HIDDEN = tuple(filter(None, os.environ.get("SKETCH_TESTS_WITHOUT", "").split(",")))


def _hide() -> None:
    finder, versions = importlib.machinery.PathFinder, importlib.metadata.Distribution
    find_spec, from_name = finder.find_spec, versions.from_name

    def spec(_, name, path=None, target=None):
        return None if name in HIDDEN else find_spec(name, path, target)

    def distribution(_, name):
        if name in HIDDEN:
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(name)

    # Bound, as a class method is: pytest keeps it as an attribute of a class of its own.
    finder.find_spec = types.MethodType(spec, finder)
    versions.from_name = types.MethodType(distribution, versions)


if HIDDEN:
    _hide()

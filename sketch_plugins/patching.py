"""Names in other projects' frameworks that an integration changes, or uses although they are not documented.

Each integration lists these names in one module (a `Framework`). This module looks them up. If one is missing, it
raises an error that says what moved in which version, and what works nevertheless. It replaces methods, each once.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sketch_plugins.import_hooks import is_initializing

#: An attribute that marks the objects that we have put into a framework.
MARK = "_sketch_plugins"


class MovedSymbolError(RuntimeError):
    """A framework lacks a name that an integration relies on. Each integration has a subclass of this error."""


@dataclass(frozen=True)
class Framework:
    """A framework, as an integration uses it.

    Attributes:
        package: its top-level package, whose version messages name.
        touched: the names in it: module, then dotted name in the module.
        purpose: what cannot be done if one of them is missing, as in "this version of sketch-plugins cannot ...".
        instead: sentences that say what works without it.
        error: the error that is raised then.
    """

    package: str
    touched: tuple[tuple[str, str], ...]
    purpose: str
    instead: str
    error: type[MovedSymbolError] = MovedSymbolError

    def check(self, touched: Sequence[tuple[str, str]] | None = None) -> None:
        """Look up every name of ``touched``, by default all of them.

        Raises:
            MovedSymbolError: names the first one that is missing and the version of the framework.
        """
        for module, name in self.touched if touched is None else touched:
            self.find(module, name)

    def find(self, module: str, name: str) -> Any:
        """The object ``name``, which may be dotted, of ``module``, which is imported for it.

        Raises:
            ModuleNotFoundError: the framework is not installed, or lacks a package that it needs.
            MovedSymbolError: the framework has no such module, or the module has no such name.
        """
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == self.package or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise self.moved(module) from error
        return self._walk(found, module, name)

    def find_if_there(self, module: str, name: str) -> Any:
        """Like `find`, but the framework may be partly imported, further up the call stack.

        Returns:
            The object. None if its own module has not defined it yet. Also None if its module is not imported while
            another module of ``touched`` is being imported, because importing it could then fail on a partly imported
            module.
        """
        present = sys.modules.get(module)
        if present is None:
            modules = [sys.modules[other] for other, _ in self.touched if other in sys.modules]
            return None if any(is_initializing(other) for other in modules) else self.find(module, name)
        if is_initializing(present) and not hasattr(present, name.partition(".")[0]):
            return None
        return self._walk(present, module, name)

    def moved(self, symbol: str, what: str = "is missing") -> MovedSymbolError:
        """The error that says that ``symbol`` has moved."""
        return self.error(
            f"{symbol} {what} in {self.package} {self.version()}: this version of sketch-plugins cannot {self.purpose} "
            f"there. {self.instead}"
        )

    def version(self) -> str:
        """Version of the imported framework; a question mark as long as it does not define one."""
        return str(getattr(sys.modules.get(self.package), "__version__", "?"))

    def _walk(self, found: Any, module: str, name: str) -> Any:
        for part in name.split("."):
            if not hasattr(found, part):
                raise self.moved(f"{module}.{name}")
            found = getattr(found, part)
        return found


def wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace ``name`` of a class or module by ``wrapper(original)``, unless it is wrapped already."""
    there = getattr(owner, name)
    if is_ours(there):
        return
    replacement: Any = mark(functools.wraps(there)(wrapper(there)))
    static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if static else replacement)


def mark(added: Any) -> Any:
    """Mark an object, so that `is_ours` recognizes it."""
    setattr(added, MARK, True)
    return added


def is_ours(found: Any) -> bool:
    """Whether an integration has put the object into the framework."""
    return bool(getattr(found, MARK, False))

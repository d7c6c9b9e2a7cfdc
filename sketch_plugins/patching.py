"""Names in other people's frameworks that an integration changes, or uses without their being documented.

Each integration says in one module which names these are (a `Framework`). Here they are looked up, with an error that
says what moved in which version and what works all the same, and methods are replaced, each once.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sketch_plugins.import_hooks import is_initializing

#: The attribute that what has been put into a framework is known by.
MARK = "_sketch_plugins"


class MovedSymbolError(RuntimeError):
    """A name of a framework that an integration relies on is not where it was. Each integration has its subclass."""


@dataclass(frozen=True)
class Framework:
    """A framework, as an integration knows it.

    Attributes:
        package: its top-level package, whose version messages give.
        touched: the names in it: module, then dotted name in it.
        purpose: what cannot be done where one of them is missing, as in "this version of sketch-plugins cannot ...".
        instead: sentences that say what works without it.
        error: what is raised then.
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
        """The object ``name``, dotted or not, of ``module``, which is imported.

        Raises:
            ModuleNotFoundError: the framework is not installed, or lacks a package that it needs.
            MovedSymbolError: there is no such module in it, or no such name.
        """
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == self.package or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise self.moved(module) from error
        return self._walk(found, module, name)

    def find_if_there(self, module: str, name: str) -> Any:
        """The same while the framework may be half imported, further up the call stack.

        Returns:
            The object; None where its module has not got that far in its own import, or would have to be imported
            while another one that is touched has not: that would be to run into what is half imported.
        """
        present = sys.modules.get(module)
        if present is None:
            modules = [sys.modules[other] for other, _ in self.touched if other in sys.modules]
            return None if any(is_initializing(other) for other in modules) else self.find(module, name)
        if is_initializing(present) and not hasattr(present, name.partition(".")[0]):
            return None
        return self._walk(present, module, name)

    def moved(self, symbol: str, what: str = "is missing") -> MovedSymbolError:
        """The error that says so of ``symbol``."""
        return self.error(
            f"{symbol} {what} in {self.package} {self.version()}: this version of sketch-plugins cannot {self.purpose} "
            f"there. {self.instead}"
        )

    def version(self) -> str:
        """Of the framework as it is imported; a question mark while it does not say."""
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
    """Let `is_ours` know it."""
    setattr(added, MARK, True)
    return added


def is_ours(found: Any) -> bool:
    """Whether it was put there by an integration."""
    return bool(getattr(found, MARK, False))

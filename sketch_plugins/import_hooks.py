"""Run a function as soon as a module has been imported, so that an unmodified script gets an integration.

The table of triggers comes from the installed distributions (entry points), so the core names no framework.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Entry points of this group have the form ``trigger module = package:callable``. Once the trigger module has been
#: imported, the package is imported and the callable is called (``package`` alone is only imported).
GROUP = "sketch_plugins.integrations"


def install_integrations(trigger: str | None = None) -> bool:
    """Arm one hook per installed entry point of the group :data:`GROUP`.

    Args:
        trigger: arm only the hooks with this name; None: arm all.

    Returns:
        Whether any hook was armed.
    """
    found = [entry for entry in entries() if trigger in (None, entry.name)]
    for entry in found:
        when_imported(entry.name, functools.partial(_activate, entry))
    return bool(found)


def triggers() -> tuple[str, ...]:
    """The modules whose import triggers the import of an integration."""
    return tuple(dict.fromkeys(entry.name for entry in entries()))


def entries() -> list[importlib.metadata.EntryPoint]:
    """The installed entry points of the group :data:`GROUP`, in order of their names."""
    # A set, because an editable install and a wheel on one path list the same entry twice.
    return sorted(set(importlib.metadata.entry_points(group=GROUP)), key=lambda e: (e.name, e.value))


def when_imported(trigger: str, action: Callable[[], object]) -> None:
    """Call ``action`` right after the module ``trigger`` has been executed; at once if that has already happened.

    "Right after" means before the ``import`` statement returns, so that the changes of ``action`` are complete for the
    module's first user. Modules that are importing ``trigger`` are only partly executed at that moment. An exception of
    ``action`` makes the import of ``trigger`` fail.
    """
    module = sys.modules.get(trigger)
    if module is not None and not is_initializing(module):
        action()
        return
    _finder.actions.setdefault(trigger, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def is_initializing(module: ModuleType) -> bool:
    """Whether ``module`` is in the middle of its own import, by the attribute that importlib itself uses."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Finder(MetaPathFinder):
    """Lets the other finders find the module, and then arms its loader."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                self._arm(spec)
                return spec
        return None

    def _arm(self, spec: ModuleSpec) -> None:
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)
        if loader is None or execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # The name is compared, because modules may share a loader (one per zip archive).
            if module.__name__ == spec.name:
                for action in self.actions.pop(spec.name, []):
                    action()

        # The instance is patched, not wrapped, so that `module.__loader__`, `inspect.getsource` and pickling work as
        # they do without us.
        loader.exec_module = exec_module  # type: ignore[method-assign]


def _activate(entry: importlib.metadata.EntryPoint) -> None:
    loaded = entry.load()
    if not isinstance(loaded, ModuleType):
        loaded()


_finder = _Finder()

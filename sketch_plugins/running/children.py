"""How the processes that a program starts get the same changes as the program under ``sketch-plugins run``.

``run`` sets two environment variables, which processes inherit: ``SKETCH_PLUGINS_RUN`` with its settings, and a folder
in front of ``PYTHONPATH``. The ``sitecustomize`` in this folder (``on_path``) waits for the import of a framework, and
then calls `join`. A Python that ignores ``PYTHONPATH`` or ``sitecustomize`` (``-I``, ``-E``, ``-S``) is not reached.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from sketch_plugins import import_hooks
from sketch_plugins.running import watch

VARIABLE = "SKETCH_PLUGINS_RUN"
FOLDER = str(Path(__file__).parent / "on_path")

_joined = False


@dataclass(frozen=True)
class Settings:
    """Settings that all processes of a run share.

    Attributes:
        optim: the optimizer that replaces torch's; None: torch's are not replaced.
        optim_args: its options, as text.
        notes: files in which processes note the optimizers that they have built (`sketch_plugins.running.watch`). The
            last one belongs to the innermost ``run``.
    """

    optim: str | None = None
    optim_args: str | None = None
    notes: tuple[str, ...] = ()


def begin(optim: str | None = None, optim_args: str | None = None) -> Settings:
    """Install the integrations, and replace torch's optimizers by ``optim``, in this process and those that it starts.

    A ``run`` within a ``run`` uses the ``optim`` of the outer one unless it has its own.
    """
    outer = inherited() or Settings()
    if optim is None:
        optim, optim_args = outer.optim, outer.optim_args
    # Only a name: the first process that has something to note creates the file.
    name = f"sketch-plugins-run-{os.getpid()}-{secrets.token_hex(8)}"
    settings = Settings(optim, optim_args, (*outer.notes, os.path.join(tempfile.gettempdir(), name)))
    # The triggers come first, so that the child reads them without a parser. They contain neither commas nor spaces.
    triggers = sorted({"torch", *import_hooks.triggers()})
    os.environ[VARIABLE] = f"{','.join(triggers)} {json.dumps(asdict(settings))}"
    path = os.environ.get("PYTHONPATH", "")
    if FOLDER not in path.split(os.pathsep):
        # An empty entry means the current directory. An existing one stays, and none is added.
        os.environ["PYTHONPATH"] = f"{FOLDER}{os.pathsep}{path}" if path else FOLDER
    watch.begin(settings.notes[-1])
    join(settings)
    return settings


def join(settings: Settings | None = None) -> None:
    """Arm the hooks of this process, once. ``settings``: None for the inherited ones."""
    global _joined
    settings = inherited() if settings is None else settings
    if _joined or settings is None:
        return
    _joined = True
    import_hooks.install_integrations()
    import_hooks.when_imported("torch", functools.partial(_torch_is_there, settings))


def inherited() -> Settings | None:
    """The settings of the innermost ``run`` that this process belongs to; None if it belongs to none."""
    _, _, text = os.environ.get(VARIABLE, "").partition(" ")
    try:
        values = json.loads(text)
        return Settings(values["optim"], values["optim_args"], tuple(values["notes"]))
    except (ValueError, KeyError, TypeError):  # not set, or set by another version
        return None


def _torch_is_there(settings: Settings) -> None:
    watch.watch_constructors(settings.notes)
    if settings.optim is not None:
        from sketch_plugins.running import replacing

        replacing.begin(settings.optim, settings.optim_args)

"""The optimizers' names, and options as text. It needs no torch, so `run` finds a slip before the program begins."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Name of each optimizer in configurations -> module and name of its class.
CLASSES = {
    "cs_adam": "sketch_plugins.optim:CSAdam",
    "cs_adagrad": "sketch_plugins.optim:CSAdagrad",
    "cs_momentum": "sketch_plugins.optim:CSMomentum",
    "cs_rmsprop": "sketch_plugins.optim:CSRMSprop",
    # The name is not "lion", because DeepSpeed has an optimizer of that name.
    "cs_lion": "sketch_plugins.optim:CSLion",
    "sm3": "sketch_plugins.optim:SM3",
    "sketchy": "sketch_plugins.optim:Sketchy",
}


def check_name(name: str) -> None:
    """Check that there is an optimizer of this name.

    Raises:
        ValueError: there is none. The message lists the names and suggests the one that may be meant.
    """
    if name not in CLASSES:
        raise ValueError(f"unknown optimizer {name!r}.{did_you_mean(name)} The optimizers are {', '.join(CLASSES)}")


def did_you_mean(name: str, names: Iterable[str] = tuple(CLASSES)) -> str:
    """`` Did you mean 'cs_adam'?`` if a name (of an optimizer or a class) is nearly one of ``names``, else ""."""
    written = {other.replace("_", ""): other for other in names}
    close = difflib.get_close_matches(str(name).lower().replace("_", ""), written, n=1, cutoff=0.7)
    return f" Did you mean {written[close[0]]!r}?" if close else ""


def split_options(text: str | None) -> dict[str, str]:
    """The options in ``"compression=0.1,seed=1"``, which ``--optim-args`` gives, as a dictionary.

    Raises:
        ValueError: a part of the text is not of the form key=value, or a key is given twice.
    """
    given: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"--optim-args {text!r}: {part!r} is not of the form key=value")
        if key in given:
            raise ValueError(f"--optim-args {text!r}: {key!r} is given twice")
        given[key] = value
    return given

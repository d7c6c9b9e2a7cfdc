"""Declares an option once: its keyword for editors, its entry in the table, its default and its docstring lines.

A set of options is a `TypedDict` whose annotations each hold an `Option`::

    class Clipping(TypedDict, total=False):
        update_clip: Annotated[float | None, option(0.0, "what it does", allowed="a number >= 0", check=...)]

An optimizer takes ``**options: Unpack[...]`` of such a set, which editors and type checkers read. `with_options` makes
the rest from it: the table that validates values, the defaults of the first preset, the signature that `help` shows,
and the entries of the docstring's ``Args``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sketch_plugins.optim.options import BY_POSITION, NoEffect, Option

Class = TypeVar("Class", bound=type)

#: The line of a docstring that the entries of the options replace.
PLACE = re.compile(r"^( *)\{options\}\n", re.MULTILINE)
_WIDTH = 120
_SIMPLE = (bool, int, float, str, tuple)


def option(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] = (),
    allowed: str = "",
    check: Callable[[Any], bool] | None = None,
    structural: bool = False,
) -> Option:
    """An `Option` for an annotation. Its name and its type come from the annotation."""
    return Option("", object, doc, choices, allowed, check, structural, default)


def count(default: int, doc: str, least: int, structural: bool = False) -> Option:
    """An `option` whose value is an integer of at least ``least``."""
    allowed = f"an integer >= {least}"
    return option(default, doc, allowed=allowed, check=lambda v: v >= least, structural=structural)


def unused(choices: tuple[Any, ...], why: str) -> NoEffect:
    """An argument of torch's optimizers that is accepted without effect, for an annotation. ``why`` is its reason."""
    return NoEffect("", bool, why, choices=choices, default=choices[0])


def declared(kind: type) -> dict[str, Option]:
    """The options of a set, with their names and types.

    Raises:
        TypeError: an annotation has no `Option`.
    """
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        options = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Option)]
        if len(options) != 1:
            raise TypeError(f"{kind.__name__}.{name} is declared without an option: write Annotated[type, option(...)]")
        found[name] = dataclasses.replace(options[0], name=name, type=_type_of(hint))
    return found


def without_effect(kind: type) -> dict[str, NoEffect]:
    """The arguments of a set that are accepted without effect."""
    return {name: one for name, one in declared(kind).items() if isinstance(one, NoEffect)}


def with_options(kind: type, **changes: Mapping[str, Any] | Option) -> Callable[[Class], Class]:
    """Give an optimizer the options of a set: the table, the first preset, the signature, the docstring's entries.

    Args:
        kind: the set, a `TypedDict`. The constructor's ``**options`` are unpacked from it.
        changes: options that are declared differently for this optimizer. A value is either a mapping of attributes
            that change, or a whole `Option`, which may also belong to a named argument of the constructor (``betas``).
    """

    def complete(cls: Class) -> Class:
        if "__init__" not in vars(cls):
            raise TypeError(f"{cls.__name__} needs a constructor of its own, which takes **options: Unpack[...]")
        target: Any = cls
        constructor = target.__init__
        signature = inspect.signature(constructor)
        named = signature.parameters.keys()
        # The other options are set by the class that this one is derived from.
        inherited = {name: one for name, one in getattr(cls, "OPTIONS", {}).items() if name in BY_POSITION}
        options = {name: one for name, one in BY_POSITION.items() if name in named} | inherited | declared(kind)
        for name, change in changes.items():
            options[name] = change if isinstance(change, Option) else dataclasses.replace(options[name], **change)
        target.OPTIONS = {name: one for name, one in options.items() if not isinstance(one, NoEffect)}
        target.NO_EFFECT = {name: one for name, one in options.items() if isinstance(one, NoEffect)}
        by_keyword = [one for name, one in options.items() if name not in named and name not in BY_POSITION]
        # None leaves an option to the preset, so it is no default, unless the option lists None as a value.
        defaults = {one.name: one.default for one in by_keyword if one.default is not None or None in one.choices}
        defaults = {name: value for name, value in defaults.items() if name in target.OPTIONS}
        first = {**defaults, **vars(cls).get("PRESETS", {}).get("default", {})}
        others = {name: preset for name, preset in target.PRESETS.items() if name != "default"}
        target.PRESETS = {"default": first, **others}
        constructor.__signature__ = _signature(signature, by_keyword, typing.get_type_hints(kind))
        if cls.__doc__:  # python -OO removes docstrings
            target.__doc__ = _described(cls, by_keyword)
        return cls

    return complete


def _described(cls: type, options: list[Option]) -> str:
    """The docstring with an entry for each option, indented as the placeholder is (Python 3.13 dedents docstrings)."""
    found = PLACE.search(cls.__doc__ or "")
    if found is None:
        raise TypeError(f"the docstring of {cls.__name__} has no line {{options}} under Args")
    entries = "".join(_entry(one, found[1]) for one in options)
    return f"{cls.__doc__[: found.start()]}{entries}{cls.__doc__[found.end() :]}"  # type: ignore[index]


def _type_of(hint: Any) -> type:
    """The type of an annotation: float for ``Annotated[float | None, ...]``, str if several types are allowed."""
    kinds = [typing.get_origin(kind) or kind for kind in _members(hint.__origin__)]
    kinds = [kind for kind in kinds if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in _SIMPLE else str


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if "Union" in str(typing.get_origin(hint)) else (hint,)


def _signature(signature: inspect.Signature, options: list[Option], hints: Mapping[str, Any]) -> inspect.Signature:
    """The signature with a parameter for each option in place of ``**options``. None leaves an option to the preset."""
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    for one in options:
        hint = hints[one.name]
        default = None if type(None) in typing.get_args(hint) and not isinstance(one, NoEffect) else one.default
        own.append(inspect.Parameter(one.name, keyword, default=default, annotation=hint))
    return signature.replace(parameters=own)


def _entry(one: Option, indent: str) -> str:
    if isinstance(one, NoEffect):
        said = f"accepted for compatibility with torch's optimizers; only {' or '.join(map(repr, one.choices))}."
    elif one.choices and all(isinstance(choice, str) for choice in one.choices):
        allowed = ", ".join(f'``"{choice}"``' for choice in one.choices)
        said = f'{one.doc} One of {allowed}; default ``"{one.default}"``.'
    elif one.default is None and None not in one.choices:
        said = one.doc
    elif type(one.default) is float:
        said = f"{one.doc} Default {one.default:g}."
    else:
        said = f"{one.doc} Default {one.default!r}."
    deeper = f"{indent}    "
    return (
        textwrap.fill(
            f"{one.name}: {said}",
            _WIDTH,
            initial_indent=indent,
            subsequent_indent=deeper,
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
    )

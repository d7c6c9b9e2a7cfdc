"""Docstrings for the API reference: with the options that a class gets when it is made, and in Markdown.

mkdocstrings reads the sources without importing them. In the sources, the optimizers' docstrings have a line
``{options}``, which `sketch_plugins.optim.declaring.with_options` replaces by the options when the class is made. This
extension imports those classes. The docstrings are written in the reStructuredText that Sphinx reads: formulas and
simple tables are translated, the rest is the same in Markdown.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import griffe

# The classes of this checkout, wherever the package is installed from.
sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "integrations")]

MATH = re.compile(r"^(?P<indent> *)\.\. math::(?P<first>[^\n]*)\n(?P<body>(?:(?P=indent) +[^\n]*\n|\n)*)", re.MULTILINE)
TABLE = re.compile(
    r"^(?P<rule> *=+(?: +=+)+)\n(?P<head>.*?)^(?P=rule)\n(?P<rows>.*?)^(?P=rule)\n", re.MULTILINE | re.DOTALL
)
LITERAL = re.compile(r"::\n\n(?P<code>(?:    [^\n]*\n|\n)+)")
PAGE = re.compile(r"(?<![\w/`(])docs/(?P<page>\w+)\.md")


def formula(found: re.Match[str]) -> str:
    """``.. math::`` as a block between two dollars; columns (``&``) need an environment."""
    body = textwrap.dedent(found["first"].strip() + "\n" + textwrap.dedent(found["body"])).strip()
    if "&" in body or "\\\\" in body:
        body = "\\begin{aligned}\n" + body + "\n\\end{aligned}"
    return textwrap.indent(f"\n$$\n{body}\n$$\n\n", found["indent"], lambda line: bool(line.strip()))


def table(found: re.Match[str]) -> str:
    """A simple table; a row whose first cell is empty continues the one above."""
    starts = [one.start() for one in re.finditer(r"=+", found["rule"])]
    ends = [*starts[1:], None]
    indent = " " * starts[0]

    def cells(line: str) -> list[str]:
        return [line[a:b].strip() for a, b in zip(starts, ends, strict=True)]

    rows: list[list[str]] = []
    for line in found["rows"].splitlines():
        of = cells(line)
        if of[0] or not rows:
            rows.append(of)
        else:
            rows[-1] = [f"{above} {more}".strip() for above, more in zip(rows[-1], of, strict=True)]
    heads = cells(found["head"].splitlines()[0])
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n" + "".join(f"{indent}| {' | '.join(row)} |\n" for row in lines) + "\n"


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    text = TABLE.sub(table, text + "\n")
    text = MATH.sub(formula, text)
    text = re.sub(r":math:`([^`]*)`", lambda found: f"${found[1]}$", text)
    text = LITERAL.sub(lambda found: f":\n\n    ```python\n{found['code'].rstrip()}\n    ```\n\n", text)
    return PAGE.sub(lambda found: f"[{found['page'].replace('_', ' ')}](../{found['page']}.md)", text)


class Reference(griffe.Extension):
    """Fills in options, then translates every docstring."""

    def __init__(self) -> None:
        super().__init__()
        #: Paths of the classes whose docstring had a place for options.
        self.filled: set[str] = set()

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object, before its docstring is taken apart."""
        docstring = obj.docstring
        if docstring is None:
            return
        if obj.is_class and "{options}" in docstring.value:
            made = getattr(importlib.import_module(obj.module.path), obj.name)
            docstring.value = inspect.cleandoc(made.__doc__)
            self.filled.add(obj.path)
        docstring.value = markdown(docstring.value).rstrip()

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a constructor that takes ``**options`` the parameters that `help` shows."""
        made = cls.members.get("__init__")
        if cls.path not in self.filled or not isinstance(made, griffe.Function):
            return
        whole = inspect.signature(getattr(importlib.import_module(cls.module.path), cls.name))
        kinds = griffe.ParameterKind
        for name, parameter in whole.parameters.items():
            if name not in made.parameters:
                default = repr(parameter.default)
                made.parameters.add(griffe.Parameter(name, kind=kinds.keyword_only, default=default))
        del made.parameters["options"]

"""Scatter plots and curves on the canvas of docs/tools/pictures.py: axes, marks, and labels that do not overlap."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

Point = tuple[float, float]
Box = tuple[float, float, float, float]
SMALL = 11
#: Pixels from a mark to its label: right, left, above, below, and the corners, in the order in which they are tried.
PLACES = (
    (9, 4, "start"), (-9, 4, "end"), (0, -9, "middle"), (0, 17, "middle"), (8, -7, "start"), (8, 14, "start"),
    (-8, -7, "end"), (-8, 14, "end"), (0, -21, "middle"), (0, 29, "middle"), (14, -19, "start"), (-14, -19, "end"),
    (14, 26, "start"), (-14, 26, "end"), (0, -33, "middle"), (0, 41, "middle"),
)  # fmt: skip


def pictures() -> ModuleType:
    """docs/tools/pictures.py, which is no package."""
    path = Path(__file__).parents[2] / "docs" / "tools" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def escaped(words: str) -> str:
    """For an SVG file."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@dataclass
class Panel:
    """One plot of a picture.

    Args:
        canvas: where it is drawn.
        box: left, top, width and height of its axes.
        x: the limits of the horizontal axis.
        y: the limits of the vertical axis, the lower one below.
        log: whether the horizontal axis is logarithmic.
    """

    canvas: Any
    box: Box
    x: Point
    y: Point
    log: bool = False
    taken: list[Box] = field(default_factory=list)

    def place(self, x: float, y: float) -> Point:
        """A point in pixels."""
        left, top, wide, tall = self.box
        scale: Callable[[float], float] = math.log10 if self.log else float
        across = (scale(x) - scale(self.x[0])) / (scale(self.x[1]) - scale(self.x[0]))
        return left + wide * across, top + tall * (self.y[1] - y) / (self.y[1] - self.y[0])

    def axes(self, title: str, x_label: str, y_label: str, x_ticks: Iterable[float], y_ticks: Iterable[float]) -> None:
        """The frame, ticks and lines."""
        left, top, wide, tall = self.box
        c = self.canvas
        c.box(left, top, wide, tall, "empty")
        c.text(left, top - 10, escaped(title), size=13)
        for tick in x_ticks:
            x, _ = self.place(tick, self.y[0])
            c.path([(_r(x), top), (_r(x), top + tall)], "line")
            c.text(_r(x), top + tall + 15, f"{tick:g}", "middle", "faint", SMALL)
        for tick in y_ticks:
            _, y = self.place(self.x[0], tick)
            c.path([(left, _r(y)), (left + wide, _r(y))], "line")
            c.text(left - 6, _r(y + 4), f"{tick:g}", "end", "faint", SMALL)
        c.text(left + wide / 2, top + tall + 32, escaped(x_label), "middle", "faint", SMALL)
        c.text(left + wide, top - 10, escaped(y_label), "end", "faint", SMALL)

    def line(self, points: Iterable[Point], colour: str) -> None:
        """Through points; labels keep away from its level and upright parts."""
        placed = [self.place(*point) for point in points]
        self.canvas.path([(_r(x), _r(y)) for x, y in placed], colour)
        for (x1, y1), (x2, y2) in pairwise(placed):
            if x1 == x2 or y1 == y2:
                self.taken.append((min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))

    def mark(self, x: float, y: float, colour: str, sides: int, spread: float | None = None) -> None:
        """A filled polygon, with a line over its standard deviation on both sides."""
        if spread:
            ends = [min(max(y + sign * spread, self.y[0]), self.y[1]) for sign in (-1, 1)]
            self.line([(x, end) for end in ends], colour)
        px, py = self.place(x, y)
        corners = [math.pi * (2 * n + 1) / sides for n in range(sides)] if sides != 4 else [0, 1.5708, 3.1416, 4.7124]
        polygon = [(_r(px + 5 * math.cos(a)), _r(py + 5 * math.sin(a))) for a in corners]
        self.canvas.path([*polygon, polygon[0]], colour, fill=colour)
        self.taken.append((px - 6, py - 6, px + 6, py + 6))

    def label(self, x: float, y: float, words: str, colour: str) -> None:
        """Beside a mark, at the first place that is free, or at the one that hides the least."""
        px, py = self.place(x, y)
        wide = 6.1 * len(words)
        best: tuple[float, Box, tuple[float, float, str]] | None = None
        for dx, dy, anchor in PLACES:
            start = px + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = start, py + dy - 9, start + wide, py + dy + 2
            cost = sum(_overlap(box, other) for other in self.taken) + 50 * self._outside(box)
            if best is None or cost < best[0]:
                best = cost, box, (px + dx, py + dy, anchor)
            if cost == 0:
                break
        assert best is not None
        self.taken.append(best[1])
        tx, ty, anchor = best[2]
        self.canvas.text(_r(tx), _r(ty), escaped(words), anchor, colour, SMALL)

    def _outside(self, box: Box) -> float:
        left, top, wide, tall = self.box
        return max(0, left - box[0]) + max(0, box[2] - left - wide) + max(0, top - box[1]) + max(0, box[3] - top - tall)


def _r(value: float) -> float:
    return round(value, 1)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two."""
    step = (high - low) / about
    unit = 10 ** math.floor(math.log10(step))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= step)
    return [round(step * n, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]

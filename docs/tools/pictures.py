"""Draw the pictures of the documentation, each in a light and a dark form: ``python docs/tools/pictures.py``.

It writes docs/images/NAME-light.svg and NAME-dark.svg with nothing but the standard library, the same bytes every time;
tests/docs/test_pictures.py compares. Figures come from docs/benchmarks.md, which the same test reads.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "images"
THEMES = {
    "light": {"ink": "#24292f", "faint": "#8c959f", "line": "#d0d7de", "empty": "#f6f8fa",
              "a": "#4c6ef5", "b": "#f08c00", "c": "#2f9e44", "d": "#ae3ec9", "e": "#1098ad"},
    "dark": {"ink": "#e6edf3", "faint": "#8b949e", "line": "#3d444d", "empty": "#212830",
             "a": "#748ffc", "b": "#ffa94d", "c": "#69db7c", "d": "#da77f2", "e": "#3bc9db"},
}  # fmt: skip
#: Bytes of optimizer state a parameter, of the language model of docs/benchmarks.md ("Quality").
STATE = {
    "AdamW": 8.00,
    "sketchy": 1.34,
    "cs_adam": 1.26,
    "cs_adam, preset=lean": 0.209,
    "sm3, preset=ema": 0.0325,
}


class Canvas:
    """Shapes of one SVG file."""

    def __init__(self, width: int, height: int, title: str, theme: str) -> None:
        self.colours = THEMES[theme]
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="14">',
            f"<title>{title}</title>",
        ]

    def box(self, x: float, y: float, w: float, h: float, colour: str, opacity: float = 1.0) -> None:
        """A rectangle with a thin border."""
        c = self.colours
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{c[colour]}" '
            f'fill-opacity="{opacity:.2f}" stroke="{c["line"]}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "start", colour: str = "ink", size: int = 14) -> None:
        """A line of text."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{self.colours[colour]}" '
            f'font-size="{size}">{words}</text>'
        )

    def path(self, points: list[tuple[float, float]], colour: str, fill: str = "none", opacity: float = 1.0) -> None:
        """A line through points, or an area."""
        d = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        filled = fill if fill == "none" else self.colours[fill]
        self.parts.append(
            f'<path d="{d}" fill="{filled}" fill-opacity="{opacity:.2f}" stroke="{self.colours[colour]}" '
            f'stroke-width="1.5"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """A straight arrow, to the right or downwards."""
        head = (
            [(x2 - 6, y2 - 4), (x2, y2), (x2 - 6, y2 + 4)]
            if y1 == y2
            else [(x2 - 4, y2 - 6), (x2, y2), (x2 + 4, y2 - 6)]
        )
        self.path([(x1, y1), (x2, y2)], "faint")
        self.path(head, "faint")

    def svg(self) -> str:
        """The file."""
        return "\n".join([*self.parts, "</svg>", ""])


def memory(theme: str) -> Canvas:
    """Weights, gradients and optimizer state, bytes a parameter in float32."""
    c = Canvas(780, 270, "Bytes a parameter: weights, gradients and optimizer state", theme)
    scale, left = 33.0, 190
    for n, (name, state) in enumerate(STATE.items()):
        y = 50 + 38 * n
        c.text(left - 12, y + 18, name, "end")
        c.box(left, y, 4 * scale, 26, "faint", 0.35)
        c.box(left + 4 * scale, y, 4 * scale, 26, "faint", 0.7)
        c.box(left + 8 * scale, y, max(state * scale, 1.5), 26, "b" if name == "AdamW" else "a")
        c.text(left + 8 * scale + state * scale + 10, y + 18, f"{state:g}", colour="ink")
    c.text(left, 36, "weights 4", colour="faint")
    c.text(left + 4 * scale, 36, "gradients 4", colour="faint")
    c.text(left + 8 * scale, 36, "optimizer state", colour="faint")
    c.text(left, 262, "bytes a parameter, float32, without activations", colour="faint", size=12)
    return c


def training_step(theme: str) -> Canvas:
    """Memory in the course of one step of a net of equal layers: AdamW, cs_adam, cs_adam with steps in backward."""
    c = Canvas(760, 360, "Memory during one training step", theme)
    layers, activation, each = 12, 0.7, 4 / 12
    forward = [activation * n for n in range(layers + 1)]
    curves: dict[str, tuple[float, bool, str]] = {
        "AdamW": (8.0, False, "b"),
        "cs_adam": (1.25, False, "a"),
        "cs_adam in backward": (1.25, True, "c"),
    }
    left, bottom, wide, tall = 70, 310, 500, 12.5
    for name, (state, within, colour) in curves.items():
        levels = [4 + state + level for level in forward]
        for done in range(1, layers + 1):
            gradients = each if within else each * done
            levels.append(4 + state + activation * (layers - done) + gradients)
        levels += [4 + state + (0 if within else 4)] * 4 + [4 + state]
        step = wide / (len(levels) - 1)
        points = [(left + step * n, bottom - tall * level) for n, level in enumerate(levels)]
        c.path(points, colour)
        y = {"AdamW": 90, "cs_adam": 160, "cs_adam in backward": 200}[name]
        c.box(left + wide + 10, y - 10, 10, 10, colour)
        c.text(left + wide + 26, y, name, size=12)
    part = wide / (2 * layers + 5)
    for at, words in ((0, "forward"), (layers, "backward"), (2 * layers, "step")):
        x = left + part * at
        c.path([(x, 30), (x, bottom)], "line")
        c.text(x + 6, 26, words, colour="faint")
    c.path([(left, 30), (left, bottom), (left + wide, bottom)], "faint")
    for level in (0, 5, 10, 15, 20):
        c.text(left - 8, bottom - tall * level + 5, str(level), "end", "faint", 12)
    c.text(
        left,
        336,
        "bytes a parameter of a net of 12 equal layers whose activations take 8.4 bytes a parameter;",
        size=12,
    )
    c.text(left, 352, "drawn from the formulas of the memory guide, not measured", colour="faint", size=12)
    return c


def count_min(theme: str) -> Canvas:
    """Rows that share a bucket share its second moments."""
    c = Canvas(760, 330, "Rows of the matrix of squared gradients fall into the buckets of a sketch", theme)
    colours, cell = ["a", "b", "c"], 22
    c.text(60, 24, "squared gradients: 12 rows")
    for row in range(12):
        c.text(50, 51 + cell * row, f"row {row}", "end", "faint", 12)
        for column in range(8):
            c.box(
                60 + cell * column,
                36 + cell * row,
                cell,
                cell,
                colours[row % 3],
                0.35 + 0.04 * ((row * 5 + column * 3) % 12),
            )
    c.arrow(250, 168, 340, 168)
    c.text(295, 158, "row mod 3", "middle", "faint", 12)
    c.text(360, 110, "sketch: 3 buckets")
    for bucket in range(3):
        for column in range(8):
            c.box(360 + cell * column, 136 + cell * bucket, cell, cell, colours[bucket], 0.7)
        rows = ", ".join(str(row) for row in range(bucket, 12, 3))
        c.text(360 + cell * 8 + 10, 152 + cell * bucket, f"mean of rows {rows}", size=12)
    c.text(360, 236, "v of row 4 is bucket 1, and so is v of rows 1, 7 and 10.", size=12)
    c.text(360, 256, "compression = 3 / 12; the default is 0.05", colour="faint", size=12)
    return c


def cover(theme: str) -> Canvas:
    """SM3's maxima of rows and columns, and the bound that they give."""
    values = [[9, 1, 4, 2], [2, 1, 3, 1], [5, 2, 8, 1]]
    c = Canvas(760, 250, "SM3 keeps one maximum for each row and each column", theme)
    cell = 40
    rows = [max(row) for row in values]
    columns = [max(column) for column in zip(*values, strict=True)]

    def grid(left: int, numbers: list[list[int]], exact: bool) -> None:
        for r, row in enumerate(numbers):
            for k, value in enumerate(row):
                loose = value != values[r][k]
                c.box(
                    left + cell * k,
                    60 + cell * r,
                    cell,
                    cell,
                    "b" if loose else "a",
                    0.25 if exact or not loose else 0.45,
                )
                c.text(left + cell * k + cell / 2, 85 + cell * r, str(value), "middle")

    c.text(40, 40, "sums of g²: not kept")
    grid(40, values, True)
    c.arrow(215, 120, 265, 120)
    c.text(290, 40, "covers: kept, 3 + 4 numbers")
    for r, value in enumerate(rows):
        c.box(290, 70 + cell * r, cell, cell, "c", 0.5)
        c.text(310, 95 + cell * r, str(value), "middle")
    for k, value in enumerate(columns):
        c.box(350 + cell * k, 110, cell, cell, "d", 0.5)
        c.text(370 + cell * k, 135, str(value), "middle")
    c.text(310, 212, "rows", "middle", "faint", 12)
    c.text(430, 172, "columns", "middle", "faint", 12)
    c.arrow(525, 120, 565, 120)
    c.text(580, 40, "min(row, column)")
    grid(580, [[min(a, b) for b in columns] for a in rows], False)
    c.text(
        40, 236, "An estimate is never below the true value. Orange cells are above it: their step is smaller.", size=12
    )
    return c


def covariance(theme: str) -> Canvas:
    """Sketchy keeps a few directions of the covariance of each axis."""
    c = Canvas(760, 270, "A sketch of a covariance: k directions, their sizes, and one number for the rest", theme)
    c.text(40, 36, "update: m x n")
    c.box(40, 50, 150, 110, "a", 0.35)
    c.text(115, 110, "U", "middle")
    c.arrow(205, 105, 255, 105)
    c.text(270, 36, "U Uᵀ: m x m")
    c.box(270, 50, 110, 110, "faint", 0.25)
    c.text(325, 110, "L", "middle")
    c.text(270, 180, "not kept", colour="faint", size=12)
    c.text(405, 110, "≈", "middle", size=22)
    c.text(430, 36, "sketch: k directions")
    c.box(430, 50, 30, 110, "c", 0.6)
    c.text(445, 110, "V", "middle")
    c.box(475, 50, 30, 30, "d", 0.6)
    c.text(490, 71, "λ", "middle")
    c.box(520, 50, 110, 30, "c", 0.6)
    c.text(575, 71, "Vᵀ", "middle")
    c.text(650, 71, "+")
    c.box(672, 50, 30, 30, "b", 0.6)
    c.text(687, 71, "t", "middle")
    c.text(520, 110, "V: m x k orthonormal directions", size=12)
    c.text(520, 130, "λ: their k eigenvalues", size=12)
    c.text(520, 150, "t: one number for all the rest", size=12)
    c.text(
        40,
        220,
        "The second axis has a sketch of Uᵀ U in the same form. Kept are k (m + n) numbers in place of m² + n²,",
        size=12,
    )
    c.text(40, 240, "and as much again for what has gathered since the last decomposition.", size=12)
    return c


def error_memory(theme: str) -> Canvas:
    """mem-SGD sends the largest entries and keeps the rest."""
    c = Canvas(760, 300, "mem-SGD sends the largest entries of memory plus gradient and keeps the rest", theme)
    draw = random.Random(3)
    old = [draw.uniform(-0.5, 0.5) for _ in range(16)]
    gradient = [draw.uniform(-1, 1) for _ in range(16)]
    both = [a + b for a, b in zip(old, gradient, strict=True)]
    largest = sorted(range(16), key=lambda n: -abs(both[n]))[:3]

    def bars(left: float, top: float, numbers: list[float], title: str, colour: str) -> None:
        c.text(left, top - 42, title)
        c.path([(left, top), (left + 16 * 12, top)], "line")
        for n, value in enumerate(numbers):
            height = abs(value) * 24
            c.box(
                left + 12 * n,
                top - height if value > 0 else top,
                9,
                height,
                "b" if colour == "mixed" and n in largest else ("a" if colour == "mixed" else colour),
            )

    bars(30, 80, old, "memory", "faint")
    bars(30, 220, gradient, "gradient", "c")
    c.text(126, 140, "+", "middle", size=22)
    c.arrow(235, 140, 275, 140)
    bars(285, 150, both, "memory + gradient", "mixed")
    c.arrow(490, 100, 540, 100)
    c.arrow(490, 210, 540, 210)
    bars(550, 90, [v if n in largest else 0 for n, v in enumerate(both)], "sent: 3 of 16 entries", "b")
    bars(550, 220, [0 if n in largest else v for n, v in enumerate(both)], "memory of the next step", "a")
    c.text(
        30,
        290,
        "Nothing is lost: an entry that is not sent waits in the memory and is added to the next gradient.",
        size=12,
    )
    return c


PICTURES: dict[str, Callable[[str], Canvas]] = {
    "memory": memory,
    "training-step": training_step,
    "count-min": count_min,
    "cover": cover,
    "covariance": covariance,
    "error-memory": error_memory,
}


def draw(name: str, theme: str) -> str:
    """The text of one SVG file."""
    return PICTURES[name](theme).svg()


def main() -> None:
    """Write all of them."""
    for name in PICTURES:
        for theme in THEMES:
            (IMAGES / f"{name}-{theme}.svg").write_text(draw(name, theme), encoding="utf-8")


if __name__ == "__main__":
    main()

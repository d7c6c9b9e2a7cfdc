"""The pictures and the table of docs/peers.md, from the runs of quality_run.py that are on file.

    python benchmarks/quality_pareto.py

It writes docs/images/pareto-*.svg (loss against bytes of state), docs/images/seconds-*.svg (loss against seconds of
a core) and the parts of docs/peers.md between its marks. The same files give the same bytes every time.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quality import curves, drawing, records, tables
from quality.records import Row
from quality.summary import TITLES, Figure, figures, front, machine
from quality.tables import FINE_TUNE, Kind, named, settings, shown, timed

ROOT = Path(__file__).parents[1]
PAGE, IMAGES = ROOT / "docs" / "peers.md", ROOT / "docs" / "images"
#: The loss above AdamW's that a panel still shows.
ABOVE = 0.3
#: The loss above AdamW's last one at which curves come into sight.
ABOVE_LAST = 0.7
#: Half of the least range of a panel, so that noise does not look large.
LEAST = 0.05


def pareto(rows: list[Row], theme: str) -> Any:
    """A panel for each setting: ours, peers and the front. The first is large, for it has the most marks."""
    found = figures(rows)
    kinds = settings(found)
    lines = (len(kinds) + 1) // 3
    canvas = drawing.pictures().Canvas(1000, 500 + 330 * lines, "Loss against bytes of optimizer state", theme)
    for number, kind in enumerate(kinds):
        points = [figure for (task, steps, _), figure in found.items() if (task, steps) == kind]
        place = number - 1
        box = (60, 40, 910, 370) if number == 0 else (60 + 325 * (place % 3), 510 + 330 * (place // 3), 260, 230)
        _panel(canvas, box, kind, points)
    y = 478 + 330 * lines
    for x, sides, colour, words in ((60, 4, "a", "ours"), (140, 12, "faint", "peers")):
        drawing.Panel(canvas, (x, y, 10, 10), (0, 1), (0, 1)).mark(0.5, 0.5, colour, sides)
        canvas.text(x + 18, y + 9, words, size=12)
    canvas.path([(230, y + 5), (260, y + 5)], "b")
    canvas.text(268, y + 9, "nothing is better with as little state", size=12)
    return canvas


def _panel(canvas: Any, box: drawing.Box, kind: Kind, points: list[Figure]) -> None:
    accuracy = kind[0] == FINE_TUNE
    values = {figure.optimizer: shown(figure) for figure in points}
    reference = values.get("adamw", min(values.values()))
    if accuracy:
        inside = [f for f in points if values[f.optimizer] > reference - 10]
    else:
        inside = [f for f in points if values[f.optimizer] < reference + ABOVE]
    factor = 100 if accuracy else 1
    reach = [values[f.optimizer] + sign * factor * (f.spread or 0) for f in inside for sign in (-1, 1)]
    middle, half = (max(reach) + min(reach)) / 2, max(0.58 * (max(reach) - min(reach)), factor * LEAST)
    low, high = middle - half, middle + half
    panel = drawing.Panel(canvas, box, (0.01, 40.0), (low, high), log=True)
    label = "test accuracy, %" if accuracy else "evaluation loss"
    panel.axes(named(kind), "state, bytes a parameter", label, (0.01, 0.1, 1, 10), drawing.ticks(low, high, 5))
    steps: list[drawing.Point] = []
    for figure in front(inside):
        if steps:
            steps.append((figure.bytes_per_param, steps[-1][1]))
        steps.append((figure.bytes_per_param, values[figure.optimizer]))
    panel.line([*steps, (40.0, steps[-1][1])], "b")
    for figure in inside:
        spread = factor * figure.spread if figure.spread else None
        y = values[figure.optimizer]
        panel.mark(figure.bytes_per_param, y, "a" if figure.ours else "faint", 4 if figure.ours else 12, spread)
    for figure in sorted(inside, key=lambda f: (not f.ours, f.bytes_per_param)):
        colour = "a" if figure.ours else "ink"
        panel.label(figure.bytes_per_param, values[figure.optimizer], figure.title, colour)
    outside = [f"{f.title} {values[f.optimizer]:.2f}" for f in points if f not in inside]
    if outside:
        where = "below" if accuracy else "above"
        words = f"{where} the panel: {', '.join(sorted(outside))}"
        canvas.text(box[0], box[1] + box[3] + 50, drawing.escaped(words), colour="faint", size=drawing.SMALL)


def seconds(rows: list[Row], theme: str) -> Any:
    """A panel for each number of steps, all of one machine."""
    kinds = timed(rows)
    canvas = drawing.pictures().Canvas(1000, 420, "Loss against seconds of a core", theme)
    for number, ((task, steps, hardware), of) in enumerate(kinds[:2]):
        points = [point for curve in of.values() for point in curve]
        last = of[curves.REFERENCE][-1][2]
        low = min(value for _, _, value in points)
        high = min(max(value for _, _, value in points), last + ABOVE_LAST)
        low, high = low - 0.08 * (high - low), high + 0.04 * (high - low)
        right = 1.02 * max(second for _, second, _ in points)
        panel = drawing.Panel(
            canvas, (60 + 500 * number, 40, 910 if len(kinds) == 1 else 420, 310), (0.0, right), (low, high)
        )
        title = f"{named((task, int(steps)))}, {machine(hardware)}, one thread"
        panel.axes(title, "seconds of a core", "loss", drawing.ticks(0, right), drawing.ticks(low, high))
        panel.line([(0.0, last), (right, last)], "line")
        for colour, (name, curve) in zip("bacde" * 3, of.items(), strict=False):
            kept = [(second, value) for _, second, value in curve if value <= high]
            panel.line(kept, colour)
            panel.mark(*kept[-1], colour, 12)
            panel.label(*kept[-1], TITLES[name], colour)
    words = "The horizontal line is AdamW's last loss. Evaluation takes no part in the seconds."
    canvas.text(60, 408, words, "start", "faint", 12)
    return canvas


def parts() -> dict[str, str]:
    """The parts of the page that are made of the files."""
    return {
        "results": tables.table(records.read(records.RUNS), records.read(records.SKIPPED)),
        "settings": tables.peer_settings(),
        "seconds": tables.seconds_lines(records.read(records.CURVES)),
    }


def filled(page: str) -> str:
    """The page with its parts made anew."""
    for name, text in parts().items():
        mark = re.compile(rf"(<!-- {name}: .*? -->\n).*?(\n?<!-- end of {name} -->)", re.DOTALL)
        if not mark.search(page):
            raise SystemExit(f"docs/peers.md has no mark for its part {name!r}")
        page = mark.sub(lambda match: f"{match[1]}\n{text}\n<!-- end of {name} -->", page)  # noqa: B023 - used at once
    return page


def images() -> dict[str, str]:
    """File name -> the text of the SVG file."""
    drawn: dict[str, tuple[Callable[[list[Row], str], Any], Path]] = {
        "pareto": (pareto, records.RUNS),
        "seconds": (seconds, records.CURVES),
    }
    return {
        f"{name}-{theme}.svg": draw(records.read(path), theme).svg()
        for name, (draw, path) in drawn.items()
        for theme in drawing.pictures().THEMES
    }


def main() -> None:
    """Write all of them."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, text in images().items():
        (IMAGES / name).write_text(text, encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

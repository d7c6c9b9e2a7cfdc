"""The pictures of the pages are what their script draws, with the figures of docs/benchmarks.md."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "tools" / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.mark.parametrize("theme", pictures.THEMES)
@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_the_script_draws(name, theme):
    drawn = pictures.draw(name, theme)
    assert (ROOT / "docs" / "images" / f"{name}-{theme}.svg").read_text(encoding="utf-8") == drawn, (
        "python docs/tools/pictures.py draws it anew"
    )
    drawing = ElementTree.fromstring(drawn)
    width, height = map(float, drawing.get("viewBox").split()[2:])
    for box in drawing.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and 0 <= y and x + w <= width and y + h <= height


def test_the_figures_are_those_of_the_benchmarks():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").replace("**", "")
    for name, state in pictures.STATE.items():
        row = re.search(rf"^\| {re.escape(name)}(?: \([^|]*\))? \| ([\d.]+) \|", text, re.MULTILINE)
        assert row is not None and float(row[1]) == state, name


def test_every_picture_is_on_a_page_in_both_forms():
    texts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for name in pictures.PICTURES:
        for theme in pictures.THEMES:
            assert f"images/{name}-{theme}.svg#only-{theme}" in texts

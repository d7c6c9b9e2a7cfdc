"""The pictures and tables of docs/peers.md are what benchmarks/quality_pareto.py makes of the committed files."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("tqdm")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import quality_pareto  # noqa: E402
from quality import curves, summary, tables  # noqa: E402

ANEW = "python benchmarks/quality_pareto.py makes it anew"
IMAGES = quality_pareto.images()


def row(optimizer, value, size, seed=1, lr="0.001", steps="160", task="lm", hardware="A"):
    return {
        "task": task, "steps": steps, "optimizer": optimizer, "lr": lr, "seed": str(seed), "value": str(value),
        "bytes_per_param": str(size), "hardware": hardware,
    }  # fmt: skip


def test_the_page_is_what_the_script_makes_of_the_committed_files():
    page = quality_pareto.PAGE.read_text(encoding="utf-8")
    assert quality_pareto.filled(page) == page, ANEW


@pytest.mark.parametrize("name", IMAGES)
def test_a_picture_is_what_the_script_draws(name):
    drawn = IMAGES[name]
    assert (quality_pareto.IMAGES / name).read_text(encoding="utf-8") == drawn, ANEW
    drawing = ElementTree.fromstring(drawn)
    width, height = map(float, drawing.get("viewBox").split()[2:])
    for text in drawing.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.get("x")) <= width and 0 <= float(text.get("y")) <= height, text.text


def test_the_rate_with_the_most_seeds_is_taken_and_a_search_is_said():
    rows = [row("adamw", 5.0, 8, seed) for seed in (1, 2, 3)]
    rows += [row("adamw", 5.2, 8, lr="0.002"), row("adamw", 5.3, 8, lr="0.0005")]
    figure = summary.figures(rows)["lm", 160, "adamw"]
    assert figure.lr == 0.001 and len(figure.values) == 3 and figure.inside
    lower = summary.figures([*rows, row("adamw", 4.9, 8, lr="0.002"), row("adamw", 4.9, 8, 1, "0.004")])
    assert not lower["lm", 160, "adamw"].inside
    assert not summary.figures(rows[:4])["lm", 160, "adamw"].inside
    assert summary.figures([row("adamw", "inf", 8), row("sketchy:rank=64", 5.0, 2)]) == {}


def test_the_front_has_what_no_other_beats_with_as_little_state():
    rows = [
        row("adamw", 5.9, 8),
        row("cs_adam", 5.7, 1),
        row("muon", 5.6, 7),
        row("sm3", 5.8, 0.1),
        row("lion", 5.7, 4),
    ]
    found = summary.front(summary.figures(rows).values())
    assert [figure.optimizer for figure in found] == ["sm3", "cs_adam", "muon"]


def test_a_table_has_the_hardware_of_every_row_and_why_a_peer_was_left_out():
    rows = [row("adamw", 5.9, 8), row("adamw", 5.8, 8, 2, hardware="B"), row("sketchy", 0.2, 1, task="fine_tune")]
    text = tables.table(rows, [{"optimizer": "kron", "reason": "no memory"}, {"optimizer": "adamw", "reason": "old"}])
    lines = text.splitlines()
    assert lines[2].startswith("| AdamW | 8 | 0.001 (search not ended) | 5.850") and lines[2].endswith("| A; B |")
    assert lines[3].startswith("| **sketchy** | 1 |") and "80.0 (1 seed), at 0.001 | A |" in lines[3]
    assert "PSGD Kron was left out: no memory." in text and "old" not in text


def test_seconds_to_a_level_lie_on_the_line_between_two_points():
    curve = [(10, 1.0, 8.0), (20, 2.0, 6.0), (30, 3.0, 7.0)]
    assert curves.seconds_to(curve, 7.0) == 1.5
    assert curves.seconds_to(curve, 8.5) == 1.0
    assert curves.seconds_to(curve, 5.9) is None


def test_seconds_of_two_machines_are_never_beside_each_other():
    def point(optimizer, hardware):
        return {
            **row(optimizer, 5.0, 8, hardware=hardware),
            "step": "10",
            "train_seconds": "1.0",
            "core_seconds": "0.9",
            "load": "0.1",
        }

    rows = [point("adamw", "A"), point("adamw", "B"), point("muon", "B"), point("sketchy", "A"), point("sm3", "B")]
    ((setting, of),) = tables.timed(rows)
    assert setting[2] == "B" and set(of) == {"adamw", "muon", "sm3"}
    assert tables.timed([point("muon", "A")]) == []

#!/usr/bin/env python3
"""Table and plot of language-model quality: the loss of each optimizer at its own best rate against bytes of state.

It reads the JSON lines of the peers' harness that docs/benchmarks.md describes (one line a run, `kind` "best" for a
summary over seeds), or the CSV that was made from them.

    python benchmarks/quality_plot.py runs.jsonl more.jsonl      # writes benchmarks/results/quality_lm.csv and .png
    python benchmarks/quality_plot.py                            # draws the committed CSV again
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "quality_lm.csv"
FIELDS = ("optimizer", "steps", "lr", "lr_interior", "seeds", "eval_mean", "eval_sd", "bytes_per_param")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="JSON lines of the harness")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    args = parser.parse_args()
    if args.runs:
        rows = sorted(summaries(args.runs), key=lambda row: (int(row["steps"]), float(row["eval_mean"])))
        with args.out.open("w", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    with args.out.open(newline="") as f:
        rows = list(csv.DictReader(f))
    Console().print(table(rows))
    plot(rows, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


def summaries(paths: list[Path]) -> list[dict[str, object]]:
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            run = json.loads(line)
            if run["kind"] == "best":
                name = run["optimizer"].removeprefix("sketch_plugins:")
                rows.append({**{key: run.get(key) for key in FIELDS}, "optimizer": name})
    return rows


def table(rows: list[dict[str, str]]) -> Table:
    out = Table(title="evaluation loss, each optimizer at its own best learning rate")
    for heading in ("optimizer", "steps", "best rate", "loss", "seeds", "state B/param"):
        out.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in rows:
        deviation = f" +- {float(row['eval_sd']):.3f}" if row["eval_sd"] else ""
        loss = f"{float(row['eval_mean']):.3f}{deviation}"
        out.add_row(row["optimizer"], row["steps"], row["lr"], loss, row["seeds"], row["bytes_per_param"])
    return out


def plot(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = [steps for steps in ("160", "500") if any(row["steps"] == steps for row in rows)]
    figure, panels = pyplot.subplots(1, len(lengths), figsize=(6.5 * len(lengths), 5), squeeze=False)
    for axes, steps in zip(panels[0], lengths, strict=True):
        # The ways to gather statistics have almost the same points, so only the table has them.
        for row in (row for row in rows if row["steps"] == steps and "statistics" not in row["optimizer"]):
            x, y = float(row["bytes_per_param"]), float(row["eval_mean"])
            ours = row["optimizer"][0].isupper()
            color = "tab:blue" if ours else "tab:gray"
            axes.errorbar(x, y, yerr=float(row["eval_sd"] or 0), fmt="o", color=color, capsize=3)
            label = row["optimizer"].replace('"', "").replace("{", " ").replace("}", "")
            axes.annotate(label, (x, y), fontsize=7, xytext=(5, 3), textcoords="offset points")
        axes.set(xscale="log", xlabel="state, bytes a parameter", ylabel="evaluation loss", title=f"{steps} steps")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""The tables and pictures of `_compare`, from its results."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from _common import MIB, _format
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

#: Ink, lines, weights, gradients and activations, the room for a larger batch; then a colour for each optimizer.
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#24292f", "line": "#d0d7de", "weights": "#8c959f", "rest": "#d0d7de",
              "runs": ["#f08c00", "#4c6ef5", "#1098ad", "#2f9e44", "#ae3ec9", "#e03131", "#846358"]},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "line": "#3d444d", "weights": "#8b949e", "rest": "#484f58",
             "runs": ["#ffa94d", "#748ffc", "#3bc9db", "#69db7c", "#da77f2", "#ff8787", "#bfa094"]},
}  # fmt: skip


def baseline(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run that the others are compared with: AdamW, or the first run if AdamW is not among them."""
    return next((r for r in results if r["label"] == "AdamW"), results[0])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def print_tables(summary: dict[str, Any]) -> None:
    """Print the tables of figures to standard output."""
    console = Console()
    # A log file has no width of its own, and a table must not be wrapped in it.
    console = Console(width=max(console.width, 120) if not console.is_terminal else None)
    console.print(same_batch(summary, console.width))
    if any(r["largest"] for r in summary["runs"]):
        console.print(largest_batch(summary, console.width))


def _table(title: str, caption: str, columns: list[str], width: int) -> Table:
    """An empty table. In a narrow terminal the names of optimizers are wrapped, but no figures."""
    narrow = width < 100
    table = Table(
        title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, padding=0 if narrow else (0, 1)
    )
    table.add_column("optimizer", vertical="bottom")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def same_batch(summary: dict[str, Any], width: int) -> Table:
    """Every optimizer with the same batch: losses, memory, times."""
    results, about = summary["runs"], summary["about"]
    base = baseline(results)
    with_accuracy = any(r["eval_accuracy"] is not None for r in results)
    columns = ["rate", "eval\nloss", f"vs\n{base['label']}"] + (["accuracy"] if with_accuracy else [])
    columns += ["state\nMiB", "B/param", "peak\nMiB", "optimizer's\nstep, ms", "whole\nstep, ms"]
    table = _table(
        f"{about['model']}, {base['parameters'] / 1e6:.1f} M parameters, {base['steps']} steps of "
        f"{base['batch']} x {summary['options']['seq_len']} tokens, {base['device']}",
        f"Evaluated on {about['eval']}. State: the optimizer's tensors. Peak: what torch allocates at most, for "
        "weights, state, gradients, activations and temporaries. Times: medians.",
        columns,
        width,
    )
    for r in results:
        cells = [r["label"], f"{r['learning_rate']:.2g}", _loss(r), _relative(r, base)]
        cells += [_format(r["eval_accuracy"], 100, ".1f", "%")] if with_accuracy else []
        cells += [
            _format(r["state_bytes"], 1 / MIB, ",.2f", ""),
            f"{r['bytes_per_param']:.3f}",
            _format(r["peak_bytes"], 1 / MIB, ",.1f", ""),
            _format(r["optimizer_ms"], 1, ",.1f", ""),
            _format(r["step_ms"], 1, ",.0f", ""),
        ]
        table.add_row(*cells)
    return table


def largest_batch(summary: dict[str, Any], width: int) -> Table:
    """Every optimizer with the largest batch that fits into the memory of the baseline."""
    results = summary["runs"]
    base = baseline(results)
    name, reference = base["label"], base["largest"] or base
    tokens = base["steps"] * base["batch"] * summary["options"]["seq_len"]
    table = _table(
        f"The largest batch in {name}'s memory ({summary['budget_bytes'] / MIB:,.1f} MiB), as many tokens: {tokens:,}",
        f"{name}'s peak: with the batch of the row. A larger batch takes fewer steps for as many tokens; its learning "
        "rate grows with the square root of the batch.",
        ["largest\nbatch", f"x\n{name}'s", "peak\nMiB", f"{name}'s\npeak, MiB", "steps", "rate", "eval\nloss",
         f"vs\n{name}", "tokens/s"],
        width,
    )  # fmt: skip
    for r in results:
        large = r["largest"]
        if large is None:
            table.add_row(r["label"], "none")
            continue
        table.add_row(
            r["label"],
            str(large["batch"]),
            f"{large['batch'] / reference['batch']:.2f}",
            _format(large["peak_bytes"], 1 / MIB, ",.1f", ""),
            _format(large["baseline_peak_bytes"], 1 / MIB, ",.1f", ""),
            str(large["steps"]),
            f"{large['learning_rate']:.2g}",
            _loss(large),
            _relative(large, reference),
            _format(large["tokens_per_second"], 1, ",.0f", ""),
        )
    return table


def _loss(run: dict[str, Any]) -> str:
    return "diverged" if run["eval_loss"] is None else f"{run['eval_loss']:.4f}"


def _relative(run: dict[str, Any], base: dict[str, Any]) -> str:
    loss, reference = run["eval_loss"], base["eval_loss"]
    return "" if loss is None or not reference else f"{100 * (loss / reference - 1):+.2f}%"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def plots(summary: dict[str, Any], path: Path) -> list[Path]:
    """Losses on the left, memory on the right: ``path-light.png`` and ``path-dark.png``."""
    files = []
    for theme in THEMES:
        files.append(path.with_name(f"{path.name}-{theme}.png"))
        _plot(summary, theme, files[-1])
    return files


def _plot(summary: dict[str, Any], theme: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours: dict[str, Any] = THEMES[theme]
    style = {name: colours["ink"] for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")}
    style |= {name: colours["paper"] for name in ("figure.facecolor", "axes.facecolor")}
    style |= {name: colours["line"] for name in ("axes.edgecolor", "grid.color")}
    results = summary["runs"]
    runs = [colours["runs"][i % len(colours["runs"])] for i in range(len(results))]
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), width_ratios=(1, 1), layout="constrained")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        _losses(left, summary, runs)
        _memory(right, summary, runs, colours)
        figure.suptitle(f"{summary['about']['model']} on {summary['about']['source']}", fontsize=10)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _losses(axes: Any, summary: dict[str, Any], runs: list[str]) -> None:
    """Losses against tokens: with the batch of all, and dashed with the largest one."""
    results = summary["runs"]
    for r, colour in zip(results, runs, strict=True):
        parts = [(r, "-")]
        if r["largest"] and r["largest"]["batch"] != r["batch"]:
            parts.append((r["largest"], "--"))
        for part, line in parts:
            tokens = part["batch"] * summary["options"]["seq_len"]
            points = [(step * tokens, loss) for step, loss in part["eval_curve"] if loss is not None]
            label = f"{r['label']}, batch {part['batch']}"
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, line, color=colour, marker="o", markersize=4, label=label)
    axes.set(xlabel="tokens", title="Evaluation loss")
    axes.grid(alpha=0.5)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3)


def _memory(axes: Any, summary: dict[str, Any], runs: list[str], colours: dict[str, Any]) -> None:
    """The parts of the peak, and the room that a larger batch takes, up to the memory of the baseline."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    results = summary["runs"]
    base, limit = baseline(results), summary["budget_bytes"] / MIB
    for i, (r, colour) in enumerate(zip(results, runs, strict=True)):
        weights, state, peak = ((r[f"{part}_bytes"] or 0) / MIB for part in ("weight", "state", "peak"))
        rest = max(0.0, peak - weights - state)
        axes.barh(i, weights, color=colours["weights"])
        axes.barh(i, state, left=weights, color=colour)
        axes.barh(i, rest, left=weights + state, color=colours["rest"])
        large = r["largest"]
        if large and large["batch"] > r["batch"]:
            more = large["peak_bytes"] / MIB - peak
            axes.barh(i, more, left=peak, color="none", edgecolor=colours["weights"], hatch="///", linewidth=0.5)
        if large:
            words = f"batch {large['batch']} ({large['batch'] / r['batch']:.2g}x)"
            axes.text(max(limit, peak), i, f"  {words}", va="center", fontsize=9)
    axes.axvline(limit, color=colours["ink"], linestyle=":", linewidth=1)
    axes.set_yticks(range(len(results)), [textwrap.fill(r["label"], 14) for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    title = f"Memory with a batch of {base['batch']}; hatched: with the largest that fits"
    axes.set(xlabel="MiB that torch allocates at most", title=title)
    # The state has the colour of its run, so the legend shows several.
    handles = [Patch(color=colours["weights"]), tuple(Patch(color=c) for c in runs[:3]), Patch(color=colours["rest"])]
    names = ["weights", "optimizer state", "gradients, activations, temporaries"]
    handles.append(Line2D([], [], color=colours["ink"], linestyle=":"))
    names.append(f"{base['label']}'s memory")
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11), "ncols": 4}
    axes.legend(handles, names, handler_map={tuple: HandlerTuple(None, pad=0)}, frameon=False, fontsize=8, **options)

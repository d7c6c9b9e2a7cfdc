"""The tables of docs/peers.md, in Markdown."""

from __future__ import annotations

from . import curves, peers
from .records import Row
from .summary import TITLES, Figure, figures, machine, skipped

FINE_TUNE = "fine_tune"
#: Steps of the language model that have a panel and a column.
LENGTHS = (160, 500, 1500, 5000)
#: (task, steps).
Kind = tuple[str, int]
Figures = dict[tuple[str, int, str], Figure]


def settings(found: Figures) -> list[Kind]:
    """(task, steps) that have results, in the order of the panels."""
    there = {(task, steps) for task, steps, _ in found}
    return [("lm", steps) for steps in LENGTHS if ("lm", steps) in there] + sorted(
        k for k in there if k[0] == FINE_TUNE
    )


def named(kind: Kind) -> str:
    """A setting in words."""
    task, steps = kind
    return f"fine-tune, {steps} steps" if task == FINE_TUNE else f"{steps:,} steps"


def shown(figure: Figure) -> float:
    """The value in a panel: the loss, or the accuracy in per cent."""
    return 100 * (1 - figure.mean) if figure.task == FINE_TUNE else figure.mean


def timed(rows: list[Row]) -> list[tuple[curves.Setting, dict[str, curves.Curve]]]:
    """The settings of one machine, that with the most curves: seconds of two machines are not to be compared."""
    there = curves.curves(row for row in rows if row["optimizer"] in TITLES)
    there = {setting: of for setting, of in there.items() if curves.REFERENCE in of}
    count: dict[str, int] = {}
    for setting, of in there.items():
        count[setting[2]] = count.get(setting[2], 0) + len(of)
    best = max(sorted(count), key=lambda name: count[name], default=None)
    kept = [item for item in there.items() if item[0][2] == best]
    return sorted(kept, key=lambda item: (item[0][0], int(item[0][1])))


def number(value: float, digits: int = 3) -> str:
    """With so many digits that count."""
    return f"{value:.{digits}g}" if value < 10 else f"{value:.1f}"


def cell(figure: Figure | None, lr: float | None) -> str:
    """Mean, standard deviation and number of seeds; the rate, if it is not the one of the row."""
    if figure is None:
        return ""
    value, factor = shown(figure), 100 if figure.task == FINE_TUNE else 1
    digits = 1 if figure.task == FINE_TUNE else 3
    text = f"{value:.{digits}f}"
    text += f" +- {factor * figure.spread:.{digits}f}" if figure.spread is not None else " (1 seed)"
    if len(figure.values) == 2:
        text += " (2 seeds)"
    return text + (f", at {figure.lr:g}" if lr is not None and figure.lr != lr else "")


def table(rows: list[Row], left_out: list[Row]) -> str:
    """Of all optimizers: state, rate, a column for each setting, hardware; then the peers without a result, and why."""
    found = figures(rows)
    kinds = settings(found)
    by_name = {
        name: {kind: found[(*kind, name)] for kind in kinds if (*kind, name) in found}
        for name in {name for _, _, name in found}
    }
    heads = ["optimizer", "state, B/param", "rate", *[_head(kind) for kind in kinds], "hardware"]
    lines = [heads, ["---"] * len(heads)]
    order = sorted(by_name, key=lambda name: [f.mean if f else 99 for f in map(by_name[name].get, kinds)])
    for name in order:
        of = by_name[name]
        main = next((of[kind] for kind in kinds if kind in of and kind[0] == "lm"), None)
        title = f"**{TITLES[name]}**" if next(iter(of.values())).ours else TITLES[name]
        rate = "" if main is None else f"{main.lr:g}{_how(main)}"
        hardware = "; ".join(sorted({machine(text) for figure in of.values() for text in figure.hardware}))
        cells = [cell(of.get(kind), main.lr if main is not None and kind[0] == "lm" else -1.0) for kind in kinds]
        lines.append([title, number(next(iter(of.values())).bytes_per_param), rate, *cells, hardware])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    left = skipped(left_out, by_name)
    text += "".join(f"\n{TITLES.get(name, name)} was left out: {reason}.\n" for name, reason in left.items())
    not_yet = [TITLES[name] for name in peers.PEERS if name not in by_name and name not in left]
    if not_yet:
        text += f"\nNot measured yet: {'; '.join(not_yet)}.\n"
    return text


def _how(figure: Figure) -> str:
    if figure.inside:
        return " (searched)"
    return "" if figure.ours else " (search not ended)"


def _head(kind: Kind) -> str:
    return f"accuracy, {named(kind)}" if kind[0] == FINE_TUNE else f"loss, {named(kind)}"


def peer_settings() -> str:
    """A line for each peer: where it comes from, and what is not its default."""
    lines = [["peer", "package", "settings that are not its defaults"], ["---"] * 3]
    for name, peer in peers.PEERS.items():
        lines.append([TITLES[name], ", ".join(peer.needs) or "torch", peer.note])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def seconds_lines(rows: list[Row]) -> str:
    """For the curves of the picture: seconds of a core in all and to AdamW's last loss, and those of the clock."""
    heads = ["steps", "optimizer", "seconds of a core", "last loss", "seconds of a core to AdamW's last loss"]
    heads += ["seconds of the clock", "load", "hardware"]
    lines = [heads, ["---"] * len(heads)]
    for (task, steps, hardware), of in timed(rows):
        for name, total, value, reached in curves.compared(of):
            wanted = task, steps, name, hardware
            own = [row for row in rows if (row["task"], row["steps"], row["optimizer"], row["hardware"]) == wanted]
            loads = [float(row["load"]) for row in own if row["load"]]
            load = " to ".join(dict.fromkeys(f"{end:.1f}" for end in (min(loads), max(loads)))) if loads else ""
            when = "not reached" if reached is None else f"{reached:.1f}"
            clock = max(float(row["train_seconds"]) for row in own)
            lines.append(
                [steps, TITLES[name], f"{total:.1f}", f"{value:.3f}", when, f"{clock:.1f}", load, machine(hardware)]
            )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""Bytes a parameter of a whole training step with weights of 24 and 32 bits, by torch's CPU allocator.

``python benchmarks/weight_bits.py [--width 640 --layers 12 --vocab 4000 --batch 1 --length 16] [--out FILE.csv]``
prints the table of docs/weight_bits.md: weights, state, gradients, activations and temporaries, in the third step.
The batch is small on purpose, because its activations do not depend on the optimizer.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
from pathlib import Path
from typing import Any

from in_backward import EIGHT_BITS, measure
from rich.console import Console
from rich.table import Table

# (name, options, bfloat16 weights)
RUNS: list[tuple[str, dict[str, Any], bool]] = [
    ("AdamW", {}, False),
    ("AdamW", {}, True),
    (EIGHT_BITS, {}, False),
    (EIGHT_BITS, {}, True),
    ("cs_adam", {}, False),
    ("cs_adam", {"stochastic_rounding": True}, True),
    ("cs_adam", {"weight_bits": 24}, True),
    ("cs_adam", {"weight_bits": 32}, True),
    ("cs_adam", {"preset": "lean", "weight_bits": 24}, True),
    ("cs_adam", {"preset": "lean", "weight_bits": 32}, True),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 640), ("layers", 12), ("vocab", 4000), ("batch", 1), ("length", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk-size", type=int, default=1 << 16, help="numbers of a tile of a step (0: the default)")
    parser.add_argument("--out", type=Path, help="a CSV file")
    args = parser.parse_args()
    headings = ["optimizer", "parameters", "weights B/param", "state B/param", "peak B/param", "in backward B/param"]
    table, rows = Table(title=f"A training step: {vars(args)}"), []
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, options, half in RUNS:
        if name == EIGHT_BITS and importlib.util.find_spec("bitsandbytes") is None:
            print(f"{name}: not installed (the extra `peers` has it)")
            continue
        weights, kept, peak, params = measure(name, options, half, False, args)
        given = "".join(f" {key}={value}" for key, value in options.items())
        row = [f"{name}{' bf16' if half else ''}{given}", str(params)]
        row += [f"{n / params:.2f}" for n in (weights, kept, peak)]
        row.append(
            f"{measure(name, options, half, True, args)[2] / params:.2f}" if name not in ("AdamW", EIGHT_BITS) else ""
        )
        rows.append(row)
        table.add_row(*row)
    Console(width=140).print(table)
    if args.out is not None:
        with args.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([headings, *rows])


if __name__ == "__main__":
    main()

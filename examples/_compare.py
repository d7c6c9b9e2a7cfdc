"""Optimizers compared in Hugging Face's Trainer: memory, the largest batch that fits, losses.

An example gives two functions to `main`: `prepare(args, folder)` converts text to tensors on disk, once; `build(args,
folder)` makes the model and the data sets from them, for every training.

Memory is what torch allocates, counted to the byte while Trainer takes two steps. It is the same on every machine, and
contains neither libraries nor Numba's compiler, which take as much for a small model as for a large one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common as common
import _report as report
import torch
from _common import MIB, Experiment, Run, fail, finite, unwrap
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Build = Callable[[argparse.Namespace, Path], Experiment]
#: A budget that is never reached, for the measurement of one batch.
NO_LIMIT = 2**60
#: Budgets are rounded up to a tenth of a MiB, which is what the table shows.
GRAIN = MIB // 10


def add_options(parser: argparse.ArgumentParser, out: str, largest_batch: bool) -> None:
    """Add the options that every example has, and the one for the second part."""
    common.add_options(parser, out)
    parser.add_argument(
        "--largest-batch",
        action=argparse.BooleanOptionalAction,
        default=largest_batch,
        help="find the largest batch that fits into AdamW's memory, and train with it, too (default: %(default)s)",
    )


def main(args: argparse.Namespace, prepare: Callable[[argparse.Namespace, Path], dict[str, Any]], build: Build) -> int:
    """Prepare the data, train with each optimizer, print the tables, write plots and JSON.

    `prepare` returns facts about the data for the tables' captions and the JSON file. The exit code is 1 if a run
    diverged, and 130 after Ctrl-C.
    """
    quiet(args)
    _check_names(args.runs)
    folder = args.out / "work"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    console = Console(highlight=False, markup=False)
    with console.status("preparing the text"):
        about = prepare(args, folder)
    # From here on tokenizers has nothing to do, and would warn of every process that a library starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    say(console, f"text: {about['source']}; prepared in {time.perf_counter() - started:.0f} s")
    try:
        results, budget = compare(args, folder, build, console)
    except KeyboardInterrupt:
        return 130
    summary = {
        "about": about,
        "options": {k: _plain(v) for k, v in vars(args).items() if k != "runs"},
        "versions": _versions(),
        "seconds": time.perf_counter() - started,
        "budget_bytes": budget,
        "runs": results,
    }
    (args.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    pictures = report.plots(summary, args.out / "comparison")
    report.print_tables(summary)
    said = f"{summary['seconds'] / 60:.1f} minutes; pictures: {', '.join(map(str, pictures))}"
    say(console, f"{said}; figures: {args.out / 'results.json'}")
    losses = [part["eval_loss"] for r in results for part in (r, r["largest"] or r)]
    return 1 if None in losses else 0


def quiet(args: argparse.Namespace) -> None:
    """Choose one device and no downloads that nobody asked for; keep libraries from writing between our lines."""
    hub = [name.partition(":")[0] for name in (args.model, args.dataset) if name]
    if all(Path(name).exists() for name in hub):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Trainer would distribute the batch over all devices, but a comparison needs one.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # torch's profiler, which counts the allocator's memory, would print two lines for each batch that is tried.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if not torch.cuda.is_available():
        # accelerate imports DeepSpeed if it is installed, and DeepSpeed warns that it found no GPU, unless it is told.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def say(console: Console, line: str) -> None:
    """Print a line, which a log file of any width keeps whole."""
    console.print(line, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# All runs


def compare(args: argparse.Namespace, folder: Path, build: Build, console: Console) -> tuple[list[dict[str, Any]], int]:
    """The figures of each run, and the budget of memory: the peak of AdamW, or of the first run without AdamW."""
    base = next((run for run in args.runs if run.label == "AdamW"), args.runs[0])
    compile_kernels(args, base, new(args, folder, build), console)
    with console.status(f"counting {base.label}'s memory"):
        ((_, peak),) = count_memory(args, base, new(args, folder, build), args.batch_size).peaks
    if peak is None:
        fail(f"{base.label} runs out of memory with a batch of {args.batch_size}")
    budget = -(-peak // GRAIN) * GRAIN
    said = f"memory: {base.label} takes {peak / MIB:.1f} MiB with a batch of {args.batch_size}"
    say(console, f"{said}, so each may take {budget / MIB:.1f} MiB" if args.largest_batch else said)
    results = []
    for index, run in enumerate(args.runs):
        say(console, f"\n[{index + 1}/{len(args.runs)}] {run.label}, learning rate {run.learning_rate:g}")
        results.append(run_one(args, run, folder, build, budget, console))
    with console.status(f"counting {base.label}'s memory"):
        for large in filter(None, (r["largest"] for r in results)):
            ((_, peak),) = count_memory(args, base, new(args, folder, build), large["batch"]).peaks
            large["baseline_peak_bytes"] = peak
    return results, budget


def run_one(
    args: argparse.Namespace, run: Run, folder: Path, build: Build, budget: int, console: Console
) -> dict[str, Any]:
    """Count memory, train with the batch that all have, find the largest batch, and train with that."""
    experiment = new(args, folder, build)
    weights = sum(p.nbytes for p in experiment.model.parameters())
    compile_kernels(args, run, experiment, console)
    with console.status(f"trying batches in {budget / MIB:.1f} MiB" if args.largest_batch else "counting memory"):
        memory = count_memory(args, run, experiment, args.batch_size, budget if args.largest_batch else None)
    del experiment  # otherwise its weights would be in memory beside those that are trained
    trained = train(args, run, new(args, folder, build), args.batch_size, args.steps, run.learning_rate, console)
    result = {
        "label": run.label,
        **dataclasses.asdict(run),
        **trained,
        "peak_bytes": dict(memory.peaks)[args.batch_size],
        "weight_bytes": weights,
        "largest": None,
    }
    if args.largest_batch and memory.batch is None:
        say(console, f"  no batch fits into {budget / MIB:.1f} MiB")
    elif args.largest_batch:
        batch = memory.batch
        say(console, f"  largest batch in {budget / MIB:.1f} MiB: {batch}")
        if batch != args.batch_size:
            steps = max(1, round(args.steps * args.batch_size / batch))
            rate = run.learning_rate * math.sqrt(batch / args.batch_size)
            trained = train(args, run, new(args, folder, build), batch, steps, rate, console)
        result["largest"] = {**trained, "peak_bytes": dict(memory.peaks)[batch]}
    return result


def new(args: argparse.Namespace, folder: Path, build: Build) -> Experiment:
    """Model and data, the same for every run."""
    from transformers import set_seed

    set_seed(args.seed)
    experiment = build(args, folder)
    limit = getattr(experiment.model.config, "max_position_embeddings", args.seq_len)
    if args.seq_len > limit:
        fail(f"--seq-len {args.seq_len} is more than the {limit} positions of {args.model}")
    return experiment


def trainer_for(args: argparse.Namespace, run: Run, experiment: Experiment, batch: int, steps: int, rate: float) -> Any:
    """The Trainer of a run. This is all that a script needs to use `cs_adam`."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    import sketch_transformers  # noqa: F401  registers "cs_adam" and its family

    trainer = Trainer(
        model=experiment.model,
        args=TrainingArguments(
            output_dir=str(args.out / "trainer"),
            optim=run.optim,
            optim_args=run.optim_args,
            learning_rate=rate,
            weight_decay=args.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            max_steps=steps,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=2 * args.batch_size,
            seed=args.seed,
            # Memory is counted on a CPU and with CUDA.
            use_cpu=args.cpu or not torch.cuda.is_available(),
            eval_strategy="steps",
            eval_steps=-(-steps // 3),  # the third time at the end
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,  # so that a run that diverges shows it
            save_strategy="no",
            report_to="none",
            log_level="warning",  # the table has what our optimizers say about themselves at their first step
            disable_tqdm=True,  # it would print a line for every step into a file
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=experiment.train,
        eval_dataset=experiment.eval,
        data_collator=experiment.collator,
        compute_metrics=experiment.compute_metrics,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if experiment.compute_metrics else None,
    )
    trainer.remove_callback(PrinterCallback)  # it would print every loss
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# One run


def compile_kernels(args: argparse.Namespace, run: Run, experiment: Experiment, console: Console) -> None:
    """Take two steps with gradients of random numbers, so that no measurement contains Numba's or Triton's compiler."""
    from sketch_plugins import registry

    if run.optim not in registry.names():
        return
    trainer = trainer_for(args, run, experiment, args.batch_size, args.steps, run.learning_rate)
    started = time.perf_counter()
    with console.status(f"compiling the kernels of {run.label}"):
        optimizer = trainer.create_optimizer()
        for _ in range(2):
            for parameter in experiment.model.parameters():
                parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            optimizer.zero_grad()
    say(console, f"  kernels are ready after {time.perf_counter() - started:.0f} s")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The result of `count_memory`.

    Attributes:
        peaks: a batch that was tried, and its peak in bytes or None if memory ran out, in the order of the trials.
        batch: the largest batch within the budget; None without a budget, or if no batch fits.
    """

    peaks: list[tuple[int, int | None]]
    batch: int | None


def count_memory(
    args: argparse.Namespace, run: Run, experiment: Experiment, batch: int, budget: int | None = None
) -> Memory:
    """Count the peak of the memory with a batch; with a budget, find the largest batch within it.

    Not counted are the rows of the data sets, which a larger program would leave on disk.
    """
    from sketch_plugins.memory.meter import AllocatorMeter
    from sketch_transformers import ReclaimBatchSize

    trainer = trainer_for(args, run, experiment, batch, args.steps, run.learning_rate)
    on_cpu = trainer.args.device.type == "cpu"
    sets = [data for data in (experiment.train, experiment.eval) if isinstance(data, common.Rows)]
    # By address, because one tensor may be both the inputs and the labels.
    storages = {
        s.data_ptr(): s for data in sets for s in (column.untyped_storage() for column in data.columns.values())
    }
    held = sum(storage.nbytes() for storage in storages.values()) if on_cpu else 0
    search = ReclaimBatchSize(
        budget=NO_LIMIT if budget is None else budget + held,
        init_val=batch,
        max_val=batch if budget is None else 64 * batch,
        meter=AllocatorMeter() if on_cpu else None,
    )
    try:
        search.search(trainer)
    except ValueError:
        # The budget is too small even for a batch of one, which the table says.
        if not search.trials or any(trial.fits for trial in search.trials):
            raise
    peaks = [(trial.batch_size, None if trial.peak is None else trial.peak - held) for trial in search.trials]
    return Memory(peaks, None if budget is None else search.batch_size)


def train(
    args: argparse.Namespace,
    run: Run,
    experiment: Experiment,
    batch: int,
    steps: int,
    rate: float,
    console: Console,
) -> dict[str, Any]:
    """Train and evaluate; returns the measurements."""
    from transformers import TrainerCallback

    from sketch_plugins import state_report

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"))
    # It is gone when training is done, and a file never has it.
    options = {"console": console, "transient": True, "disable": not console.is_terminal}
    bar = Progress(*columns, TimeRemainingColumn(), **options)
    task = bar.add_task(f"  batch {batch}", total=steps, losses="")

    class Meter(TrainerCallback):
        """Records times of the optimizer's own step and of whole training steps, and both loss curves."""

        def __init__(self) -> None:
            self.optimizer_seconds: list[float] = []
            self.step_seconds: list[float] = []
            self.train_curve: list[tuple[int, float]] = []
            self.eval_curve: list[tuple[int, float]] = []
            self.shown: dict[str, str] = {}

        def on_train_begin(self, _args: Any, _state: Any, _control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            optimizer = unwrap(optimizer)
            optimizer.register_step_pre_hook(lambda *_: setattr(self, "optimizer_start", common._now()))
            optimizer.register_step_post_hook(
                lambda *_: self.optimizer_seconds.append(common._now() - self.optimizer_start)
            )

        def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
            self.step_start = common._now()

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            self.step_seconds.append(common._now() - self.step_start)
            bar.advance(task)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.train_curve.append((state.global_step, logs["loss"]))
            self.shown |= {k: f"{v:.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")}
            bar.update(task, losses=", ".join(f"{k} {v}" for k, v in self.shown.items()))

        def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: dict, **kwargs: Any) -> None:
            self.eval_curve.append((state.global_step, metrics["eval_loss"]))
            self.metrics = metrics

    meter = Meter()
    trainer = trainer_for(args, run, experiment, batch, steps, rate)
    trainer.add_callback(meter)
    start = common._now()
    with bar:
        trainer.train()
        if not meter.eval_curve or meter.eval_curve[-1][0] != steps:
            trainer.evaluate()
    seconds = common._now() - start
    loss = finite(meter.metrics["eval_loss"])
    said = "diverged" if loss is None else f"loss {loss:.4f}"
    say(console, f"  batch {batch}, learning rate {rate:.2g}: {steps} steps in {seconds:.0f} s, {said}")

    state = state_report(unwrap(trainer.optimizer))
    step_ms = common._median_ms(meter.step_seconds)
    return {
        "parameters": sum(p.numel() for p in experiment.model.parameters() if p.requires_grad),
        "batch": batch,
        "steps": trainer.state.global_step,
        "learning_rate": rate,
        "eval_loss": loss,
        "eval_accuracy": meter.metrics.get("eval_accuracy"),
        "state_bytes": state.state_bytes,
        "bytes_per_param": state.bytes_per_param,
        "optimizer_ms": common._median_ms(meter.optimizer_seconds),
        "step_ms": step_ms,
        "tokens_per_second": batch * args.seq_len / step_ms * 1e3 if step_ms else None,
        "train_seconds": seconds,
        "train_curve": [(step, finite(loss)) for step, loss in meter.train_curve],
        "eval_curve": [(step, finite(loss)) for step, loss in meter.eval_curve],
        "device": str(trainer.args.device),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What the results say beside the figures


def _check_names(runs: list[Run]) -> None:
    from transformers.training_args import OptimizerNames

    import sketch_transformers  # noqa: F401

    known = [name.value for name in OptimizerNames]
    for run in runs:
        if run.optim not in known:
            fail(f"optimizer {run.optim!r} is unknown to Trainer; it knows {', '.join(known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _versions() -> dict[str, Any]:
    import transformers

    import sketch_plugins

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sketch_plugins": getattr(sketch_plugins, "__version__", None),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }

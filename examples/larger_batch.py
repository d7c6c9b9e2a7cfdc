"""The largest batch that fits into a memory budget, with AdamW and with our optimizers, in Hugging Face's Trainer.

    python examples/larger_batch.py                          # a small BERT and GPT-2 on this machine's CPU or GPU
    python examples/larger_batch.py --task bert --budget 250MiB
    python examples/larger_batch.py --task lm --effective 32 # the same samples per update for all: less accumulation
    python examples/larger_batch.py --device cuda --size large --budget 16GiB   # BERT-large, sequences of 512
    python examples/larger_batch.py --device cuda --size large --budget 16GiB --predict   # what would fit; no GPU

For each optimizer, Trainer searches for the largest batch (`sketch_transformers.reclaim_batch_size`), and then trains
with it on the same number of tokens. On a CPU the budget limits the memory that torch allocates, counted to the byte;
on a GPU it is the fraction of the memory that torch's allocator may use. The text is the source code of Python's
standard library, and nothing is downloaded.

An optimizer is name[/bf16][:key=value,...][@lr]. With /bf16 the weights are bfloat16 without a float32 copy:
cs_adam_layerwise/bf16:stochastic_rounding=true rounds them stochastically, in steps during backward.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common as common
import demo_lm
import finetune_bert
import torch
from _common import Run

TASKS = ("bert", "lm")
SIZES = {
    "small": {"layers": 4, "dim": 384, "vocab": 4096, "seq_len": 32, "tokens": 24_576},
    "large": {"layers": 24, "dim": 1024, "vocab": 30_522, "seq_len": 512, "tokens": 1_048_576},
}
QUICK = {"layers": 1, "dim": 128, "vocab": 512, "seq_len": 16, "tokens": 512}
#: Learning rates for random weights, as in the other examples; those for 'large' are not tuned.
RATES = {"bert": 5e-4, "lm": 1e-3}
LARGE_RATE = 1e-4
EVAL_ROWS = 128
#: The default budget. AdamW's weights, gradients and moments take 16 bytes a parameter in float32.
BYTES_PER_PARAMETER = 20
FIELDS = (
    "task", "source", "optimizer", "weights", "learning_rate", "batch", "accumulation", "x_adamw", "peak_bytes",
    "state_bytes",
    "tokens_per_second", "x_adamw_tokens_per_second", "step_ms", "tokens", "steps", "train_loss", "eval_loss",
    "eval_accuracy", "parameters", "seq_len", "precision", "budget_bytes", "device", "hardware", "threads", "torch",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole, number = common.positive_int, common.positive_float
    parser.add_argument("--task", choices=(*TASKS, "both"), default="both", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: large on a GPU, else small")
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="bytes ('250MiB') or a fraction of the memory (0.5); default: 20 bytes for each parameter",
    )
    parser.add_argument(
        "--optimizers",
        metavar="LIST",
        help="separated by commas (default: adamw_torch_fused, cs_adam, cs_adam:preset=lean, sm3:preset=ema, and where "
        "Trainer knows it cs_adam_layerwise/bf16:stochastic_rounding=true, beside adamw_torch_fused/bf16)",
    )
    parser.add_argument("--model", metavar="NAME", help="a pretrained model of that kind: hub name or folder")
    parser.add_argument("--precision", choices=("fp32", "bf16-mixed"), help="default: bf16-mixed on a GPU, else fp32")
    for name in ("layers", "dim", "vocab", "seq-len"):
        parser.add_argument(f"--{name}", type=whole, metavar="N", help="default: as --size has it")
    parser.add_argument("--tokens", type=whole, metavar="N", help="that each optimizer sees; default: as --size has it")
    parser.add_argument("--lr", type=number, metavar="LR", help="for AdamW and cs_adam, at AdamW's batch")
    parser.add_argument(
        "--scale-lr",
        choices=("sqrt", "none"),
        default="sqrt",
        help="rate by the square root of the batch, relative to AdamW's (default), or the same for every batch",
    )
    parser.add_argument(
        "--effective",
        type=whole,
        metavar="N",
        help="samples an update: the batch is the largest that fits and divides them, gradients are accumulated "
        "(default: an update for each batch)",
    )
    parser.add_argument("--max-batch", type=whole, default=8192, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights and data order (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, action="append", metavar="FILE", help="a text file; may be repeated")
    parser.add_argument(
        "--predict", action="store_true", help="run nothing: the batches that sketch_plugins.memory.plan expects"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds a run, says nothing about quality")
    parser.add_argument(
        "--out", type=Path, default=Path("larger_batch_out"), metavar="DIR", help="results (default: %(default)s)"
    )
    # Index of the run that this process takes, and the batch that the first one found; `main` starts its runs with
    # them.
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--base-batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not (args.predict or torch.cuda.is_available()):
        parser.error("--device cuda: there is no GPU; --predict says what would fit")
    args.size = args.size or ("large" if args.device == "cuda" and not args.quick else "small")
    for name, value in {**SIZES[args.size], **(QUICK if args.quick else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.precision = args.precision or ("bf16-mixed" if args.device == "cuda" else "fp32")
    if args.dim % 64:
        parser.error(f"--dim {args.dim} is not a multiple of 64")
    if args.predict and args.effective:
        parser.error("--predict is about updates of one batch: leave --effective")
    if args.task == "both" and args.model:
        parser.error("--model goes with one --task")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed} is not in [0, {2**32 - 1}]")
    for file in args.text or ():
        if not file.is_file():
            parser.error(f"--text {file}: no such file")
    try:
        args.runs = {task: runs_of(args, task) for task in (TASKS if args.task == "both" else (args.task,))}
        from sketch_plugins.memory.meter import parse_budget, total_memory

        where = torch.device(args.device)
        total = total_memory(where) if args.device == "cpu" or torch.cuda.is_available() else 0
        fraction = args.budget is not None and parse_budget(args.budget, 2**60, "--budget") != parse_budget(
            args.budget, 2**50, "--budget"
        )
        if fraction and not total:
            raise ValueError(f"--budget {args.budget} is a fraction of a GPU that is not there: give bytes")
        args.budget_bytes = None if args.budget is None else parse_budget(args.budget, total, "--budget")
    except ValueError as error:
        parser.error(str(error))
    # Attributes that the other examples' functions read.
    args.dataset = args.text_column = args.label_column = None
    args.classes, args.batch_size = 6, 1
    return args


def runs_of(args: argparse.Namespace, task: str) -> list[Run]:
    from transformers.training_args import OptimizerNames

    import sketch_transformers.arguments  # registers "cs_adam" and its family
    from sketch_plugins import registry

    known = [name.value for name in OptimizerNames]
    lr = args.lr or (LARGE_RATE if args.size == "large" else RATES[task])
    listed = args.optimizers
    if listed is None:
        listed = "adamw_torch_fused,cs_adam,cs_adam:preset=lean,sm3:preset=ema"
        if "cs_adam_layerwise" in known:
            listed += ",adamw_torch_fused/bf16,cs_adam_layerwise/bf16:stochastic_rounding=true"
    runs = common.parse_runs(listed, lr)
    for run in runs:
        name, _, weights = run.optim.partition("/")
        if name not in known or weights not in ("", "bf16"):
            raise ValueError(f"optimizer {run.optim!r} is unknown to Trainer; it knows {', '.join(known)}, and /bf16")
        plain = name.removesuffix("_layerwise")
        if plain in registry.names():  # otherwise the runs before it would be in vain
            sketch_transformers.arguments.parse_optim_args(name, run.optim_args)
    return runs


def label_of(run: Run) -> str:
    name, _, weights = run.optim.partition("/")
    return dataclasses.replace(run, optim=name).label + (", bf16 weights" if weights else "")


# ---------------------------------------------------------------------------------------------------------------------
# Data and model


def prepare(args: argparse.Namespace, task: str, folder: Path) -> dict[str, Any]:
    """Convert text to tensors on disk, by the other examples' functions."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"bert": finetune_bert, "lm": demo_lm}[task].prepare(for_others(args, task), folder)
    return {**about, "model": args.model or {"bert": "BERT", "lm": "GPT-2"}[task]}


def for_others(args: argparse.Namespace, task: str) -> argparse.Namespace:
    # A budget of a few hundred MB has no room for millions of tokens.
    return argparse.Namespace(**{**vars(args), "task": "classify", "quick": True})


def build(args: argparse.Namespace, task: str, folder: Path) -> common.Experiment:
    """The model, with random or pretrained weights, and the rows for training and for evaluation."""
    import transformers

    data = torch.load(folder / "data.pt", weights_only=True)
    if task == "bert":
        columns = {part: data[part] for part in ("train", "eval")}
    else:
        columns = {part: {"input_ids": data[part], "labels": data[part]} for part in ("train", "eval")}
    # Rows that training does not use would count in the budget.
    rows = {"train": 2 * args.tokens // args.seq_len, "eval": EVAL_ROWS}
    parts = {p: common.Rows(**{k: common.spread(v, rows[p]).clone() for k, v in columns[p].items()}) for p in columns}
    extra = {"num_labels": len(data["names"])} if task == "bert" else {}
    kind = {"bert": "AutoModelForSequenceClassification", "lm": "AutoModelForCausalLM"}[task]
    if args.model:
        try:
            model = getattr(transformers, kind).from_pretrained(args.model, **extra)
        except (OSError, ValueError) as error:
            common.fail(f"cannot load {args.model}: {error}")
    else:
        model = getattr(transformers, kind).from_config(config_of(args, task, data["vocab"], **extra))
    if task == "lm" and getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"  # see demo_lm.py
    metrics = finetune_bert.accuracy if task == "bert" else None
    return common.Experiment(model, parts["train"], parts["eval"], compute_metrics=metrics)


def config_of(args: argparse.Namespace, task: str, vocab: int, **extra: Any) -> Any:
    import transformers

    heads = args.dim // 64
    vocab = max(vocab, args.vocab)  # a small text has fewer tokens
    if task == "bert":
        return transformers.BertConfig(
            vocab_size=vocab,
            hidden_size=args.dim,
            num_hidden_layers=args.layers,
            num_attention_heads=heads,
            intermediate_size=4 * args.dim,
            max_position_embeddings=args.seq_len,
            **extra,
        )
    return transformers.GPT2Config(
        vocab_size=vocab,
        n_positions=args.seq_len,
        n_embd=args.dim,
        n_layer=args.layers,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run_one(args: argparse.Namespace, task: str, run: Run, folder: Path) -> dict[str, Any]:
    """Find the largest batch, train with it, evaluate."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

    from sketch_plugins.memory.meter import AllocatorMeter
    from sketch_transformers import reclaim_batch_size

    set_seed(args.seed)
    experiment = build(args, task, folder)
    name, _, weights = run.optim.partition("/")
    if weights:
        experiment.model.to(torch.bfloat16)
    parameters = sum(p.numel() for p in experiment.model.parameters())
    budget = args.budget_bytes or BYTES_PER_PARAMETER * parameters
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.set_per_process_memory_fraction(budget / torch.cuda.get_device_properties(0).total_memory)

    class Meter(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.losses: list[tuple[int, float]] = []

        def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
            self.start = common._now()

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            self.seconds.append(common._now() - self.start)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append((state.global_step, logs["loss"]))

    meter = Meter()
    trainer = Trainer(
        model=experiment.model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            optim=name,
            optim_args=run.optim_args,
            learning_rate=run.learning_rate,
            weight_decay=0.01,
            # Steps in backward get one gradient at a time, and cannot clip by the norm of all gradients.
            max_grad_norm=0.0 if name.endswith("_layerwise") else 1.0,
            lr_scheduler_type="cosine",
            bf16=args.precision == "bf16-mixed" and not weights,
            per_device_train_batch_size=1 if args.effective else args.base_batch or 4,
            gradient_accumulation_steps=args.effective or 1,
            per_device_eval_batch_size=4,
            seed=args.seed,
            use_cpu=not cuda,
            logging_steps=1,
            logging_nan_inf_filter=False,  # so that a run that diverges shows it
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
        ),
        train_dataset=experiment.train,
        eval_dataset=experiment.eval,
        compute_metrics=experiment.compute_metrics,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if experiment.compute_metrics else None,
        callbacks=[meter],
    )
    trainer.pop_callback(PrinterCallback)  # it would print a line for each step

    # On a GPU the allocator refuses memory beyond the budget; on a CPU the memory is counted.
    options = {"max_val": args.max_batch, "keep_effective": bool(args.effective)}
    options |= {"init_val": args.base_batch or 4} if args.effective else {}
    options |= {**({} if cuda else {"budget": budget, "meter": AllocatorMeter()})}
    started = time.perf_counter()
    try:
        found = reclaim_batch_size(trainer, **options)
    except ValueError as error:
        common.fail(str(error))
    searched = time.perf_counter() - started
    print(found, flush=True)
    batch = found.batch_size
    samples = args.effective or batch  # of one update
    scaled = args.base_batch and args.scale_lr == "sqrt" and not args.effective
    scale = math.sqrt(batch / args.base_batch) if scaled else 1.0
    trainer.args.max_steps = max(1, round(args.tokens / (samples * args.seq_len)))
    trainer.args.warmup_steps = max(1, trainer.args.max_steps // 10)
    trainer.args.learning_rate = run.learning_rate * scale
    trainer.train()
    evaluated = trainer.evaluate()
    step_ms = common._median_ms(meter.seconds)
    (peak,) = {trial.peak for trial in found.trials if trial.batch_size == batch}
    tail = [loss for _, loss in meter.losses[-max(1, len(meter.losses) // 5) :]]
    return {
        "task": task,
        "source": "measured",
        "optimizer": label_of(run),
        "weights": weights or "fp32",
        "learning_rate": trainer.args.learning_rate,
        "batch": batch,
        "accumulation": found.gradient_accumulation_steps,
        "peak_bytes": peak,
        "state_bytes": found.state_bytes,
        "tokens_per_second": samples * args.seq_len / step_ms * 1e3,
        "step_ms": step_ms,
        "tokens": trainer.state.global_step * samples * args.seq_len,
        "steps": trainer.state.global_step,
        "train_loss": common.finite(sum(tail) / len(tail)),
        "eval_loss": common.finite(evaluated["eval_loss"]),
        "eval_accuracy": evaluated.get("eval_accuracy"),
        "parameters": parameters,
        "budget_bytes": budget,
        "curve": [(step * samples * args.seq_len, common.finite(loss)) for step, loss in meter.losses],
        "search_seconds": searched,
    }


def predict(args: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """The prediction of `sketch_plugins.memory.plan`, without running anything."""
    try:
        from sketch_plugins.memory.plan import plan
    except ImportError as error:
        common.fail(f"--predict needs sketch_plugins.memory.plan, which this version has not: {error}")
    extra = {"num_labels": args.classes} if task == "bert" else {}
    config = args.model or config_of(args, task, args.vocab, **extra)
    results = []
    budget = args.budget_bytes
    if budget is None:
        import transformers

        with torch.device("meta"):
            kind = {"bert": "AutoModelForSequenceClassification", "lm": "AutoModelForCausalLM"}[task]
            given = transformers.AutoConfig.from_pretrained(args.model) if args.model else config
            model = getattr(transformers, kind).from_config(given)
        budget = BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters())
    for run in args.runs[task]:
        name, _, weights = run.optim.partition("/")
        name = "adamw" if name == "adamw_torch_fused" else name
        planned = plan(
            config,
            task={"bert": "sequence-classification", "lm": "causal-lm"}[task],
            seq_len=args.seq_len,
            batch_size=1,
            gpu_memory=budget,
            precision="bf16" if weights else args.precision,
            optimizers=[f"{name}:{run.optim_args}" if run.optim_args else name],
            device=args.device,
            reserve=0,
        )
        (row,) = planned.rows
        results.append(
            {
                "task": task,
                "source": "predicted",
                "optimizer": label_of(run),
                "weights": weights or "fp32",
                "batch": row.largest_batch,
                "state_bytes": row.state,
                "parameters": planned.params,
                "budget_bytes": budget,
            }
        )
    return results


# ---------------------------------------------------------------------------------------------------------------------
# All runs, table, files


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    args = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's profiler, which counts the allocator's memory, would print two lines for each size that is tried.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would distribute the batch over all devices
    if not args.model or Path(args.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.worker is not None:
        (task,) = args.runs
        folder = args.out / "work" / task
        result = run_one(args, task, args.runs[task][args.worker], folder)
        (folder / f"run-{args.worker}.json").write_text(json.dumps(result))
        return 0

    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for task, runs in args.runs.items():
        found = predict(args, task) if args.predict else measure(args, task, runs)
        base = next((r for r in found if r["optimizer"] == "AdamW"), found[0])
        for result in found:
            result["x_adamw"] = result["batch"] / base["batch"] if base["batch"] else None
            speed = result.get("tokens_per_second")
            result["x_adamw_tokens_per_second"] = speed and speed / base["tokens_per_second"]
            result |= {"seq_len": args.seq_len, "precision": args.precision, **machine(args)}
        results += found
    write(results, args.out / "larger_batch.csv")
    plot(results, args.out / "larger_batch.png")
    for task in args.runs:
        print_table([result for result in results if result["task"] == task])
    print(f"plot: {args.out / 'larger_batch.png'}   figures: {args.out / 'larger_batch.csv'}")
    return 1 if any(r["source"] == "measured" and r["eval_loss"] is None for r in results) else 0


def measure(args: argparse.Namespace, task: str, runs: list[Run]) -> list[dict[str, Any]]:
    """Each run in a process of its own, so that the memory of one optimizer does not include that of another."""
    folder = args.out / "work" / task
    about = prepare(args, task, folder)
    print(f"{task}: {about['source']}", flush=True)
    found: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        print(f"\n[{task} {index + 1}/{len(runs)}] {label_of(run)}", flush=True)
        command = [sys.executable, str(Path(__file__)), *args.argv, "--task", task, "--worker", str(index)]
        command += ["--base-batch", str(found[0]["batch"])] if found else []
        code = subprocess.run(command).returncode
        if code:
            common.fail(f"the run of {label_of(run)} ended with exit code {code}")
        found.append(json.loads((folder / f"run-{index}.json").read_text()))
        print(
            f"searched for {found[-1]['search_seconds']:.0f} s; {found[-1]['batch']} a batch, "
            f"{found[-1]['tokens_per_second']:,.0f} tokens/s",
            flush=True,
        )
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """The machine of the run."""
    if args.device == "cuda":
        hardware = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "a GPU (not at hand)"
    else:
        cpu = platform.processor() or platform.machine()
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
        hardware = f"{cpu}, {os.cpu_count()} cores"
    return {
        "device": args.device,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(results: list[dict[str, Any]], path: Path) -> None:
    """Write the CSV file, with figures rounded to their accuracy."""

    def short(value: Any) -> Any:
        return f"{value:.5g}" if isinstance(value, float) else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: short(value) for key, value in result.items()} for result in results)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the table of one task to standard output."""
    from rich.console import Console
    from rich.table import Table

    first = results[0]
    measured = first["source"] == "measured"
    said = "the largest that fits, by Trainer's own steps. Losses after as many tokens for each; rate by --scale-lr. "
    said += "Tokens/s: median of the steps."
    table = Table(
        title=f"{first['task']}, {first['parameters'] / 1e6:.1f} M parameters, sequences of {first['seq_len']}, "
        f"{first['precision']}, budget {first['budget_bytes'] / 1e6:,.1f} MB on {first['hardware']}",
        caption=f"Batch: {said}" if measured else "Predicted by sketch_plugins.memory.plan: nothing was run.",
        caption_justify="left",
    )
    table.add_column("optimizer")
    columns = ["batch" if measured else "batch (predicted)", "x AdamW", "state"]
    columns += ["accumulation"] if measured else []
    columns += ["peak", "tokens/s", "x AdamW", "steps", "rate", "eval loss", "accuracy"] if measured else []
    for name in columns:
        table.add_column(name, justify="right")
    for r in results:
        cells = [r["optimizer"], str(r["batch"]), common._format(r["x_adamw"], 1, ".2f", "")]
        cells += [common._format(r["state_bytes"], 1e-6, ",.1f", " MB")]
        if measured:
            cells += [
                str(r["accumulation"]),
                common._format(r["peak_bytes"], 1e-6, ",.1f", " MB"),
                f"{r['tokens_per_second']:,.0f}",
                f"{r['x_adamw_tokens_per_second']:.2f}",
                str(r["steps"]),
                f"{r['learning_rate']:.2g}",
                "diverged" if r["eval_loss"] is None else f"{r['eval_loss']:.4f}",
                common._format(r["eval_accuracy"], 100, ".1f", " %"),
            ]
        table.add_row(*cells)
    console = Console()
    Console(width=max(console.width, 150) if not console.is_terminal else None).print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot a row for each task: batches, tokens per second, loss by tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(r["task"] for r in results))
    measured = results[0]["source"] == "measured"
    columns = 3 if measured else 1
    figure, axes = plt.subplots(
        len(tasks), columns, figsize=(5.2 * columns, 3.6 * len(tasks)), squeeze=False, layout="constrained"
    )
    for row, task in zip(axes, tasks, strict=True):
        own = [r for r in results if r["task"] == task]
        colors = [plt.get_cmap("tab10")(i % 10) for i in range(len(own))]
        names = [textwrap.fill(r["optimizer"].replace(",", ", "), 36) for r in own]
        _bars(row[0], names, [r["batch"] or 0 for r in own], [r["x_adamw"] for r in own], colors)
        source = "largest batch" if measured else "largest batch, predicted"
        row[0].set_title(f"{task}: {source} in {own[0]['budget_bytes'] / 1e6:,.0f} MB")
        if not measured:
            continue
        _bars(
            row[1], names, [r["tokens_per_second"] for r in own], [r["x_adamw_tokens_per_second"] for r in own], colors
        )
        row[1].set(title=f"{task}: tokens per second", yticks=[])
        for r, color in zip(own, colors, strict=True):
            points = [(tokens, loss) for tokens, loss in r["curve"] if loss is not None]
            # Means over the same number of tokens for each, because the noise of a small batch would hide the other
            # curves.
            some = max(1, len(points) // 12)
            smooth = [
                (tokens, sum(loss for _, loss in points[max(0, i - some + 1) : i + 1]) / min(some, i + 1))
                for i, (tokens, _) in enumerate(points)
            ]
            row[2].plot(
                *zip(*smooth, strict=True) if smooth else ((), ()), color=color, label=r["optimizer"], linewidth=1
            )
        row[2].set(xlabel="tokens", title=f"{task}: training loss, running mean (colours as left)")
        row[2].grid(alpha=0.3)
    figure.suptitle(f"{results[0]['hardware']}, {results[0]['precision']}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axes: Any, names: list[str], heights: list[float], ratios: list[float | None], colors: list[Any]) -> None:
    bars = axes.barh(range(len(names)), heights, color=colors)
    axes.bar_label(bars, ["" if x is None else f"{h:,.0f} ({x:.2f}x)" for h, x in zip(heights, ratios, strict=True)])
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.margins(x=0.4)


if __name__ == "__main__":
    sys.exit(main())

"""Code that the examples share: text, tokenizer, one measured training run per optimizer, table and plot.

An example gives two functions to `main`: `prepare(args, folder)` converts text to tensors on disk, once; `build(args,
folder)` makes the model and the datasets from them, in every run. Each run is a process of its own, so that the peak
memory of one optimizer does not hide that of another.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EVAL_SHARE = 10  # one document in ten, or the last tenth of a document, is kept for evaluation
MIB = 2**20


def fail(message: str) -> NoReturn:
    """End the program with a message for the user instead of a traceback."""
    sys.exit(f"error: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: the three settings of `TrainingArguments` that concern the optimizer."""

    optim: str
    optim_args: str | None
    learning_rate: float

    @property
    def label(self) -> str:
        """The name in the table and the plot."""
        name = "AdamW" if self.optim.startswith("adamw_torch") else self.optim
        return f"{name} {self.optim_args}" if self.optim_args else name


def parse_runs(text: str, learning_rate: float) -> list[Run]:
    """Parse `name[:key=value,...][@lr]`, several of them separated by commas.

    A piece that starts with `key=` belongs to the optimizer before it: `cs_adam:compression=0.05,depth=2@1e-3,sgd`.
    """
    entries: list[str] = []
    for piece in (p.strip() for p in text.split(",")):
        head = piece.split(":", 1)[0]
        if "=" in head and entries and ":" in entries[-1]:
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    runs = []
    for entry in entries:
        head, at, rate = entry.rpartition("@")
        name, colon, optim_args = (head if at else entry).partition(":")
        if not name or "=" in name or (colon and not optim_args):
            raise ValueError(f"{entry!r} is not of the form name[:key=value,...][@learning-rate]")
        try:
            lr = positive_float(rate) if at else learning_rate
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{entry!r}: the learning rate after '@' is not a positive number") from error
        run = Run(name, optim_args or None, lr)
        if run in runs:
            raise ValueError(f"{entry!r} is listed twice")
        runs.append(run)
    return runs


def positive_int(text: str) -> int:
    """Type of an option that is a count."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def positive_float(text: str) -> float:
    """Type of a learning rate."""
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that every example has. The example sets the defaults of sizes."""
    text = parser.add_argument_group("text", "The sources of Python's standard library, unless one of these is given.")
    text.add_argument("--text", type=Path, action="append", metavar="FILE", help="a text file; may be repeated")
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="a data set of the hub (needs `pip install datasets`)")
    text.add_argument("--text-column", default="text", metavar="NAME", help="its text (default: %(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="a pretrained model: hub name or folder; brings its tokenizer")
    model.add_argument("--layers", type=positive_int, metavar="N", help="default: %(default)s")
    model.add_argument("--dim", type=positive_int, metavar="N", help="a multiple of 32 (default: %(default)s)")
    model.add_argument("--vocab", type=positive_int, metavar="N", help="size of the vocabulary (default: %(default)s)")
    train = parser.add_argument_group("training")
    train.add_argument("--steps", type=positive_int, metavar="N", help="default: %(default)s")
    train.add_argument("--batch-size", type=positive_int, metavar="N", help="sequences a step (default: %(default)s)")
    train.add_argument("--seq-len", type=positive_int, metavar="N", help="tokens a sequence (default: %(default)s)")
    train.add_argument(
        "--lr",
        type=positive_float,
        metavar="LR",
        help="of every optimizer without a rate of its own (default: %(default)s)",
    )
    train.add_argument("--weight-decay", type=float, default=0.01, metavar="W", help="default: %(default)s")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="weights and data order (default: %(default)s)")
    train.add_argument(
        "--optimizers",
        metavar="LIST",
        help="name[:key=value,...][@lr], separated by commas "
        "(default: adamw_torch_fused,cs_adam,cs_adam:preset=lean,sm3:preset=ema,sketchy)",
    )
    train.add_argument("--cpu", action="store_true", help="leave an accelerator unused")
    parser.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help="where results go (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds a run, says nothing about quality")
    # Index of the run that this process takes; `main` starts its own runs with it.
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)


def parse(parser: argparse.ArgumentParser, quick: dict[str, Any], argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check. With `--quick`, the values of `quick` replace the defaults of options that are not given."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # No abbreviations, because "--qu" would have to mean the same here and below.
    if "--quick" in argv:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    if args.text and args.dataset:
        parser.error("--text and --dataset exclude each other")
    if args.dim % 32:
        parser.error(f"--dim {args.dim} is not a multiple of 32")
    if not (math.isfinite(args.weight_decay) and args.weight_decay >= 0):
        parser.error(f"--weight-decay {args.weight_decay} is not a number >= 0")
    for file in args.text or ():
        if not file.is_file():
            parser.error(f"--text {file}: no such file")
    listed = args.optimizers or "adamw_torch_fused,cs_adam,cs_adam:preset=lean,sm3:preset=ema,sketchy"
    try:
        args.runs = parse_runs(listed, args.lr)
    except ValueError as error:
        parser.error(f"--optimizers: {error}")
    args.argv = argv
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Text


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, and the file, package or class that it comes from."""

    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents for training and documents for evaluation; no text is in both."""

    source: str
    train: list[Document]
    eval: list[Document]


def load_corpus(args: argparse.Namespace, max_bytes: int = 16 * MIB, by_label: bool = False) -> Corpus:
    """Load the text that the options name, or the first `max_bytes` bytes of it.

    With `by_label`, every label is split on its own, and packages of the standard library that have too few files for
    this are left out.
    """
    if args.text:
        documents = _limited((Document(str(file), _read(file)) for file in args.text), max_bytes)
        return _split(f"{len(documents)} text file(s)", documents, by_label)
    if args.dataset:
        return _hub_corpus(args.dataset, args.text_column, args.label_column if by_label else None, max_bytes)
    documents = _limited(standard_library(), max_bytes)
    if by_label:
        files = Counter(d.label for d in documents)
        documents = [d for d in documents if files[d.label] >= EVAL_SHARE]
    if not documents:
        fail("this Python has no readable standard library sources; name a text with --text FILE")
    return _split(f"the standard library of Python {platform.python_version()}", documents, by_label)


def standard_library() -> Iterable[Document]:
    """The sources of the standard library in the order of their names; the label is the top-level module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # These are no prose or code (the tables of `encodings`), or not part of the library (`site-packages`, build
    # settings).
    left_out = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    for file in sorted(root.rglob("*.py"), key=lambda f: f.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        if left_out.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200:
            yield Document(parts[0].removesuffix(".py"), text)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        fail(f"cannot read {file} as UTF-8 text: {error}")


def _limited(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    kept, total, seen = [], 0, set()
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        # A copy of a training file among the evaluation files would leak training data.
        if digest in seen:
            continue
        seen.add(digest)
        kept.append(document)
        total += len(document.text)
        if total >= max_bytes:
            break
    return kept


def _split(source: str, documents: list[Document], by_label: bool) -> Corpus:
    """Hold out whole documents for evaluation if there are enough of them, else the end of each."""
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.label if by_label else ""].append(document)
    corpus = Corpus(source, [], [])
    every = EVAL_SHARE // 2 if by_label else EVAL_SHARE  # one file of a small package says little about the package
    for group in groups.values():
        for i, document in enumerate(group):
            if len(group) >= EVAL_SHARE:
                (corpus.eval if i % every == every - 1 else corpus.train).append(document)
            else:
                for part, text in zip((corpus.train, corpus.eval), split_tail(document.text), strict=True):
                    part.append(Document(document.label, text))
    return corpus


def split_tail(text: str) -> tuple[str, str]:
    """All of a text except its last tenth, and the last tenth; the cut is at the end of a line if possible."""
    cut = len(text) - len(text) // EVAL_SHARE
    newline = text.find("\n", cut)
    cut = newline + 1 if 0 <= newline < len(text) - 1 else cut
    return text[:cut], text[cut:]


def _hub_corpus(name: str, text: str, label: str | None, max_bytes: int) -> Corpus:
    try:
        import datasets
    except ImportError:
        fail("--dataset needs the package `datasets`: pip install datasets")
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:  # the errors of the hub, the network or the file format are shown as they are
        fail(f"cannot load the data set {name}: {error}")
    for column in filter(None, (text, label)):
        if "train" not in splits or column not in splits["train"].column_names:
            fail(f"data set {name} has no split 'train' with a column {column!r}; see --text-column, --label-column")

    def documents(split: str, limit: int) -> list[Document]:
        rows = (row for row in splits[split] if row[text].strip())
        return _limited((Document(str(row[label]) if label else name, row[text]) for row in rows), limit)

    train = documents("train", max_bytes)
    held_out = next((s for s in ("validation", "test") if s in splits), None)
    if held_out:
        seen = {d.text for d in train}
        return Corpus(name, train, [d for d in documents(held_out, max_bytes // EVAL_SHARE) if d.text not in seen])
    # Neighbouring rows often belong to one article, so the end is held out as a whole, not every tenth row.
    cut = len(train) - max(1, len(train) // EVAL_SHARE)
    return Corpus(name, train[:cut], train[cut:])


def make_tokenizer(args: argparse.Namespace, corpus: Corpus, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `--model`, or a byte-level BPE vocabulary trained on the training text; saved in `folder`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if args.model:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            fail(f"cannot load the tokenizer of {args.model}: {error}")
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        special = {"pad_token": "[PAD]", "eos_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=args.vocab,
            special_tokens=list(special.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator((d.text for d in corpus.train), trainer)
        bpe.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(t, bpe.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, sep_token="[SEP]", **special)
    tokenizer.save_pretrained(folder / "tokenizer")
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens, in any number."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def pack(rows: list[list[int]], separator: int, length: int, before: Sequence[int] = ()) -> torch.Tensor:
    """Join all rows, with a separator after each, and cut them into blocks of `length` that start with `before`."""
    flat = torch.tensor([token for row in rows for token in (*row, separator)], dtype=torch.int32)
    body = length - len(before)
    blocks = flat[: len(flat) // body * body].view(-1, body)
    return torch.cat([torch.tensor(before, dtype=torch.int32).expand(len(blocks), -1), blocks], dim=1)


def spread(rows: Any, count: int) -> Any:
    """At most `count` of the rows of a tensor or a list, evenly spaced."""
    step = max(1, len(rows) // count)
    return rows[::step][:count]


def unigram_loss(train: torch.Tensor, held_out: torch.Tensor, vocab: int) -> float:
    """Cross-entropy of the evaluation tokens under the token frequencies of the training text, counted plus one."""
    counts = torch.bincount(train.flatten().long(), minlength=vocab).double() + 1
    return float(-(counts / counts.sum()).log()[held_out.flatten().long()].mean())


# ---------------------------------------------------------------------------------------------------------------------
# Memory and time


class PeakMemory:
    """Maximum growth of the memory in use between `start` and `read`: of the device, or else of the process."""

    def start(self) -> None:
        """Start from the memory that is in use now."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
            return
        try:
            # Linux: the peak starts again from the present resident memory.
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
        self.base = _resident()

    def read(self) -> int | None:
        """Bytes, or None if the system does not say."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.base
        peak = _peak_resident()
        return None if peak is None or self.base is None else max(0, peak - self.base)


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _resident() -> int | None:
    resident = _status("VmRSS")
    return _peak_resident() if resident is None else resident


def _peak_resident() -> int | None:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _median_ms(seconds: list[float]) -> float | None:
    # The first steps allocate the state and warm up caches.
    seconds = seconds[min(5, len(seconds) // 2) :]
    return 1e3 * statistics.median(seconds) if seconds else None


# ---------------------------------------------------------------------------------------------------------------------
# One run


@dataclasses.dataclass
class Experiment:
    """The result of `build`."""

    model: torch.nn.Module
    train: torch.utils.data.Dataset
    eval: torch.utils.data.Dataset
    collator: Callable | None = None
    compute_metrics: Callable | None = None


class Rows(torch.utils.data.Dataset):
    """A data set over tensors of equal length; item i has the i-th row of each."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index].long() for name, column in self.columns.items()}


def train_one(args: argparse.Namespace, run: Run, experiment: Experiment) -> dict[str, Any]:
    """Train with Trainer and return the measurements. This is all that a script needs to use `cs_adam`."""
    from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

    import sketch_transformers  # noqa: F401  registers "cs_adam" and its family
    from sketch_plugins import state_report

    peak = PeakMemory()

    class Progress(ProgressCallback):
        """Trainer's progress bar, which shows the loss instead of one line for each log entry."""

        def on_train_begin(self, *args_: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args_, **kwargs)
            self.training_bar.set_description(run.label)

        def on_prediction_step(self, *_: Any, **kwargs: Any) -> None:
            """Show no second bar, because an evaluation takes only a few seconds."""

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            shown = {k: f"{v:.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")}
            if shown and self.training_bar is not None:
                self.training_bar.set_postfix(shown)

    class Meter(TrainerCallback):
        """Records times of the optimizer's own step and of whole training steps, both loss curves, and peak memory."""

        def __init__(self) -> None:
            self.optimizer_seconds: list[float] = []
            self.step_seconds: list[float] = []
            self.train_curve: list[tuple[int, float]] = []
            self.eval_curve: list[tuple[int, float]] = []

        def on_train_begin(self, _args: Any, _state: Any, _control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            optimizer = unwrap(optimizer)
            optimizer.register_step_pre_hook(lambda *_: setattr(self, "optimizer_start", _now()))
            optimizer.register_step_post_hook(lambda *_: self.optimizer_seconds.append(_now() - self.optimizer_start))

        def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
            self.step_start = _now()

        def on_step_end(self, *_: Any, **kwargs: Any) -> None:
            self.step_seconds.append(_now() - self.step_start)

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict | None = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.train_curve.append((state.global_step, logs["loss"]))

        def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: dict, **kwargs: Any) -> None:
            self.eval_curve.append((state.global_step, metrics["eval_loss"]))
            self.metrics = metrics

        def on_train_end(self, *_: Any, **kwargs: Any) -> None:
            self.peak_bytes = peak.read()

    meter = Meter()
    trainer = Trainer(
        model=experiment.model,
        args=TrainingArguments(
            output_dir=str(args.out / "trainer"),
            optim=run.optim,
            optim_args=run.optim_args,
            learning_rate=run.learning_rate,
            weight_decay=args.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, args.steps // 10),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            seed=args.seed,
            use_cpu=args.cpu,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 5),
            logging_steps=max(1, args.steps // 50),
            logging_nan_inf_filter=False,  # so that a run that diverges shows it
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=experiment.train,
        eval_dataset=experiment.eval,
        data_collator=experiment.collator,
        compute_metrics=experiment.compute_metrics,
        preprocess_logits_for_metrics=(lambda logits, _: logits.argmax(-1)) if experiment.compute_metrics else None,
        callbacks=[meter],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)

    peak.start()
    start = _now()
    trainer.train()
    seconds = _now() - start
    if not meter.eval_curve or meter.eval_curve[-1][0] != args.steps:
        trainer.evaluate()

    report = state_report(unwrap(trainer.optimizer))
    return {
        "label": run.label,
        **dataclasses.asdict(run),
        "parameters": sum(p.numel() for p in experiment.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "eval_loss": finite(meter.metrics["eval_loss"]),
        "eval_accuracy": meter.metrics.get("eval_accuracy"),
        "state_bytes": report.state_bytes,
        "bytes_per_param": report.bytes_per_param,
        "peak_bytes": meter.peak_bytes,
        "optimizer_ms": _median_ms(meter.optimizer_seconds),
        "step_ms": _median_ms(meter.step_seconds),
        "train_seconds": seconds,
        "train_curve": [(step, finite(loss)) for step, loss in meter.train_curve],
        "eval_curve": [(step, finite(loss)) for step, loss in meter.eval_curve],
        "device": str(trainer.args.device),
    }


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def finite(value: float) -> float | None:
    """The value, or None if it is not finite, because JSON has no infinity."""
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------------------
# All runs, table, plot


def main(
    args: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path], dict[str, Any]],
    build: Callable[[argparse.Namespace, Path], Experiment],
) -> int:
    """Prepare the data, train with each optimizer in its own process, print the table, write plot and JSON.

    `prepare` returns facts about the data for the table's caption and the JSON file. The exit code is 1 if a run
    diverged.
    """
    hub = [name.partition(":")[0] for name in (args.model, args.dataset) if name]
    if all(Path(name).exists() for name in hub):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Trainer would distribute the batch over all devices, but a comparison needs one.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    folder = args.out / "work"
    if args.worker is not None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import set_seed

        set_seed(args.seed)
        experiment = build(args, folder)
        limit = getattr(experiment.model.config, "max_position_embeddings", args.seq_len)
        if args.seq_len > limit:
            fail(f"--seq-len {args.seq_len} is more than the {limit} positions of {args.model}")
        result = train_one(args, args.runs[args.worker], experiment)
        (folder / f"run-{args.worker}.json").write_text(json.dumps(result))
        return 0

    _check_names(args.runs)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    about = prepare(args, folder)
    print(f"text: {about['source']}; prepared in {time.perf_counter() - started:.0f} s", flush=True)
    results = []
    for index, run in enumerate(args.runs):
        print(f"\n[{index + 1}/{len(args.runs)}] {run.label}, learning rate {run.learning_rate:g}", flush=True)
        command = [sys.executable, sys.argv[0], *args.argv, "--worker", str(index)]
        try:
            code = subprocess.run(command).returncode
        except KeyboardInterrupt:
            return 130
        if code:
            fail(f"the run of {run.label} ended with exit code {code}")
        results.append(json.loads((folder / f"run-{index}.json").read_text()))

    summary = {
        "about": about,
        "options": {k: _plain(v) for k, v in vars(args).items() if k not in ("runs", "argv", "worker")},
        "versions": _versions(),
        "seconds": time.perf_counter() - started,
        "runs": results,
    }
    (args.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, args.out / "comparison.png")
    print_table(summary)
    print(f"plot: {args.out / 'comparison.png'}   figures: {args.out / 'results.json'}")
    return 1 if any(r["eval_loss"] is None for r in results) else 0


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


def baseline(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The run that the others are compared with: AdamW, or the first run if AdamW is not among them."""
    return next((r for r in results if r["label"] == "AdamW"), results[0])


def print_table(summary: dict[str, Any]) -> None:
    """Print the table of figures to standard output."""
    from rich.console import Console
    from rich.table import Table

    results, about = summary["runs"], summary["about"]
    base = baseline(results)
    with_accuracy = any(r["eval_accuracy"] is not None for r in results)
    table = Table(
        title=f"{about['model']}, {base['parameters'] / 1e6:.1f} M parameters, {base['steps']} steps of "
        f"{summary['options']['batch_size']} x {summary['options']['seq_len']} tokens, {base['device']}",
        caption=f"Evaluated on {about['eval']}. State: the optimizer's tensors. Peak: growth of memory while training, "
        "model and data loaded before. Times: medians.",
        caption_justify="left",
    )
    table.add_column("optimizer")
    columns = ["learning rate", "eval loss", f"vs {base['label']}"]
    columns += ["accuracy"] if with_accuracy else []
    columns += ["state", "B/param", "peak", "optimizer step", "whole step"]
    for name in columns:
        table.add_column(name, justify="right")
    for r in results:
        loss, reference = r["eval_loss"], base["eval_loss"]
        relative = "" if loss is None or not reference else f"{100 * (loss / reference - 1):+.2f} %"
        cells = [r["label"], f"{r['learning_rate']:g}", "diverged" if loss is None else f"{loss:.4f}", relative]
        cells += [_format(r["eval_accuracy"], 100, ".1f", " %")] if with_accuracy else []
        cells += [
            _format(r["state_bytes"], 1 / MIB, ",.2f", " MiB"),
            f"{r['bytes_per_param']:.3f}",
            _format(r["peak_bytes"], 1 / MIB, ",.0f", " MiB"),
            _format(r["optimizer_ms"], 1, ",.1f", " ms"),
            _format(r["step_ms"], 1, ",.0f", " ms"),
        ]
        table.add_row(*cells)
    console = Console()
    # A log file has no width of its own, and the table must not be wrapped in it.
    Console(width=max(console.width, 150) if not console.is_terminal else None).print(table)


def _format(value: float | None, scale: float, spec: str, unit: str) -> str:
    return "n/a" if value is None else f"{value * scale:{spec}}{unit}"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Loss curves on the left, memory bars on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = summary["runs"]
    colors = [plt.get_cmap("tab10")(i % 10) for i in range(len(results))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 2), layout="constrained")

    for r, color in zip(results, colors, strict=True):
        train = [(s, v) for s, v in r["train_curve"] if v is not None]
        held_out = [(s, v) for s, v in r["eval_curve"] if v is not None]
        left.plot(*zip(*train, strict=True) if train else ((), ()), color=color, alpha=0.4, linewidth=1)
        left.plot(
            *zip(*held_out, strict=True) if held_out else ((), ()),
            color=color,
            marker="o",
            markersize=4,
            label=f"{r['label']}, lr {r['learning_rate']:g}",
        )
    left.set(xlabel="step", ylabel="loss", title="Loss: evaluation (dots) and training (thin)")
    left.grid(alpha=0.3)
    left.legend(frameon=False)

    labels = [r["label"].replace(" ", "\n", 1) for r in results]
    state = [r["state_bytes"] / MIB for r in results]
    rest = [max(0.0, (r["peak_bytes"] or 0) / MIB - s) for r, s in zip(results, state, strict=True)]
    # By position, because two runs of one optimizer at two learning rates have the same label.
    right.bar(range(len(results)), state, color=colors)
    right.bar(range(len(results)), rest, bottom=state, color=colors, alpha=0.25)
    small = 10 if len(results) < 4 else 7  # so that the labels of neighbours do not overlap
    right.set_xticks(range(len(results)), labels, fontsize=small)
    for i, r in enumerate(results):
        text = f"{state[i]:.1f} MiB state\n{r['bytes_per_param']:.2f} B/param"
        right.text(i, state[i] + rest[i], text, ha="center", va="bottom", fontsize=small)
    right.margins(y=0.2)
    right.set(ylabel="MiB", title="Peak memory (solid: optimizer state)")
    figure.suptitle(f"{summary['about']['model']} on {summary['about']['source']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)

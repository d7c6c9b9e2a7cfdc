"""Code that the examples share: options, text, tokenizer, and what an example hands to the run of an optimizer."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import platform
import statistics
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
# What a run is made of


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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _median_ms(seconds: list[float]) -> float | None:
    # The first steps allocate the state and warm up caches.
    seconds = seconds[min(5, len(seconds) // 2) :]
    return 1e3 * statistics.median(seconds) if seconds else None


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def finite(value: float) -> float | None:
    """The value, or None if it is not finite, because JSON has no infinity."""
    return value if math.isfinite(value) else None


def _format(value: float | None, scale: float, spec: str, unit: str) -> str:
    return "n/a" if value is None else f"{value * scale:{spec}}{unit}"

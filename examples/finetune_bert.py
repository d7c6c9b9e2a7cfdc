"""Train a BERT classifier or masked language model with AdamW, cs_adam and SM3 through Hugging Face's Trainer.

    python examples/finetune_bert.py                                           # small BERT, random weights
    python examples/finetune_bert.py --task mlm --largest-batch                # the second part of demo_lm.py, too
    python examples/finetune_bert.py --model bert-base-uncased --lr 5e-5       # downloads from the hub
    python examples/finetune_bert.py --dataset ag_news --label-column label

The classes are the packages of Python's standard library that passages come from; whole files are held out. With
several --text files the classes are the files, and the end of each is held out.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import _common as common
import _compare as compare
import torch

DEFAULTS = {"layers": 4, "dim": 256, "vocab": 4096, "steps": 300, "batch_size": 16, "seq_len": 64, "lr": 5e-4}
QUICK = {"layers": 2, "dim": 64, "vocab": 512, "steps": 20, "batch_size": 8, "seq_len": 64}
EVAL_ROWS = 512
MASK_SHARE = 0.15


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert documents to a vocabulary and rows of token ids with labels, and save them for the runs."""
    classify = args.task == "classify"
    corpus = common.load_corpus(args, by_label=classify)
    tokenizer = common.make_tokenizer(args, corpus, folder)
    if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        common.fail(f"the tokenizer of {args.model} is not BERT's: it has no [CLS], [SEP] or [PAD]")
    data, about = (classification if classify else masked_lm)(args, corpus, tokenizer)
    if len(data["train"]["input_ids"]) < args.batch_size or not len(data["eval"]["input_ids"]):
        common.fail(f"too little text for {args.seq_len} tokens a row and {args.batch_size} rows a step")
    tokens = {name: getattr(tokenizer, f"{name}_token_id") for name in ("cls", "sep", "pad", "mask")}
    torch.save({**data, "vocab": len(tokenizer), "tokens": tokens}, folder / "data.pt")
    rows = len(data["train"]["input_ids"])
    return {
        "model": f"{args.model or 'small BERT'}, {'classifier' if classify else 'masked language model'}",
        "source": f"{corpus.source}, {rows:,} rows of {args.seq_len} tokens",
        "eval": about,
    }


def classification(args: argparse.Namespace, corpus: common.Corpus, tokenizer: Any) -> tuple[dict[str, Any], str]:
    """Passages and their classes, with the same number of training passages for every class."""
    body = args.seq_len - 2
    chunks: dict[str, dict[str, list[list[int]]]] = {}
    for part, documents in (("train", corpus.train), ("eval", corpus.eval)):
        chunks[part] = defaultdict(list)
        for document, ids in zip(documents, common.encode(tokenizer, [d.text for d in documents]), strict=True):
            # A row of a data set is one passage. A file has many, and the last one is mostly too short to classify.
            starts = range(0, 1 if args.dataset else max(1, len(ids) - body // 2), body)
            chunks[part][document.label] += [ids[i : i + body] for i in starts]
    names = sorted(chunks["train"].keys() & chunks["eval"].keys(), key=lambda name: (-len(chunks["train"][name]), name))
    names = sorted(names[: args.classes] if args.classes else names)
    if len(names) < 2:
        common.fail(
            f"a classifier needs two classes, the text has {len(names)}; give several --text files or --dataset"
        )

    data: dict[str, Any] = {"names": names}
    # Training rows are strictly balanced. Evaluation rows are only limited in number, so small classes have fewer.
    fewest = min(len(chunks["train"][name]) for name in names)
    for part, limit in (("train", fewest), ("eval", max(1, EVAL_ROWS // len(names)))):
        rows = [(row, i) for i, name in enumerate(names) for row in common.spread(chunks[part][name], limit)]
        ids = torch.full((len(rows), args.seq_len), tokenizer.pad_token_id, dtype=torch.int32)
        for i, (row, _) in enumerate(rows):
            row = [tokenizer.cls_token_id, *row, tokenizer.sep_token_id]
            ids[i, : len(row)] = torch.tensor(row)
        labels = torch.tensor([label for _, label in rows])
        data[part] = {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).int(), "labels": labels}
    held_out = f"{len(data['eval']['labels'])} held-out passages of the classes {', '.join(names)}"
    return data, held_out


def masked_lm(args: argparse.Namespace, corpus: common.Corpus, tokenizer: Any) -> tuple[dict[str, Any], str]:
    """Blocks of tokens; those for evaluation are masked once, so that every run predicts the same tokens."""
    if tokenizer.mask_token_id is None:
        common.fail(f"the tokenizer of {args.model} has no [MASK]")
    start, end = [tokenizer.cls_token_id], tokenizer.sep_token_id
    train, held_out = (
        common.pack(common.encode(tokenizer, [d.text for d in part]), end, args.seq_len, start)
        for part in (corpus.train, corpus.eval)
    )
    held_out = common.spread(held_out, EVAL_ROWS)
    special = {"cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id, "mask": tokenizer.mask_token_id}
    ids, labels = mask(held_out.long(), special, len(tokenizer), torch.Generator().manual_seed(args.seed))
    about = f"{held_out.numel():,} tokens of {len(corpus.eval)} other documents, {MASK_SHARE:.0%} of them masked"
    return {"train": {"input_ids": train}, "eval": {"input_ids": ids, "labels": labels}}, about


def mask(
    ids: torch.Tensor, special: dict[str, int], vocab: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """BERT's rule: of the chosen tokens, 80 % become [MASK], 10 % a random token, 10 % stay; other labels are -100."""
    chosen = torch.rand(ids.shape, generator=generator) < MASK_SHARE
    chosen &= ~torch.isin(ids, torch.tensor([special["cls"], special["sep"]]))
    fate = torch.rand(ids.shape, generator=generator)
    anything = torch.randint(vocab, ids.shape, generator=generator)
    masked = torch.where(chosen & (fate < 0.8), special["mask"], torch.where(chosen & (fate > 0.9), anything, ids))
    return masked, torch.where(chosen, ids, -100)


def build(args: argparse.Namespace, folder: Path) -> common.Experiment:
    """The model, with random or pretrained weights, and the rows."""
    import transformers

    data = torch.load(folder / "data.pt", weights_only=True)
    train, held_out = common.Rows(**data["train"]), common.Rows(**data["eval"])
    classify = args.task == "classify"
    extra = {"num_labels": len(data["names"])} if classify else {}
    if args.model:
        kind = "AutoModelForSequenceClassification" if classify else "AutoModelForMaskedLM"
        try:
            model = getattr(transformers, kind).from_pretrained(args.model, **extra)
        except (OSError, ValueError) as error:
            common.fail(f"cannot load {args.model}: {error}")
    else:
        config = transformers.BertConfig(
            vocab_size=data["vocab"],
            hidden_size=args.dim,
            num_hidden_layers=args.layers,
            num_attention_heads=args.dim // 32,
            intermediate_size=4 * args.dim,
            max_position_embeddings=args.seq_len,
            pad_token_id=data["tokens"]["pad"],
            **extra,
        )
        model = (transformers.BertForSequenceClassification if classify else transformers.BertForMaskedLM)(config)
    if classify:
        return common.Experiment(model, train, held_out, compute_metrics=accuracy)

    generator = torch.Generator().manual_seed(args.seed)

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if "labels" not in batch:
            batch["input_ids"], batch["labels"] = mask(batch["input_ids"], data["tokens"], data["vocab"], generator)
        return batch

    return common.Experiment(model, train, held_out, collator=collate)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the passages whose class is right; Trainer has already taken the argmax."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    compare.add_options(parser, "bert_out", largest_batch=False)
    parser.add_argument(
        "--task", choices=("classify", "mlm"), default="classify", help="what is trained (default: %(default)s)"
    )
    parser.add_argument("--label-column", default="label", metavar="NAME", help="the class (default: %(default)s)")
    parser.add_argument(
        "--classes", type=common.positive_int, metavar="N", help="only the N largest (default: 6, all of a --dataset)"
    )
    parser.set_defaults(**DEFAULTS)
    args = common.parse(parser, QUICK, argv)
    if args.classes is None and not args.dataset:
        args.classes = 6
    return compare.main(args, prepare, build)


if __name__ == "__main__":
    sys.exit(main())

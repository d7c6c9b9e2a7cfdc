"""Train a small GPT-2 from scratch with AdamW and our optimizers through Hugging Face's Trainer, and compare them.

    make demo                                              # or, in an environment with `sketch-plugins[demo]`:
    python examples/demo_lm.py
    python examples/demo_lm.py --no-largest-batch          # the same batch for all, in half the time
    python examples/demo_lm.py --text book.txt --steps 500
    python examples/demo_lm.py --optimizers adamw_torch_fused@1e-3,cs_adam:compression=0.05,cs_adagrad@1e-2

The text is the source code of Python's own standard library, the vocabulary is trained on it, and nothing is
downloaded. Each optimizer trains twice on as many tokens: with the same batch as all others, and with the largest batch
that fits into the memory which AdamW takes for that one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import _common as common
import _compare as compare
import torch

#: The model and the training of the other examples with a language model.
DEFAULTS = {"layers": 4, "dim": 256, "vocab": 4096, "steps": 450, "batch_size": 8, "seq_len": 64, "lr": 1e-3}
#: Of the demo itself. A wide model of few layers, a small vocabulary and a small batch have small activations, so that
#: the optimizer's state is as large a part of the memory as it is where AdamW hardly fits.
DEMO = {**DEFAULTS, "layers": 2, "dim": 384, "vocab": 2048, "steps": 450, "batch_size": 3}
QUICK = {"layers": 2, "dim": 64, "vocab": 512, "steps": 20, "batch_size": 4, "seq_len": 64}
#: With room for a larger batch.
DEMO_QUICK = {**QUICK, "dim": 128, "batch_size": 2, "seq_len": 32}
EVAL_TOKENS = 32_768


def prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Convert documents to a vocabulary and blocks of token ids, and save them for the runs."""
    corpus = common.load_corpus(args, common.MIB if args.quick else 16 * common.MIB)
    tokenizer = common.make_tokenizer(args, corpus, folder)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        common.fail(f"the tokenizer of {args.model} has no token that ends a text")
    train, held_out = (
        common.pack(common.encode(tokenizer, [d.text for d in part]), end, args.seq_len)
        for part in (corpus.train, corpus.eval)
    )
    held_out = common.spread(held_out, max(1, EVAL_TOKENS // args.seq_len // (8 if args.quick else 1)))
    if len(train) < args.batch_size or not len(held_out):
        common.fail(f"too little text: {len(train)} training and {len(held_out)} evaluation blocks of {args.seq_len}")
    torch.save({"train": train, "eval": held_out, "vocab": len(tokenizer), "end": end}, folder / "data.pt")
    return {
        "model": args.model or "GPT-2 architecture",
        "source": f"{corpus.source}, {train.numel():,} tokens in {len(corpus.train)} documents",
        "eval": f"{held_out.numel():,} tokens of {len(corpus.eval)} other documents, "
        f"where token frequencies alone score {common.unigram_loss(train, held_out, len(tokenizer)):.2f}",
    }


def build(args: argparse.Namespace, folder: Path) -> common.Experiment:
    """The model, with random or pretrained weights, and the blocks. Labels are the inputs, which the model shifts."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    data = torch.load(folder / "data.pt", weights_only=True)
    if args.model:
        try:
            model = AutoModelForCausalLM.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            common.fail(f"cannot load {args.model}: {error}")
    else:
        config = GPT2Config(
            vocab_size=data["vocab"],
            n_positions=args.seq_len,
            n_embd=args.dim,
            n_layer=args.layers,
            n_head=args.dim // 32,
            # A short run sees no text twice, so dropout would only add noise to the comparison.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=data["end"],
            eos_token_id=data["end"],
            use_cache=False,
        )
        model = GPT2LMHeadModel(config)
    if getattr(model, "loss_type", None) is None:
        # transformers does not know from GPT-2's class name which loss this is. By default it takes the same loss, but
        # divides by all tokens, although it predicts no first token of a row: losses would be too small by 1 / seq_len.
        model.loss_type = "ForCausalLM"
    train, held_out = (common.Rows(input_ids=data[part], labels=data[part]) for part in ("train", "eval"))
    return common.Experiment(model, train, held_out)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    compare.add_options(parser, "demo_out", largest_batch=True)
    parser.set_defaults(**DEMO)
    return compare.main(common.parse(parser, DEMO_QUICK, argv), prepare, build)


if __name__ == "__main__":
    sys.exit(main())

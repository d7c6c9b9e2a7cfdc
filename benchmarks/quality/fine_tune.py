"""Fine-tuning of a pretrained BERT of 22.7 million parameters on positive and negative sentences of film reviews."""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from .watching import Watch, averages, evaluated

TRAINED, TESTED, BATCH, LENGTH, CLIP = 2400, 1200, 16, 48, 1.0


class Reviews:
    """Sentences with the sign of their mean rating, and the pretrained model.

    Args:
        model: a folder with the model and its tokenizer, as transformers writes it.
        file: lines of ``number <tab> rating <tab> sentence``.
    """

    def __init__(self, model: Path, file: Path) -> None:
        from transformers import AutoTokenizer

        self.model, self.tokenizer = model, AutoTokenizer.from_pretrained(model)
        rows = [line.rstrip("\n").split("\t") for line in file.read_text(encoding="latin-1").splitlines()]
        found = [(row[2], int(float(row[1]) > 0)) for row in rows if len(row) == 3 and float(row[1]) != 0]
        random.Random(0).shuffle(found)
        self.train, self.test = found[:TRAINED], found[TRAINED : TRAINED + TESTED]

    def batch(self, rows: list[tuple[str, int]]) -> dict[str, Tensor]:
        """Inputs of the model."""
        texts = [text for text, _ in rows]
        inputs = self.tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([label for _, label in rows])}


def prepare(args: Namespace) -> Reviews:
    """Data and model that all runs share."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return Reviews(args.model, args.reviews)


def run(
    reviews: Reviews, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, seed: int, watch: Watch
) -> tuple[float, torch.optim.Optimizer]:
    """(share of test sentences with a wrong label, optimizer); the learning rate falls linearly to 0.

    An optimizer that averages the weights itself (schedule-free) keeps its rate.
    """
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    numpy.random.seed(seed)
    model = BertForSequenceClassification.from_pretrained(reviews.model, num_labels=2)
    torch.manual_seed(seed)
    nn.init.normal_(model.classifier.weight, std=0.02)
    optimizer = make(model)
    constant = averages(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if constant else 1 - step / steps)
    rng, order = random.Random(seed), list[int]()

    def wrong() -> float:
        model.eval()
        found = 0
        for first in range(0, TESTED, 48):
            given = reviews.batch(reviews.test[first : first + 48])
            found += int((model(**given).logits.argmax(-1) != given["labels"]).sum())
        model.train()
        return found / TESTED

    model.train()
    watch.start()
    for _ in range(steps):
        if len(order) < BATCH:
            order = list(range(TRAINED))
            rng.shuffle(order)
        taken, order = order[:BATCH], order[BATCH:]
        loss = model(**reviews.batch([reviews.train[i] for i in taken])).loss
        if not math.isfinite(loss.item()):
            return 1.0, optimizer
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        watch.stepped(optimizer, wrong)
    return evaluated(optimizer, wrong), optimizer

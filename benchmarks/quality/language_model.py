"""A word-level language model: a decoder of 3.86 million parameters, trained from scratch."""

from __future__ import annotations

import collections
import math
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from .watching import Watch, averages, evaluated

VOCABULARY, WIDTH, LAYERS, HEADS = 8192, 160, 4, 5
CONTEXT, BATCH, EVALUATED = 32, 8, 24_000
WARM_UP, CLIP = 0.1, 1.0


class Block(nn.Module):
    """Attention and a feed-forward layer, each after its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        h = self.norm1(x)
        heads = (part(h).view(b, t, HEADS, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """A decoder whose embedding and head are not tied."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = "output" in name or "down" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if deep else 0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.words(x) + self.positions.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return functional.cross_entropy(self.head(self.norm(h)).flatten(0, 1).float(), y.flatten())


class Texts:
    """Numbers of words: for training from valid.txt and the first 80 % of test.txt, for evaluation from the rest."""

    def __init__(self, folder: Path) -> None:
        valid, test = ((folder / name).read_text(encoding="utf-8").split() for name in ("valid.txt", "test.txt"))
        cut = int(0.8 * len(test))
        train = valid + test[:cut]
        counts = collections.Counter(train)
        words = sorted(counts, key=lambda word: (-counts[word], word))[: VOCABULARY - 1]
        numbers = {word: number for number, word in enumerate(words, 1)}  # 0 stands for every other word
        self.train, held = (torch.tensor([numbers.get(w, 0) for w in part]) for part in (train, test[cut:]))
        self.held = held[:EVALUATED]

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless passes over the segments, each in a different order."""
        count, rng = (len(self.train) - 1) // CONTEXT, random.Random(seed)
        while True:
            order = list(range(count))
            rng.shuffle(order)
            for first in range(0, count - BATCH + 1, BATCH):
                rows = [self.train[s * CONTEXT : s * CONTEXT + CONTEXT + 1] for s in order[first : first + BATCH]]
                block = torch.stack(rows)
                yield block[:, :-1], block[:, 1:]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Evaluation loss, in nats a word."""
        count = (len(self.held) - 1) // CONTEXT
        x = self.held[: count * CONTEXT].view(count, CONTEXT)
        y = self.held[1 : count * CONTEXT + 1].view(count, CONTEXT)
        parts = [(model(a, b).item(), b.numel()) for a, b in zip(x.split(8), y.split(8), strict=True)]
        return sum(loss * size for loss, size in parts) / sum(size for _, size in parts)


def prepare(args: Namespace) -> Texts:
    """Data that all runs share."""
    return Texts(args.text)


def run(
    texts: Texts, make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, seed: int, watch: Watch
) -> tuple[float, torch.optim.Optimizer]:
    """(evaluation loss, optimizer): linear warm-up over 10 % of the steps, then a cosine to 0.

    An optimizer that averages the weights itself (schedule-free) keeps its rate after the warm-up.
    """
    torch.manual_seed(seed)
    numpy.random.seed(seed)
    model = LanguageModel()
    optimizer = make(model)
    warm, constant = max(1, int(WARM_UP * steps)), averages(optimizer)

    def factor(step: int) -> float:
        if step < warm or constant:
            return min(1.0, (step + 1) / warm)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    stream = texts.batches(seed)
    watch.start()
    for _ in range(steps):
        loss = model(*next(stream))
        if not math.isfinite(loss.item()):
            return math.inf, optimizer
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        watch.stepped(optimizer, lambda: texts.loss(model))
    value = evaluated(optimizer, lambda: texts.loss(model))
    return value if math.isfinite(value) else math.inf, optimizer

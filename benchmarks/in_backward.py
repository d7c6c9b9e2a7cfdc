"""Peak memory of a training step with steps after backward and during it, by torch's CPU allocator.

``python benchmarks/in_backward.py [--width 512 --layers 8 --vocab 8000 --batch 4 --length 64]``
prints the table of docs/in_backward.md: a transformer, with all tensors counted, in the third step.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sketch_plugins import InBackward, registry
from sketch_plugins.memory.meter import AllocatorMeter

MB = 1e6
#: An optimizer of the extra "peers".
EIGHT_BITS = "AdamW 8-bit, bitsandbytes"
# (name, options, bfloat16 weights)
RUNS: list[tuple[str, dict[str, Any], bool]] = [
    ("AdamW", {}, False),
    *((name, {}, False) for name in registry.names()),
    ("AdamW", {}, True),
    ("cs_adam", {"stochastic_rounding": True}, True),
    ("cs_adam", {"stochastic_rounding": True, "preset": "lean"}, True),
]


class Model(torch.nn.Module):
    """A transformer with tied embeddings."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(args.vocab, args.width)
        layer = torch.nn.TransformerEncoderLayer(
            args.width, 8, 4 * args.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, args.layers, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of the next token."""
        logits = self.layers(self.embedding(tokens)) @ self.embedding.weight.t()
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def measure(name: str, options: dict[str, Any], half: bool, early: bool, args: argparse.Namespace) -> tuple[int, ...]:
    """Bytes: (weights, state, at the peak of a step), and the number of parameters."""
    torch.manual_seed(0)
    model = Model(args).to(torch.bfloat16 if half else torch.float32)
    if name == "AdamW":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    elif name == EIGHT_BITS:
        optimizer = importlib.import_module("bitsandbytes.optim").AdamW8bit(model.parameters(), lr=1e-4)
    else:
        optimizer = registry.get(name).cls(model.parameters(), lr=1e-4, chunk_size=args.chunk_size, **options)
    if early:
        InBackward(optimizer)
    tokens = torch.randint(0, args.vocab, (args.batch, args.length))

    def step() -> None:
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    weights = sum(p.nbytes for p in model.parameters())
    kept = sum(_bytes(state) for state in optimizer.state.values())
    meter = AllocatorMeter()
    meter.start()
    before = meter.live
    step()
    return weights, kept, meter.read() - before + weights + kept, sum(p.numel() for p in model.parameters())


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 512), ("layers", 8), ("vocab", 8000), ("batch", 4), ("length", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk-size", type=int, default=1 << 16, help="numbers of a tile of a step (0: the default)")
    args = parser.parse_args()
    table = Table(title=f"MB of a training step: {vars(args)}")
    for heading in ("optimizer", "weights", "state", "peak", "B/param", "peak, in backward", "B/param"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, options, half in RUNS:
        weights, kept, peak, params = measure(name, options, half, False, args)
        given = "".join(f", {key}={value}" for key, value in options.items())
        row = [f"{name}{given}{', bf16' if half else ''}", *(f"{n / MB:.1f}" for n in (weights, kept, peak))]
        row.append(f"{peak / params:.2f}")
        if name != "AdamW":
            _, _, early, _ = measure(name, options, half, True, args)
            row += [f"{early / MB:.1f}", f"{early / params:.2f}"]
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

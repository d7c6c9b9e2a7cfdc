"""Compare `sketch-plugins plan` with the count of torch's CPU allocator, for real models and real steps.

    python benchmarks/plan_check.py                  # all, about ten minutes and 4 GB on one core
    python benchmarks/plan_check.py --only small     # without BERT-base

Every run builds the model while the meter records, takes two steps and compares the peak with the plan's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import platform
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

from sketch_plugins.memory.meter import AllocatorMeter
from sketch_plugins.memory.plan import plan
from sketch_plugins.memory.plan_checks import PRECISIONS
from sketch_plugins.memory.plan_optimizers import choices
from sketch_transformers.planning import HuggingFaceModel

SMALL = {
    "bert-small": BertConfig(
        num_hidden_layers=4, hidden_size=256, num_attention_heads=4, intermediate_size=1024, vocab_size=8000
    ),
    "gpt2-small": GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=8000, bos_token_id=0, eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    ),
    "llama-small": LlamaConfig(
        num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=688,
        vocab_size=8000, architectures=["LlamaForCausalLM"],
    ),
    "t5-small-ish": T5Config(num_layers=3, d_model=256, d_ff=1024, num_heads=4, vocab_size=8000),
}  # fmt: skip
SMALL["bert-small"].architectures = ["BertForMaskedLM"]
#: model, optimizer, precision, gradient checkpointing, batch, sequence
RUNS = [
    ("bert-small", "adamw", "fp32", False, 8, 128),
    ("bert-small", "adamw_foreach", "fp32", False, 1, 32),
    ("bert-small", "cs_adam", "fp32", False, 8, 128),
    ("bert-small", "cs_adam", "bf16", False, 8, 128),
    ("bert-small", "cs_adam", "bf16-mixed", True, 8, 128),
    ("bert-small", "sm3", "fp32", True, 8, 128),
    ("bert-small", "sketchy", "fp32", False, 2, 64),
    ("bert-small", "adafactor", "bf16-mixed", False, 8, 128),
    ("gpt2-small", "adamw", "bf16", True, 8, 128),
    ("gpt2-small", "cs_adam:preset=lean", "fp32", False, 8, 128),
    ("gpt2-small", "cs_momentum", "bf16-mixed", False, 4, 128),
    ("gpt2-small", "cs_adagrad", "bf16", False, 4, 128),
    ("llama-small", "adamw", "bf16-mixed", False, 4, 128),
    ("llama-small", "cs_rmsprop", "bf16", True, 4, 128),
    ("llama-small", "cs_adam:fused=false", "fp32", False, 1, 32),
    ("t5-small-ish", "adamw", "fp32", False, 4, 64),
    ("t5-small-ish", "cs_adam", "bf16-mixed", False, 4, 64),
    ("bert-base-uncased", "adamw", "fp32", False, 2, 64),
    ("bert-base-uncased", "cs_adam", "fp32", False, 2, 64),
    ("bert-base-uncased", "cs_adam:preset=lean", "bf16", True, 2, 64),
]


def measure(model: HuggingFaceModel, optimizer: str, precision: str, batch: int) -> int:
    (choice,) = choices(optimizer, precision)
    dtype, autocast = PRECISIONS[precision]
    meter = AllocatorMeter()
    meter.start()
    module = model.build().train().to(dtype)
    one = choice.build(list(module.parameters()), cuda=False)
    given = model.sample(batch)
    for _ in range(2):
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            loss = model.loss(module, given)
        loss.backward()
        del loss
        one.step()
        one.zero_grad()
    return meter.read() - meter.live


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["small", "all"], default="all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan_check.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    hardware = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = []
    for name, optimizer, precision, checkpointing, batch, length in RUNS:
        if arguments.only == "small" and name not in SMALL:
            continue
        model = HuggingFaceModel(SMALL.get(name, name), None, length, checkpointing)
        found = plan(
            SMALL.get(name, name),
            batch_size=batch,
            seq_len=length,
            precision=precision,
            optimizers=optimizer,
            gradient_checkpointing=checkpointing,
            device="cpu",
        )
        planned, seen = found.rows[0].peak, measure(model, optimizer, precision, batch)
        rows.append(
            {
                "model": name,
                "parameters": found.params,
                "optimizer": optimizer,
                "precision": precision,
                "gradient_checkpointing": checkpointing,
                "batch": batch,
                "seq_len": length,
                "peak_in": found.rows[0].when,
                "planned_bytes": planned,
                "measured_bytes": seen,
                "error_percent": f"{100 * (planned / seen - 1):.3f}",
                "hardware": hardware,
            }
        )
        print(f"{name} {optimizer} {precision}: {rows[-1]['error_percent']} %", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    table = Table(title=f"peak, planned and measured; {hardware}")
    for key in (
        "model",
        "optimizer",
        "precision",
        "batch",
        "seq_len",
        "planned_bytes",
        "measured_bytes",
        "error_percent",
    ):
        table.add_column(key.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[column.header.replace(" ", "_")]) for column in table.columns))
    Console().print(table)


if __name__ == "__main__":
    main()

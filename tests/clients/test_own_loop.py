"""A script in the style of accelerate's nlp_example, which builds torch's AdamW itself and does not name us."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import CS_ADAM, OPTIONS, TORCHRUN, bert, needs, trained

needs("accelerate")
needs("transformers")

SCRIPT = """
import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup
from transformers.optimization import Adafactor


def data(tokenizer):
    words = list(tokenizer.get_vocab())[5:]
    lines = [" ".join(words[(start + step) % len(words)] for step in range(6)) for start in range(16)]
    encoded = tokenizer(lines, padding="max_length", max_length=8, truncation=True)
    return [
        {**{key: torch.tensor(encoded[key][row]) for key in ("input_ids", "attention_mask")}, "labels": row % 2}
        for row in range(16)
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--adafactor", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu, gradient_accumulation_steps=2)
    set_seed(42)
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForSequenceClassification.from_pretrained("model", num_labels=2)
    loader = DataLoader(data(tokenizer), shuffle=True, batch_size=2)
    if args.adafactor:
        optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    else:
        optimizer = AdamW(params=model.parameters(), lr=2e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 100)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for _, batch in zip(range(4), loader):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    accelerator.end_training()


if __name__ == "__main__":
    main()
"""
OPTIM = ("--optim", "cs_adam", "--optim-args", OPTIONS)


@pytest.fixture
def script(tmp_path, write):
    bert(tmp_path / "model")
    return write("train.py", SCRIPT)


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two"])
def test_our_optimizer_takes_the_place_of_its_adamw(launcher, script, client):
    ran = client(*OPTIM, *launcher, script, "--cpu")
    trained(ran, processes=1 + len(launcher) // 4)
    assert ran.output.count("INFO sketch-plugins run: replaced AdamW by CSAdam(lr=") == 1


def test_without_the_option_it_is_adamw_and_the_run_says_so(script, client):
    ran = client(script, "--cpu")
    assert ran.status == 0, ran.output[-6000:]
    assert {step["optimizer"] for step in ran.steps} == {"torch.optim.adamw.AdamW"} and CS_ADAM not in ran.output
    # Two moments of 4 bytes, and a step of 4 bytes for each tensor.
    assert ran.steps[-1]["bytes"] > 8 * ran.steps[-1]["weights"]
    assert "WARNING sketch-plugins run: no optimizer of sketch-plugins was built, only AdamW" in ran.output


def test_what_has_no_counterpart_is_named_in_the_processes_of_a_launcher(script, client):
    ran = client(*OPTIM, *TORCHRUN, script, "--cpu", "--adafactor")
    assert ran.status != 0 and not ran.steps
    assert "transformers.optimization.Adafactor has no sketched counterpart" in ran.output

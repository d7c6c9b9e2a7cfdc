"""PEFT's adapters in a script with Trainer, as PEFT's own examples have it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import OURS, TORCHRUN, TRAINING, llama, needs, trained

needs("peft")
needs("transformers")

SCRIPT = """
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained("model")
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    model = get_peft_model(model, lora)
    rows = torch.arange(16 * 16).reshape(16, 16) % 64
    Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path, write):
    llama(tmp_path / "model")
    return write("train.py", SCRIPT)


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two"])
def test_adapters(launcher, script, client):
    # Two layers with two modules; for each of them A is 8 x 32 and B is 32 x 8.
    for step in trained(client(*launcher, script, *TRAINING, *OURS), processes=1 + len(launcher) // 4):
        assert step["weights"] == 2 * 2 * 2 * 8 * 32


def test_adapters_too_small_for_a_sketch_save_nothing_and_the_log_says_so(script, client):
    ran = client(script, *TRAINING, "--optim", "cs_adam", "--optim_args", "min_compress_size=512")
    trained(ran, processes=1, compression=0.05, share=1.01)  # and a counter of steps
    assert ran.steps[-1]["bytes"] >= 8 * ran.steps[-1]["weights"]
    (line,) = [line for line in ran.output.splitlines() if "bytes" in line and "AdamW" in line and "CSAdam" in line]
    assert "0 %" in line or "0.0 %" in line, line

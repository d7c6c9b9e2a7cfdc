"""TRL's supervised finetuning by its own command, which starts Python through accelerate's launcher; also with LoRA."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import OURS, TORCHRUN, TRAINING, llama, needs, rows, texts, trained

needs("trl")
needs("peft")

SFT = ("--model_name_or_path", "model", "--dataset_name", "data", "--max_length", "16", *TRAINING)
LORA = ("--use_peft", "--lora_r", "8", "--lora_target_modules", "q_proj", "v_proj", "up_proj")


@pytest.fixture
def made(tmp_path):
    llama(tmp_path / "model")
    rows(tmp_path / "data" / "train.jsonl", text=texts())


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("lora", [(), LORA], ids=["all weights", "LoRA"])
def test_the_command(lora, client):
    trained(client("trl", "sft", *SFT, *lora, *OURS), processes=1)


@pytest.mark.usefixtures("made")
def test_two_processes(client):
    trained(client(*TORCHRUN, "-m", "trl.scripts.sft", *SFT, *LORA, *OURS), processes=2)


@pytest.mark.usefixtures("made")
def test_what_has_no_counterpart_is_named(client):
    ran = client("--optim", "cs_adam", "trl", "sft", *SFT, "--optim", "adafactor")
    assert ran.status != 0 and not ran.steps
    assert "Adafactor has no sketched counterpart" in ran.output

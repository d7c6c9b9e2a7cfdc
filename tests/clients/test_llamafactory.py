"""LLaMA-Factory by its command and a configuration; with two processes the command starts torchrun with itself."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import OPTIONS, llama, needs, texts, trained

needs("llamafactory")

CONFIGURATION = {
    "model_name_or_path": "model", "stage": "sft", "do_train": True, "template": "empty", "dataset_dir": "data",
    "dataset": "tiny", "cutoff_len": 16, "output_dir": "out", "per_device_train_batch_size": 2, "max_steps": 2,
    "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", "use_cpu": True, "overwrite_cache": True,
    "optim": "cs_adam", "optim_args": OPTIONS,
}  # fmt: skip


@pytest.fixture
def configured(tmp_path):
    """``configured(...)``: a configuration of LLaMA-Factory's, with a model and a data set of its own."""
    llama(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"instruction": text, "input": "", "output": text} for text in texts()]
    (tmp_path / "data" / "tiny.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))

    def write(**options):
        (tmp_path / "train.json").write_text(json.dumps({**CONFIGURATION, **options}))
        return "train.json"

    return write


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_command(tuning, configured, client):
    options = {"lora_rank": 8, "lora_target": "q_proj,v_proj,up_proj"} if tuning == "lora" else {}
    trained(client("llamafactory-cli", "train", configured(finetuning_type=tuning, **options)), processes=1)


def test_two_processes(configured, client):
    env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    trained(client("llamafactory-cli", "train", configured(finetuning_type="full"), env=env), processes=2)

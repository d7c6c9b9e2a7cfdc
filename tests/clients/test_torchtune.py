"""torchtune's recipe by its own command: our optimizer as a component, and as a replacement of its AdamW.

One process only: torchtune 0.6.1's recipes for several processes ask for the memory of a GPU (`get_memory_stats`) with
any optimizer, and fail without one.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import OPTIONS, needs, trained

needs("torchtune")

# A user's own model, data and tokenizer for a recipe: components that a configuration names.
PARTS = """
import torch


class Tokenizer:
    pad_id = 0


class Rows(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(1, 64, (16, 16), generator=generator).tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index], "labels": self.rows[index]}
"""
CONFIGURATION = """
output_dir: out
model: {_component_: torchtune.models.llama2.llama2, vocab_size: 64, num_layers: 2, num_heads: 2, num_kv_heads: 2,
        embed_dim: 32, max_seq_len: 32}
tokenizer: {_component_: parts.Tokenizer}
dataset: {_component_: parts.Rows}
checkpointer: {_component_: torchtune.training.FullModelTorchTuneCheckpointer, checkpoint_dir: weights,
               checkpoint_files: [model.pt], output_dir: out, model_type: LLAMA2}
resume_from_checkpoint: false
optimizer: {_component_: torch.optim.AdamW, lr: 1e-3}
optimizer_in_bwd: false
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
seed: 0
shuffle: false
batch_size: 2
epochs: 1
max_steps_per_epoch: 2
gradient_accumulation_steps: 1
compile: false
device: cpu
dtype: fp32
enable_activation_checkpointing: false
enable_activation_offloading: false
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: out/logs}
"""
OURS = ("optimizer._component_=sketch_plugins.CSAdam", *(f"optimizer.{option}" for option in OPTIONS.split(",")))


@pytest.fixture
def recipe(tmp_path, write):
    """The first words of a command that trains in one process."""
    import torch
    from torchtune.models.llama2 import llama2

    write("parts.py", PARTS), write("tiny.yaml", CONFIGURATION)
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    model = llama2(vocab_size=64, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=32, max_seq_len=32)
    torch.save(model.state_dict(), tmp_path / "weights" / "model.pt")
    return ("tune", "run", "full_finetune_single_device", "--config", "tiny.yaml")


def test_a_component(recipe, client):
    trained(client(*recipe, *OURS), processes=1)


def test_in_the_place_of_adamw(recipe, client):
    ran = client("--optim", "cs_adam", "--optim-args", OPTIONS, *recipe)
    trained(ran, processes=1)
    assert ran.output.count("replaced AdamW by CSAdam(lr=0.001, compression=0.25") == 1

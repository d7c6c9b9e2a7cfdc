"""The trainer of sentence-transformers, which is one of transformers' with a batch and losses of its own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from programs import OURS, TORCHRUN, TRAINING, bert, needs, rows, texts, trained

needs("sentence-transformers")
needs("datasets")

SCRIPT = """
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser


def main():
    (args,) = HfArgumentParser(SentenceTransformerTrainingArguments).parse_args_into_dataclasses()
    model = SentenceTransformer("model", device="cpu")
    data = load_dataset("data", split="train")
    SentenceTransformerTrainer(model, args, train_dataset=data, loss=MultipleNegativesRankingLoss(model)).train()


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def script(tmp_path, write):
    bert(tmp_path / "model")  # mean pooling is put on top of it
    rows(tmp_path / "data" / "train.jsonl", anchor=texts(), positive=texts()[::-1])
    return write("train.py", SCRIPT)


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two"])
def test_the_trainer(launcher, script, client):
    trained(client(*launcher, script, *TRAINING, *OURS), processes=1 + len(launcher) // 4)

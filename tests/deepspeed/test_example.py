"""examples/deepspeed_lm.py as a user starts it, with each of its configurations, at tiny sizes on two processes."""

import json
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

for package in ("transformers", "tokenizers"):
    pytest.importorskip(package, reason="the examples need the extra `demo`")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_language_model(stage, launch_ranks, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(40) for m in range(40)))
    size = ("--dim", 32, "--layers", 1, "--vocab", 300, "--steps", 4, "--seq-len", 32)
    config = ("--deepspeed_config", EXAMPLES / "deepspeed" / f"stage{stage}.json")
    said = launch_ranks(
        EXAMPLES / "deepspeed_lm.py",
        "--quick",
        "--text",
        text,
        "--out",
        tmp_path,
        *config,
        *size,
        env={"COLUMNS": "120"},
    )[0]
    adamw, ours = json.loads((tmp_path / "results.json").read_text())
    assert (adamw["label"], ours["label"]) == ("AdamW", "cs_adam")
    assert f"ZeRO-{stage}, 2 processes, 4 steps" in said
    for run in (adamw, ours):
        assert math.isfinite(run["eval_loss"]) and f"{run['eval_loss']:.4f}" in said
    # Two moments of 4 bytes for half of the parameters of GPT-2's two embeddings and a layer.
    elements = 300 * 32 + 32 * 32 + 12 * 32 * 32 + 13 * 32 + 2 * 32
    assert adamw["state_bytes_per_rank"] == pytest.approx(8 * elements / 2, rel=0.05)
    assert ours["state_bytes_per_rank"] < 0.6 * adamw["state_bytes_per_rank"]  # small matrices are kept exactly

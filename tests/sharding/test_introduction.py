"""The line of the first step where parameters are spread over ranks: of the first rank, with its own bytes, once."""

import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("introduction_worker.py")


@pytest.mark.parametrize("kind", ["fsdp2", "1", "3"])
def test_the_first_rank_speaks_for_itself(kind, launch_ranks):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    first, second = launch_ranks(SCRIPT, kind)
    said = re.findall(r"LOG (CSAdam: .*)", first)
    assert len(said) == 1, first[-3000:]
    (params,) = re.findall(r"RANK 0 PARAMS ([\d,]+)", first)
    assert f"for {params} parameters on this rank" in said[0]
    assert "LOG CSAdam" not in second

"""The line of the first step if parameters are spread over ranks: the first rank logs it once, with its own bytes."""

import importlib.util
import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("introduction_worker.py")


@pytest.fixture(scope="module")
def outputs(launch_ranks):
    """The output of each kind on both ranks. All share one launch, because it takes longer than the rest."""
    stages = ("1", "3") if importlib.util.find_spec("deepspeed") else ()
    said = [re.split(r"^KIND (\S+)\n", output, flags=re.M)[1:] for output in launch_ranks(SCRIPT, "fsdp2", *stages)]
    return [dict(zip(parts[::2], parts[1::2], strict=True)) for parts in said]


@pytest.mark.parametrize("kind", ["fsdp2", "1", "3"])
def test_the_first_rank_speaks_for_itself(kind, outputs):
    if kind != "fsdp2":
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    first, second = (of[kind] for of in outputs)
    said = re.findall(r"LOG (CSAdam: .*)", first)
    assert len(said) == 1, first[-3000:]
    (params,) = re.findall(r"RANK 0 PARAMS ([\d,]+)", first)
    assert f"for {params} parameters on this rank" in said[0]
    assert "LOG CSAdam" not in second

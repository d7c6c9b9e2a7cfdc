"""The commands of pages that take many seconds, or start several processes: `make slow` runs them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from runs import RUNS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the pages' commands are for a Unix shell")


@pytest.mark.parametrize("text", [text for text, run in RUNS.items() if run.long])
def test_a_long_command_runs(text, run):
    run(text, RUNS[text])

"""The tests in tiers: every test of `make quick` exists, and the files that take longest start first."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = (ROOT / "tests" / "quick.txt").read_text().splitlines()
LONGEST = (ROOT / "tests" / "longest.txt").read_text().splitlines()
SLOW = (ROOT / "tests" / "slow.txt").read_text().splitlines()


@pytest.mark.parametrize("line", [*QUICK, *LONGEST, *SLOW])
def test_every_listed_file_and_test_exists(line):
    """pytest ends with an error if one is missing; this test reports it in the whole suite, too."""
    path, _, function = line.partition("::")
    assert (ROOT / path).is_file(), f"{path} is listed in tests/quick.txt or tests/longest.txt, and is not there"
    if function:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), f"{line} is not there"


def test_no_slow_file_is_quick():
    assert not {line.partition("::")[0] for line in QUICK} & set(SLOW) and len(set(SLOW)) == len(SLOW)


def test_lists_name_each_once():
    assert len(set(QUICK)) == len(QUICK) and len(set(LONGEST)) == len(LONGEST)
    assert all(line.startswith("tests/") for line in [*QUICK, *LONGEST])


def test_quick_has_something_of_every_part():
    """Mathematics, stores, options, and each framework in one process."""
    parts = {Path(line.partition("::")[0]).parts[1] for line in QUICK}
    assert parts >= {
        "linalg",
        "stores",
        "optim",
        "kernels",
        "transformers",
        "lightning",
        "deepspeed",
        "test_one_process.py",
    }

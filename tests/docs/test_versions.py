"""The versions that the documentation, pyproject.toml and the classifiers name."""

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


@pytest.mark.parametrize("package", ["transformers", "accelerate", "deepspeed", "lightning"])
def test_the_newest_version_that_the_tests_ran_with_is_named(package):
    """Older ones (a row of another environment) are not all in the list; a newer one has to be added to it."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    text = ROOT.joinpath("docs", f"{package}.md").read_text()
    (said,) = re.findall(rf"Tested with {package} ((?:and |, )?[\d., and]+)", text, re.IGNORECASE)
    newest = max(map(numbers, re.findall(r"\d+\.\d+(?:\.\d+)?", said)))
    assert numbers(installed)[: len(newest)] <= newest, f"docs/{package}.md: Tested with {package} {said}"

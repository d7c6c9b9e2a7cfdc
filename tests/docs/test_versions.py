"""The versions that the documentation, pyproject.toml and the classifiers name."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML by itself")

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


def project():
    return tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("package", ["transformers", "accelerate", "deepspeed"])
def test_the_oldest_version_in_the_documentation_is_that_of_the_extra(package):
    (bound,) = [one for one in project()["optional-dependencies"][package] if one.startswith(f"{package}>=")]
    text = ROOT.joinpath("docs", f"{package}.md").read_text()
    assert re.search(rf"needs\s+{package} >= {re.escape(bound.partition('>=')[2])}\b(?!\.\d)", text), bound


def test_every_extra_has_the_same_bounds():
    """accelerate is in two of them, DeepSpeed and Lightning in `dev`, too."""
    bounds = {}
    for one in (extra for extras in project()["optional-dependencies"].values() for extra in extras):
        name, at_least, bound = re.split(r"[;\[]", one)[0].partition(">=")
        if at_least:
            assert bounds.setdefault(name, bound.split(",")[0].strip()) == bound.split(",")[0].strip(), one


def test_the_workflow_runs_on_pythons_that_the_package_says_it_supports():
    said = {one.rpartition(" ")[2] for one in project()["classifiers"] if "Python :: 3." in one}
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in said
    assert min(said, key=numbers) == project()["requires-python"].removeprefix(">=")
    jobs = yaml.safe_load(ROOT.joinpath(".github", "workflows", "ci.yml").read_text())["jobs"]
    ran = jobs["quick"]["strategy"]["matrix"]["python-version"]
    assert len(ran) == 3 and {*ran} <= said and {min(said, key=numbers), max(said, key=numbers)} <= {*ran}
    assert [step["run"] for job in ("lint", "quick", "whole") for step in jobs[job]["steps"] if "run" in step] == [
        "make lint", "make quick", "bash .ci/run", "make slow",
    ]  # fmt: skip


def test_the_last_line_of_make_help_names_all_that_is_handed_on():
    """Every ``..._ARGS`` of the Makefile."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    handed_on = set(re.findall(r"^(\w+_ARGS) \?=", ROOT.joinpath("Makefile").read_text(), re.MULTILINE))
    assert handed_on == set(re.findall(r"\w+_ARGS", said.strip().splitlines()[-1]))


def test_a_start_without_numpy_is_not_what_the_package_installs():
    """torch warns on every start without NumPy, so it is a dependency, beside torch, rich and the command line's."""
    assert {re.split(r"[>=]", one)[0] for one in project()["dependencies"]} == {
        "torch",
        "numpy",
        "rich",
        "rich-argparse",
        "shtab",
        "typing_extensions",
    }

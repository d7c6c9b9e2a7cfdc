"""The list of versions against pyproject.toml and docs/versions.md, and the rows of `make matrix` and their table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import rows
import versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML by itself")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
PAGE = ROOT.joinpath("docs", "versions.md").read_text()


def numbers(version):
    return tuple(int(part) for part in version.split("."))


def test_the_bounds_of_pyproject_are_the_oldest_versions():
    asked = PROJECT["dependencies"] + [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    bounds = dict(re.findall(r"^([a-z]+)>=([\d.]+)", "\n".join(asked), re.MULTILINE))
    assert {name: bounds.get(name) for name in versions.PACKAGES} == {
        name: version.oldest for name, version in versions.PACKAGES.items()
    }
    # The list has every package that has a bound and is no development tool.
    frameworks = {"transformers", "accelerate", "lightning", "deepspeed", "cpu"}
    held = {re.split(r"[\[>]", one)[0] for extra in frameworks for one in PROJECT["optional-dependencies"][extra]}
    assert {"torch", *held} <= set(versions.PACKAGES)


def test_the_page_has_the_same_list():
    table = dict(re.findall(r"^\| (\w+) \| ([\d.]+ \| [\d.]+) \|$", PAGE, re.MULTILINE))
    assert table == {name: f"{one.oldest} | {one.newest}" for name, one in versions.PACKAGES.items()}
    assert f"torch {versions.TORCH}" in PAGE
    *others, last = versions.PYTHONS
    assert f"Python {', '.join(others)} and {last}." in PAGE


def test_the_pythons_are_the_classifiers():
    said = {one.rpartition(" ")[2] for one in PROJECT["classifiers"] if "Python :: 3." in one}
    assert said == set(versions.PYTHONS) and PROJECT["requires-python"] == f">={versions.PYTHONS[0]}"


def test_the_makefile_installs_the_usual_torch():
    assert f"TORCH ?= torch=={versions.TORCH}\n" in ROOT.joinpath("Makefile").read_text()


def test_no_newest_version_is_older_than_the_oldest():
    for name, version in versions.PACKAGES.items():
        assert numbers(version.oldest) < numbers(version.newest), name


@pytest.mark.parametrize(("oldest", "pip"), [("2.6", "==2.6.*"), ("0.16.4", "==0.16.4")])
def test_pips_words_for_an_oldest_version(oldest, pip):
    assert versions.first_of(oldest) == pip


@pytest.mark.parametrize("script", ["matrix", "clients", "restricted"])
def test_every_row_is_listed_and_an_unknown_one_is_named(script):
    command = [sys.executable, str(ROOT / "tests" / script / "run.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names
    if script == "matrix":
        assert set(names) == set(re.findall(r"`((?:py3\.\d+)|oldest|frameworks|newest)`", PAGE))
    one = subprocess.run([*command, "--rows", names[-1]], capture_output=True, text=True, check=True)
    assert one.stdout == done.stdout.splitlines(keepends=True)[-1]
    done = subprocess.run([*command, "--rows", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and f"there is no row 'nonsense'; the rows are {', '.join(names)}" in done.stderr


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        ([rows.PASSED, rows.NOT_RUN], 0),
        ([rows.PASSED, rows.FAILED], 1),
        ([rows.NOT_RUN, rows.NOT_RUN], 1),  # nothing was tested
    ],
)
def test_the_table_and_the_exit_status(verdicts, status, monkeypatch, capsys):
    outcomes = dict(zip("ab", [rows.Outcome(verdict, f"because {verdict}") for verdict in verdicts], strict=True))
    monkeypatch.setattr(sys, "argv", ["run.py", "--", "-k", "x"])
    given = []

    def run(name, pytest):
        given.append(pytest)
        return outcomes[name]

    assert rows.main("rows", {"a": "the first", "b": "the second"}, run) == status
    assert given == [["-k", "x"]] * 2
    table = capsys.readouterr().out.splitlines()[-2:]
    for name, verdict, line in zip("ab", verdicts, table, strict=True):
        assert re.fullmatch(rf"{name} +{verdict} +\d+ s  because {verdict}", line)


def test_a_python_is_found_by_its_version():
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert rows.find_python(own) == sys.executable and rows.find_python("3.99") is None


def test_an_environment_is_made_once_and_pips_reason_is_told(tmp_path):
    """From this folder alone, without a package index."""
    (tmp_path / "empty").mkdir()
    nowhere = ["--no-index", "--find-links", str(tmp_path / "empty"), "sketch-plugins==99"]
    python = rows.environment(tmp_path / "venv", sys.executable, [])
    assert rows.installed(python, ("pip", "torch")).endswith("torch -")
    (tmp_path / "venv" / "left").touch()
    assert rows.environment(tmp_path / "venv", sys.executable, []) == python and (tmp_path / "venv" / "left").exists()
    with pytest.raises(rows.CannotInstall, match="No matching distribution found for sketch-plugins==99"):
        rows.environment(tmp_path / "venv", sys.executable, [nowhere])
    assert not (tmp_path / "venv" / "left").exists()  # other requirements get a new environment
    assert not (tmp_path / "venv" / "installed.txt").exists()  # it is tried again


def test_a_selection_without_a_test_is_no_pass(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    arguments = ["-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    assert rows.run_pytest(sys.executable, arguments).verdict == rows.PASSED
    verdict, said = rows.run_pytest(sys.executable, [*arguments, "-k", "nothing"])
    assert verdict == rows.FAILED and said.startswith("no test was run: ") and "1 deselected" in said

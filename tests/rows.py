"""Runs of pytest with a table at the end: code that `make restricted`, `make matrix` and `make clients` share.

A row is one run of pytest, in an environment of its own or with a change to this one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


class Outcome(NamedTuple):
    """The end of a row: `PASSED`, `FAILED` or `NOT_RUN`, and pytest's last line or the reason."""

    verdict: str
    said: str


class CannotInstall(Exception):
    """pip did not install the packages of a row; the text is pip's own reason."""


def main(description: str, rows: Mapping[str, str], run: Callable[[str, list[str]], Outcome]) -> int:
    """The command line of a script with rows; returns the exit status.

    It is 1 if a row failed, and if no row could run, because then nothing was tested.

    Args:
        description: description of the script, for ``--help``.
        rows: description of each row, by its name.
        run: runs the row of a name with arguments for pytest.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", default=",".join(rows), help="names of rows, with commas between them; all of them")
    parser.add_argument("--list", action="store_true", help="list the rows, and run nothing")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    arguments = parser.parse_args()
    names = arguments.rows.split(",")
    for name in names:
        if name not in rows:
            parser.error(f"there is no row {name!r}; the rows are {', '.join(rows)}")
    width = max(map(len, rows)) + 2
    if arguments.list:
        for name in names:
            print(f"{name:{width}}{rows[name]}")
        return 0
    outcomes, lines = [], []
    for name in names:
        print(f"\n==> {name}: {rows[name]}", flush=True)
        start = time.monotonic()
        outcome = run(name, arguments.pytest)
        outcomes.append(outcome.verdict)
        lines.append(f"{name:{width}}{outcome.verdict:8}{time.monotonic() - start:7.0f} s  {outcome.said}")
    print("\n" + "\n".join(lines))
    return 0 if FAILED not in outcomes and PASSED in outcomes else 1


def run_pytest(python: str | Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run pytest, show its output, and keep its last line."""
    command = [str(python), "-m", "pytest", *arguments]
    env = {**os.environ, **(environment or {})}
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:  # fmt: skip
        last = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if re.search(r"\d+ (passed|failed|skipped|deselected|errors?)\b.* in ", line):
                last = line.strip(" =\n")
    if process.returncode == 5:  # pytest's own status for this
        return Outcome(FAILED, f"no test was run: {last}")
    return Outcome(FAILED if process.returncode else PASSED, last or f"pytest ended with {process.returncode}")


def find_python(version: str) -> str | None:
    """A Python of a version, ``"3.12"``: the one that runs this, one on PATH, or one that pyenv has installed."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    candidates = [shutil.which(f"python{version}")]
    for root in (os.environ.get("PYENV_ROOT"), Path.home() / ".pyenv"):
        if root:
            # Pre-releases such as "3.14-dev" and "3.14.0rc1" do not count.
            found = [path for path in Path(root, "versions").glob(f"{version}.*") if re.fullmatch(r"[\d.]+", path.name)]
            newest = sorted(found, key=lambda path: [int(part) for part in path.name.split(".")], reverse=True)
            candidates += [str(path / "bin" / "python") for path in newest]
    for candidate in candidates:
        # pyenv puts a command on PATH also for versions that are not activated; it only prints an error.
        if candidate and _says(candidate, "import sys; print('%d.%d' % sys.version_info[:2])") == version:
            return candidate
    return None


def environment(folder: Path, python: str, requirements: Sequence[Sequence[str]], minutes: float = 60) -> Path:
    """A virtual environment with packages in it; returns its Python. An existing one with these packages is used again.

    Args:
        folder: folder of the environment.
        python: interpreter that makes it.
        requirements: arguments of ``pip install``, for one call after the other.
        minutes: pip is stopped after this time.

    Raises:
        CannotInstall: pip failed, or took too long.
    """
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "installed.txt"
    # The project's own requirements are part of it.
    wanted = "\n".join([" ".join(call) for call in requirements] + [ROOT.joinpath("pyproject.toml").read_text()])
    if stamp.exists() and stamp.read_text() == wanted:
        return inside
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    end = time.monotonic() + 60 * minutes
    for call in requirements:
        command = [str(inside), "-m", "pip", "install", "--progress-bar", "off", *call]
        print(f"pip install {' '.join(call)}", flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=max(end - time.monotonic(), 1)
            )
        except subprocess.TimeoutExpired:
            raise CannotInstall(f"pip install {' '.join(call)} took more than {minutes:g} minutes") from None
        if done.returncode:
            print(done.stdout[-2000:] + done.stderr[-4000:], flush=True)
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
            raise CannotInstall(f"pip: {errors[-1].removeprefix('ERROR: ') if errors else done.stderr[-200:]}")
    stamp.write_text(wanted)
    return inside


def installed(python: str | Path, packages: Sequence[str]) -> str:
    """``"torch 2.13.0, triton -"``: the versions of some packages in an environment."""
    look = (
        "import importlib.metadata as m, sys\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return '-'\n"
        "print(', '.join(f'{name} {version(name)}' for name in sys.argv[1:]))"
    )
    return _says(python, look, *packages) or "unknown versions"


def _says(python: str | Path, code: str, *arguments: str) -> str | None:
    """The output of a Python; None if it does not run."""
    try:
        done = subprocess.run([str(python), "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

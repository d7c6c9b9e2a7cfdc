"""The quick tests on every Python, with the oldest and the newest supported versions. ``make matrix`` runs it.

    python tests/matrix/run.py [--rows NAME,NAME] [--list] [-- PYTEST ARGUMENTS]

Each row makes an environment in ``.venv-matrix``, which stays for the next time, installs the tests' requirements, and
runs the tests of `tests/quick.txt`. A row whose Python is not installed does not run. A row whose versions cannot be
installed has failed, because users could not install them either. MATRIX_MINUTES limits the installation of a row.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows
from versions import PACKAGES, PYTHONS, TORCH, first_of


class Row(NamedTuple):
    python: str
    #: Packages with fixed versions, as pip's requirements; pip takes the newest version of all others.
    held: Mapping[str, str]


OLDEST = {name: first_of(versions.oldest) for name, versions in PACKAGES.items()}
ROWS = {
    "oldest": Row(PYTHONS[0], OLDEST),
    # With the usual torch, which is small if the package index has a build for CPUs: `.ci/run` has this row.
    "frameworks": Row(PYTHONS[1], {**{k: v for k, v in OLDEST.items() if k != "triton"}, "torch": f"=={TORCH}"}),
    **{f"py{python}": Row(python, {"torch": f"=={TORCH}"}) for python in PYTHONS},
    "newest": Row(PYTHONS[-1], {}),
}


def main() -> int:
    what = {
        name: f"Python {row.python}, {', '.join(f'{k}{v}' for k, v in row.held.items()) or 'the newest of everything'}"
        for name, row in ROWS.items()
    }
    return rows.main((__doc__ or "").splitlines()[0], what, run)


def run(name: str, pytest: list[str]) -> rows.Outcome:
    row = ROWS[name]
    python = rows.find_python(row.python)
    if python is None:
        return rows.Outcome(rows.NOT_RUN, f"Python {row.python} is neither on PATH nor among pyenv's versions")
    folder = rows.ROOT / ".venv-matrix" / name
    held = [f"{package}{how}" for package, how in row.held.items()]
    try:
        minutes = float(os.environ.get("MATRIX_MINUTES") or 60)
        # One call, so that pip sees all requirements together.
        inside = rows.environment(folder, python, [[*held, "-e", ".[dev]"]], minutes)
    except rows.CannotInstall as error:
        return rows.Outcome(rows.FAILED, f"cannot be installed: {error}")
    has = rows.installed(inside, tuple(PACKAGES))
    print(has, flush=True)
    # Another checkout on this variable would be tested instead of this one.
    outcome = rows.run_pytest(inside, ["@tests/quick.txt", *pytest], {"PYTHONPATH": ""})
    return outcome._replace(said=f"{outcome.said}; {has}")


if __name__ == "__main__":
    sys.exit(main())

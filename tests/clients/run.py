"""Other projects' programs, each in an environment with its requirements. ``make clients`` runs it.

    python tests/clients/run.py [--rows NAME,NAME] [--list] [-- PYTEST ARGUMENTS]

The variable TORCH sets the version of torch for all of them. An environment stays in ``.venv-clients``.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows

HERE = Path(__file__).resolve().parent
TORCH = os.environ.get("TORCH") or "torch==2.13.0"


class Row(NamedTuple):
    what: str
    packages: tuple[str, ...]
    #: Modules whose absence must not skip a test.
    modules: tuple[str, ...]
    files: tuple[str, ...]


ROWS = {
    "hugging-face": Row(
        "TRL, PEFT, sentence-transformers, a loop with accelerate",
        ("trl>=1.16,<2", "peft>=0.21", "sentence-transformers>=6.2"),
        ("trl", "peft", "sentence-transformers", "datasets", "transformers", "accelerate"),
        ("test_trl.py", "test_peft.py", "test_sentence_transformers.py", "test_own_loop.py"),
    ),
    # Newer versions of torchao lack names that torchtune 0.6.1 imports; older ones use names that torch 2.13 has
    # removed.
    "torchtune": Row(
        "torchtune's recipe",
        ("torchtune==0.6.1", "torchao==0.15.0"),
        ("torchtune",),
        ("test_torchtune.py",),
    ),
    # It pins NumPy (to a version that newer pyarrows refuse), transformers, TRL, PEFT and accelerate. 0.9.4 and 0.9.5
    # import torchaudio, whose newest release, 2.11.1, is built for torch 2.11.
    "llamafactory": Row(
        "LLaMA-Factory, with the transformers that it allows",
        ("llamafactory==0.9.3", "pyarrow<20"),
        ("llamafactory",),
        ("test_llamafactory.py",),
    ),
}


def main() -> int:
    what = {name: f"{row.what}: {', '.join(row.packages)}" for name, row in ROWS.items()}
    return rows.main((__doc__ or "").splitlines()[0], what, run)


def run(name: str, pytest: list[str]) -> rows.Outcome:
    row = ROWS[name]
    own = [TORCH, "-e", ".[transformers,cpu]", "pytest>=8", *row.packages]
    try:
        # torch first and alone, as in the Makefile.
        python = rows.environment(rows.ROOT / ".venv-clients" / name, sys.executable, [[TORCH], own])
    except rows.CannotInstall as error:
        return rows.Outcome(rows.FAILED, f"not run: {error}")
    print(rows.installed(python, ("torch", "transformers", *row.modules)), flush=True)
    # Another checkout on PYTHONPATH would be tested instead of this one.
    environment = {"CLIENTS_INSTALLED": ",".join(row.modules), "PYTHONPATH": ""}
    return rows.run_pytest(python, [*(str(HERE / file) for file in row.files), *pytest], environment)


if __name__ == "__main__":
    sys.exit(main())

"""The versions that this package supports, as in pyproject.toml and docs/versions.md."""

from __future__ import annotations

from typing import NamedTuple

#: The versions in pyproject.toml's classifiers.
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
#: The version that all tests run with, and that `make` installs.
TORCH = "2.13.0"


class Versions(NamedTuple):
    """The oldest supported version, as in pyproject.toml, and the newest one that the tests ran with."""

    oldest: str
    newest: str


PACKAGES = {
    "torch": Versions("2.6", "2.14.1"),
    "transformers": Versions("4.50", "5.24.0"),
    "accelerate": Versions("1.2", "1.15.0"),
    "lightning": Versions("2.4", "2.6.6"),
    "deepspeed": Versions("0.16.4", "0.19.8"),
    "numba": Versions("0.60", "0.68.1"),
    "triton": Versions("3.2", "3.9.0"),
}


def first_of(version: str) -> str:
    """pip's requirement for an oldest version: that release itself, or for "2.6" the last one of its series."""
    return f"=={version}" if version.count(".") == 2 else f"=={version}.*"

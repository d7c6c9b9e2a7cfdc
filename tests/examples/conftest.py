"""The examples are scripts, which find each other because they lie in one folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def launch():
    """``launch("script.py", world, *args)`` for a script of this folder."""
    spec = importlib.util.spec_from_file_location("sharding_launch", HERE / "launch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda script, world, *args, **kwargs: module.launch(HERE / script, world, *args, **kwargs)

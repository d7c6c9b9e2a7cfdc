import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from .interpreter import patch_once

# Triton decides at its import whether kernels are interpreted, and other libraries import it. Without a GPU they are
# interpreted here; tests that compile them do so in a process of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("sketch_plugins.kernels.gpu.launch")
            patch_once(importlib.import_module("triton.runtime.interpreter"))
        except ImportError:  # no Triton on this platform
            pass
    del os.environ["TRITON_INTERPRET"]  # otherwise fused=True on a CPU would mean the interpreter everywhere

from sketch_plugins import registry

ROOT = Path(__file__).parents[1]
LONGEST = {line: place for place, line in enumerate((ROOT / "tests" / "longest.txt").read_text().splitlines())}
SLOW = (ROOT / "tests" / "slow.txt").read_text().splitlines()


def pytest_collection_modifyitems(config, items):
    """Files that take minutes come first, because a long file that begins last would run alone on one of the cores.

    Files in `tests/slow.txt` are skipped unless SLOW is set (`make slow`), or the command line names them.
    """
    items.sort(key=lambda item: LONGEST.get(item.path.relative_to(ROOT).as_posix(), len(LONGEST)))
    named = [argument.partition("::")[0] for argument in config.args]
    left_out = set() if os.environ.get("SLOW") else {path for path in SLOW if not any(n.endswith(path) for n in named)}
    for item in items:
        if item.path.relative_to(ROOT).as_posix() in left_out:
            item.add_marker(pytest.mark.skip(reason="one of tests/slow.txt: make slow, or name the file"))


@pytest.fixture(params=registry.names())
def name(request):
    """Every optimizer of the registry, so that a new one gets these tests."""
    return request.param


@pytest.fixture
def write(tmp_path):
    """``write(name, source)``: a file in ``tmp_path``."""

    def to(name, source):
        (tmp_path / name).write_text(textwrap.dedent(source))
        return name

    return to


@pytest.fixture(scope="session")
def launch_ranks():
    """`launch_ranks(script, *arguments)` runs a script in two processes that find each other as under torchrun."""

    def run(script, *arguments, world=2, timeout=400, env=None):
        start = forked_ranks if sys.platform == "linux" and not torch.cuda.is_available() else ranks_of
        with start(script, arguments, world, env) as ranks:
            for rank, _ in ranks:
                rank.wait(timeout)
            outputs = [said(file) for _, file in ranks]
            for rank, _ in ranks:
                assert rank.returncode == 0, "\n".join(output[-5000:] for output in outputs)
        return outputs

    return run


@pytest.fixture(scope="session")
def kill_ranks():
    """`kill_ranks(which, sign, script, *arguments)` kills (SIGKILL) some of the ranks once the file `sign` exists.

    The others have to end by themselves, with an error.
    """

    def run(which, sign, script, *arguments, world=2, timeout=200, env=None):
        with ranks_of(script, arguments, world, env) as ranks:
            end = time.monotonic() + timeout
            while not sign.exists():
                ended = [said(file)[-5000:] for rank, file in ranks if rank.poll() is not None]
                assert not ended and time.monotonic() < end, ended or f"{sign} is missing after {timeout} s"
                time.sleep(0.02)
            sign.unlink()
            for rank in which:
                ranks[rank][0].kill()
            for number, (rank, file) in enumerate(ranks):
                code = rank.wait(timeout)
                assert code == -signal.SIGKILL if number in which else code != 0, said(file)[-5000:]

    return run


@contextlib.contextmanager
def ranks_of(script, arguments, world, env):
    """(process, file with its output) of each rank; ranks that still run at the end are killed."""
    command = [sys.executable, str(script), *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a rank that fills its pipe would wait while the other one is read.
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        shared = environment_of_ranks(world, env)
        ranks = [
            subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(files)
        ]
        try:
            yield list(zip(ranks, files, strict=True))
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


@contextlib.contextmanager
def forked_ranks(script, arguments, world, env):
    """Like `ranks_of`, but imports are made once for all ranks: see ranks.py. The process is the one that waits."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(world)]
        outputs = [file.fileno() for file in files]
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "ranks.py", ",".join(map(str, outputs)), script, *map(str, arguments)],
            env=environment_of_ranks(world, env),
            stdout=files[0],
            stderr=subprocess.STDOUT,
            pass_fds=outputs,
            start_new_session=True,
        )
        try:
            yield [(process, file) for file in files]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def environment_of_ranks(world, env):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **quiet, **shared, **(env or {})}


def said(file):
    file.seek(0)
    return file.read()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``once(name, action)``: the folder in which ``action(folder)`` was run, by one of xdist's workers for all."""

    def run(name, action, timeout=600):
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        try:
            folder.mkdir()
        except FileExistsError:  # another test has, or another worker is about to
            end = time.monotonic() + timeout
            while not (folder / "ended").exists() and time.monotonic() < end:
                time.sleep(0.1)
        else:
            try:
                action(folder)
            except BaseException as error:
                (folder / "ended").write_text(str(error) or repr(error))
                raise
            (folder / "ended").write_text("")
        said = (folder / "ended").read_text() if (folder / "ended").exists() else f"{name} did not end"
        if said:
            pytest.fail(said, pytrace=False)
        return folder

    return run


@pytest.fixture(scope="session", autouse=True)
def signals_arrive():
    """Some tests send signals, which ``nohup`` and a shell's ``&`` would make a process and its children ignore."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (getattr(signal, "SIGHUP", None), signal.SIG_DFL),
    ):
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def frozen_objects_thaw():
    """Unfreeze them at the end; otherwise libraries would report uncollected objects as leaks."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def garbage_of_this_file_only(frozen_objects_thaw):
    """The garbage collector skips modules and the objects of other files.

    Trainer, accelerate and Lightning collect garbage several times a run. This takes a third of a second with the
    600,000 objects of the frameworks that the tests import, and next to nothing without them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """Remove the group that Lightning and accelerate leave after training; the next file makes its own, or none."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


#: Variables that frameworks set in the environment of a process that they take for one of several.
_OF_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@pytest.fixture(autouse=True)
def one_process_again():
    """Undo changes of a test that made this process a rank; the next one would wait for others, or take its port."""
    before = {name: os.environ.get(name) for name in _OF_RANKS}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

"""A program sees under `run` what it sees under python: where it comes from, what is in `__main__`, how it ends."""

import os
import subprocess
import sys
import zipfile

import pytest

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
#: Everything that a program can ask about itself; addresses would differ.
LOOK = """
import builtins, sys
names = [name for name in globals() if name not in ("builtins", "sys")]
print(names, __builtins__ is builtins, __name__, __doc__, __package__, __file__, __cached__)
print(getattr(__spec__, "name", None), getattr(__spec__, "origin", None))
print(getattr(__loader__, "__name__", type(__loader__).__name__), sys.modules["__main__"].__dict__ is globals())
print(sys.argv, sys.path, repr(sys.stdin.read()))
sys.exit(3)
"""


@pytest.fixture
def both(tmp_path):
    """``both(*arguments)``: (status, stdout, stderr) of python and of `run`; ``stdin`` is what is piped to them."""

    def start(*arguments, stdin="", flags=()):
        got = []
        for command in ([], ["-m", "sketch_plugins", "run"]):
            done = subprocess.run(
                [sys.executable, *flags, *command, *map(str, arguments)],
                cwd=tmp_path,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=100,
            )
            got.append((done.returncode, done.stdout, done.stderr))
        return got

    return start


@POSIX
@pytest.mark.parametrize("path", ["/dev/stdin", "-"])
@pytest.mark.parametrize(
    ("source", "status"),
    [
        (LOOK, 3),
        ("def f():\n    raise OSError('theirs')\nf()\n", 1),
        ("print(1)\nx = (\n", 1),
        ("", 0),
    ],
    ids=["look", "error", "syntax", "empty"],
)
def test_a_script_that_comes_through_a_pipe(path, source, status, both):
    theirs, ours = both(path, "--help", stdin=source)
    if path != "-" and "x = (" in source:  # python looks for the faulty line in the pipe, which is empty by then
        theirs, ours = ((one[0], one[1], one[2].splitlines()[-1]) for one in (theirs, ours))
    assert ours == theirs and theirs[0] == status


@POSIX
def test_a_named_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "look.py").write_text(LOOK)
    theirs, ours = (
        subprocess.run(
            ["sh", "-c", f"cat look.py > pipe 2>&- & exec {sys.executable} {command} pipe x"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        for command in ("", "-m sketch_plugins run")
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (3, theirs.stdout, "") and "'pipe', 'x'" in ours.stdout


@POSIX
def test_python_without_stdin(tmp_path):
    """stdin is closed, so there is no program, and nothing happens."""
    for command in ("", "-m sketch_plugins run"):
        done = subprocess.run(
            ["sh", "-c", f"{sys.executable} {command} - <&-"], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("flags", [(), ("-P",)], ids=["plain", "-P"])
def test_scripts_modules_folders_and_zip_files_look_at_themselves(flags, both, tmp_path):
    if flags and sys.version_info < (3, 11):
        pytest.skip("python -P is of 3.11")
    (tmp_path / "pack").mkdir()
    (tmp_path / "look.py").write_text(LOOK)
    for name in ("__init__.py", "__main__.py", "part.py"):
        (tmp_path / "pack" / name).write_text("" if name == "__init__.py" else LOOK)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as made:
        made.writestr("__main__.py", LOOK)
    ways = [("look.py",), ("./look.py", "x"), ("pack",), ("all.zip",), ("./all.zip",), (tmp_path / "all.zip",)]
    if not flags:  # with -P there is no current directory on the path
        ways += [("-m", "look"), ("-m", "pack", "x"), ("-m", "pack.part")]
    for way in ways:
        theirs, ours = both(*way, flags=flags)
        assert ours == theirs and theirs[0] == 3, way


ENDS = {
    "interrupt": ("def f():\n    raise KeyboardInterrupt\nf()", None),
    "signal": ("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)", None),
    "base": ("class Own(BaseException):\n    pass\nraise Own('theirs')", 1),
    "generator": ("raise GeneratorExit", 1),
    "hook": (
        "import sys\nsys.excepthook = lambda *e: print(e[2].tb_lineno)\nraise KeyboardInterrupt",
        None,
    ),
    "chained": ("try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError(2) from e", 1),
    "exit": (
        "import atexit, sys\natexit.register(lambda: print(sys.excepthook is sys.__excepthook__))\nsys.exit('bye')",
        1,
    ),
}


@POSIX
@pytest.mark.parametrize("end", ENDS)
def test_ends_and_their_tracebacks(end, both, tmp_path):
    source, status = ENDS[end]
    (tmp_path / "end.py").write_text(source)
    theirs, ours = both("end.py")
    assert ours == theirs and (status is None or theirs[0] == status)
    assert theirs[2] or end == "hook"

"""``sketch-plugins run``: finds the program and runs it."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from typing import Any

from sketch_plugins import spelling
from sketch_plugins.running import children, watch
from sketch_plugins.running.program import STDIN, CannotRun, execute_as_main, find_module, find_script, is_zip

#: Exit status of a shell if a command does not exist.
NOT_FOUND = 127
#: Start of a Python script by pip if the path of the interpreter is too long for the first line, or has a space.
_LONG_PATH = re.compile(rb"""#!/bin/sh\n'''exec' ("[^"\n]*"|\S+)""")


def main(script: str, arguments: Sequence[str], module: bool, optim: str | None, optim_args: str | None) -> int:
    """Run a program and return its exit status.

    Python code is executed in this process: its ``SystemExit`` and its exceptions pass through. Any other command has a
    process of its own. Signals are passed on to it, and this process ends with its exit status or signal.

    Args:
        script: a file, directory or zip file, "-" for a script on stdin, or the name of a module or of a command.
        arguments: arguments of the program.
        module: whether ``script`` is the name of a module.
        optim: see ``sketch-plugins run --optim``; None: torch's optimizers are not replaced.
        optim_args: its options, as text.
    """
    if optim is not None:
        try:
            # The values of options are checked when the program imports torch, which `run` itself does not import.
            spelling.check_name(optim)
            spelling.split_options(optim_args)
        except ValueError as error:
            watch.refuse(optim, error)
            return 2
    settings = children.begin(optim, optim_args)
    # Functions run in the reverse order, so the program's own, which may still train, run before this one.
    atexit.register(watch.end, settings.optim)
    try:
        path = script if module else _path_of(script)
        if not module and _is_foreign(path, command=path != script):
            return _run_command([path, *arguments], settings.optim)
        program = (find_module if module else find_script)(path)
    except CannotRun as error:
        atexit.unregister(watch.end)  # no program has run
        print(f"{watch.PROGRAM}: {error}", file=sys.stderr)
        return error.status
    sys.argv = [program.argv0, *arguments]
    execute_as_main(program)
    return 0


def _path_of(script: str) -> str:
    """``script`` if it is a Python program or looks like a path, else the path of the command of that name.

    Commands of this Python's environment come before others of the same name, because the others' environments may lack
    this package.

    Raises:
        CannotRun: there is no such program and no such command.
    """
    if script == STDIN or os.path.isfile(os.path.join(script, "__main__.py")):
        return script
    if os.path.exists(script) and not os.path.isdir(script):  # pipes, too
        return script
    if os.path.dirname(script) or script.endswith((".py", ".pyz", ".zip")):
        return script  # the error is then that of a missing file
    places = [os.path.dirname(sys.executable), sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    found = shutil.which(script, path=os.pathsep.join(filter(None, places)))
    if found is not None:
        return found
    if os.path.isdir(script):
        return script
    raise CannotRun(
        f"there is no file {os.path.abspath(script)!r}, and no command {script!r} beside {sys.executable} "
        f"or on PATH. To run a module, use -m: {watch.PROGRAM} -m {script}",
        NOT_FOUND,
    )


def _is_foreign(path: str, command: bool) -> bool:
    """Whether this Python cannot execute ``path`` itself: it is for another interpreter, or not a script.

    A script whose first line names no interpreter is taken for Python, as by ``python script``. If its path was given,
    this Python executes it, even if its first line names another Python. If it was found as a ``command``, it belongs
    to the environment of the Python that its first line names.
    """
    # Directories are ours, and so are pipes (/dev/stdin, <(...)), which can be read only once: by `find_script`. A
    # missing file is the caller's error.
    if not os.path.isfile(path) or is_zip(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return False  # the caller opens it next and reports the error
    if not os.access(path, os.X_OK):
        return False
    if not start.startswith(b"#!"):
        return b"\0" in start
    long = _LONG_PATH.match(start)
    if long is not None:
        interpreter = os.fsdecode(long[1].strip(b'"'))
    else:
        words = os.fsdecode(start.partition(b"\n")[0][2:]).split()
        if words and os.path.basename(words[0]) == "env":
            words = words[1:]
        interpreter = words[0] if words else ""
    if not os.path.basename(interpreter).startswith("python"):
        return True
    if not command:
        return False
    # Another environment has other packages. In our own, interpreter options (-s, -E) are left out: with them the
    # integrations would not reach the command.
    own = os.path.realpath(os.path.dirname(sys.executable))
    return os.path.isabs(interpreter) and os.path.realpath(os.path.dirname(interpreter)) != own


def _run_command(command: list[str], optim: str | None) -> int:
    child: subprocess.Popen[Any] | None = None
    early: list[int] = []

    def handle(number: int, _: Any) -> None:
        if child is None:
            early.append(number)
        else:
            _pass_on(child, number)

    before = {}
    # Before the child is started: a signal in between would end this process, and leave the child running.
    for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT"):
        number = getattr(signal, name, None)
        # Ignored signals (nohup) stay ignored, also in the child, which would replace a handler by the default action.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handle)
    try:
        try:
            child = subprocess.Popen(command)
        except OSError as error:
            raise CannotRun(f"can't run {command[0]!r}: [Errno {error.errno}] {error.strerror}", 126) from None
        for number in early:
            _pass_on(child, number)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status >= 0:
        return status
    atexit.unregister(watch.end)
    watch.end(optim)
    return _die_of(-status)


def _pass_on(child: subprocess.Popen[Any], number: int) -> None:
    # A terminal sends these signals to all foreground processes, so the child has received it already.
    if number in (signal.SIGINT, getattr(signal, "SIGQUIT", None)) and _is_in_front():
        return
    child.send_signal(number)


def _is_in_front() -> bool:
    try:
        return os.tcgetpgrp(sys.__stdin__.fileno()) == os.getpgrp()  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):  # there is no terminal
        return False


def _die_of(number: int) -> int:
    """End by the signal that ended the command, so that the parent process sees it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has written its own core file
        signal.signal(number, signal.SIG_DFL)
    except (ImportError, OSError, ValueError):  # SIGKILL cannot have a handler
        pass
    sys.stdout.flush()
    os.kill(os.getpid(), number)
    return 128 + number

"""Find a program as python finds it, and execute it in this process as its ``__main__``."""

from __future__ import annotations

import builtins
import importlib.metadata
import importlib.util
import io
import os
import sys
import zipfile
from importlib.machinery import BuiltinImporter, ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import NamedTuple

#: The argument that stands for a script on stdin, as under python.
STDIN = "-"


class Program(NamedTuple):
    """A program to be executed."""

    code: CodeType | bytes  # compiled code, or the source of a script
    file: str
    argv0: str
    spec: ModuleSpec | None  # None for a plain script, as under python


class CannotRun(Exception):
    """The program does not exist or cannot be executed; ``status`` is the exit status for the shell."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def is_zip(path: str) -> bool:
    """Whether it is a zip file. Other things than files are not read, because a pipe can be read only once."""
    return os.path.isfile(path) and zipfile.is_zipfile(path)


def find_script(path: str) -> Program:
    """A Python file, a directory or zip file with a ``__main__.py``, or "-"; changes ``sys.path`` as python does.

    Raises:
        CannotRun: it cannot be read, or has no ``__main__.py``.
    """
    if path == STDIN:
        source = b"" if sys.stdin is None else sys.stdin.buffer.read()
        _replace_first_path("")
        return Program(source, "<stdin>", path, None)
    file = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)  # python keeps a "." within it, too
    if os.path.isdir(path) or is_zip(path):
        _replace_first_path(file, always=True)
        spec = PathFinder.find_spec("__main__", [file])
        if spec is None:
            raise CannotRun(f"can't find '__main__' module in {file!r}", status=1)
        return Program(_code_of(spec), spec.origin or file, path, spec)
    try:
        with io.open_code(file) as stream:
            source = stream.read()
    except OSError as error:
        raise CannotRun(f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}", status=2) from None
    _replace_first_path(os.path.dirname(_resolved(path)))
    return Program(source, file, path, None)


def _resolved(path: str) -> str:
    """``path`` without symbolic links; of a pipe, whose name in /proc leads nowhere, the path up to that name."""
    try:
        return os.path.realpath(path, strict=True)
    except OSError:
        return os.path.join(os.path.dirname(path), os.readlink(path)) if os.path.islink(path) else os.path.abspath(path)


def find_module(name: str) -> Program:
    """A module, as after ``python -m``; changes ``sys.path`` as python does.

    Raises:
        CannotRun: the module does not exist or cannot be executed.
    """
    # `python -m sketch_plugins` has put the current directory here, and the console command its own directory.
    _replace_first_path(os.getcwd())
    sys.argv = ["-m"]  # this is what a package sees while it is imported on the way to the module
    if name.startswith("."):
        raise CannotRun(f"relative module names are not supported: {name}", status=1)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise CannotRun(
                    f"{name!r} is a package without __main__, so it cannot be executed. {_instead_of(name)}", status=1
                )
    except ModuleNotFoundError as error:
        # If a package fails on one of its own imports, the user should see that traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    except ValueError as error:
        raise CannotRun(f"{name!r} is not the name of a module ({error})", status=1) from None
    if spec is None:
        raise CannotRun(f"No module named {name}", status=1)
    file = spec.origin or name
    return Program(_code_of(spec), file, file, spec)


def _instead_of(package: str) -> str:
    """A hint for a user who asked for a package that cannot be executed."""
    commands = sorted(
        {
            entry.name
            for entry in importlib.metadata.entry_points(group="console_scripts")
            if f"{entry.module}.".startswith(f"{package}.")
        }
    )
    if commands:
        return f"Run its command instead: sketch-plugins run {' or '.join(commands)}"
    return f"Run a module in it instead: sketch-plugins run -m {package}.MODULE"


def _code_of(spec: ModuleSpec) -> CodeType:
    get_code = getattr(spec.loader, "get_code", None)  # extension modules have no such method
    code: CodeType | None = None if get_code is None else get_code(spec.name)
    if code is None:
        raise CannotRun(f"no code object available for {spec.name}", status=1)
    return code


def execute_as_main(program: Program) -> None:
    """Execute ``program`` as the module ``__main__``, which stays in ``sys.modules`` afterwards.

    ``runpy`` would remove it again, and then threads, ``atexit`` functions and unpickling would not find it.
    """
    spec, file = program.spec, program.file
    module = ModuleType("__main__")
    names = module.__dict__
    names["__package__"] = spec.parent if spec else None
    names["__spec__"] = spec
    if spec is not None:
        names["__loader__"] = spec.loader
    else:
        names["__loader__"] = BuiltinImporter if program.argv0 == STDIN else SourceFileLoader("__main__", file)
    if sys.version_info < (3, 14):  # later Pythons have it in no module
        names["__annotations__"] = {}
    names["__builtins__"] = builtins  # exec would put its dictionary there
    names["__file__"] = file
    names["__cached__"] = spec.cached if spec else None
    sys.modules["__main__"] = module
    try:
        code = program.code
        if isinstance(code, bytes):
            code = compile(code, file, "exec", dont_inherit=True)
        exec(code, names)
    except SystemExit:  # it has no traceback
        raise
    except BaseException:
        _hide_own_frames()
        raise


def _hide_own_frames() -> None:
    """Start the traceback of an uncaught exception at the script's first frame."""
    hook = sys.excepthook  # the script may have set its own hook

    def excepthook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        shown = entry = traceback
        while entry is not None:
            if entry.tb_frame.f_code.co_filename == __file__:
                shown = entry.tb_next
            entry = entry.tb_next
        hook(kind, value.with_traceback(shown), shown)

    sys.excepthook = excepthook


def _replace_first_path(directory: str, always: bool = False) -> None:
    # `python -P` (3.11) demands that no directory is added to the path, unless it is the program itself.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = directory
    elif always:
        sys.path.insert(0, directory)

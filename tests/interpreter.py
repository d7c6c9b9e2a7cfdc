"""Makes Triton's interpreter faster for the tests: it takes a quarter of its own time, and no bit changes.

It spends nearly all of its time on types, shapes and patches that are always the same, and next to nothing on numbers.
A version of Triton that works in another way is not changed.
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
    """Make the interpreter patch ``triton.language`` once a launch, and cache its look-ups.

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
    """A launch replaces members of the modules of the language, and restores them at the end.

    Each call of a ``@triton.jit`` function within the launch searches all members of the language again, only to find
    that they are replaced.
    """
    whole, executor = interpreter._patch_lang, interpreter.GridExecutor
    patched: list[set[int]] = []  # modules of the language, for each launch that is running
    used: dict[Any, frozenset[int]] = {}  # of each function

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
    """The builtins among the members of a module of the language do not change from one launch to the next."""
    if list(inspect.signature(interpreter._patch_builtin).parameters) != ["pkg", "builder", "scope"]:
        return
    builtins: dict[Any, list[tuple[str, Any]]] = {}

    @functools.wraps(interpreter._patch_builtin)
    def patch(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in builtins:
            builtins[pkg] = [m for m in inspect.getmembers(pkg) if interpreter.tl.core.is_builtin(m[1])]
        for name, member in builtins[pkg]:
            # Members that this launch has already replaced are no builtins.
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

    # Its argument is hardly ever a sequence, which it tests first.
    unwrap = core._unwrap_if_constexpr
    as_it_is = {bool, int, float, str, type(None), core.dtype, core.block_type, core.pointer_type, core.tensor}

    @functools.wraps(unwrap)
    def unwrapped(o: Any) -> Any:
        kind = type(o)
        return o if kind in as_it_is else o.value if kind is core.constexpr else unwrap(o)

    core._unwrap_if_constexpr = unwrapped


def _equal_shapes_as_they_are(interpreter: Any) -> None:
    """Operands of equal shape need no broadcast; checking this takes as long as an operation on a tile."""
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
    """Skip a second computation of integer sums and products, in 64 bits, for an assertion that only debug mode makes.

    Otherwise ``device_assert`` drops the assertion after the work is done.
    """
    semantic = type(interpreter.interpreter_semantic)
    check: Callable[..., Any] | None = getattr(semantic, "binary_op_sanitize_overflow_impl", None)
    if check is None or "options.debug" not in inspect.getsource(semantic.device_assert):
        return

    @functools.wraps(check)
    def where_it_counts(self: Any, *args: Any, **kwargs: Any) -> Any:
        return check(self, *args, **kwargs) if self.builder.options.debug else None

    semantic.binary_op_sanitize_overflow_impl = where_it_counts

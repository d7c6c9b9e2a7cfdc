"""Vectors of 16 float32 for Numba's loops: a type of their own, with loads, stores and arithmetic.

Numba leaves vectors to LLVM's automatic ones. These are half as wide as the registers of a CPU with AVX-512, compare
all addresses before every loop, and are not used for short loops or loops of mixed types; a step of SM3 took twice as
long. A `Lanes` is what LLVM calls ``<16 x float>``: one register with AVX-512, two with AVX2, four on ARM.

Every load and store gets the number of lanes that count, so that a loop's body also does the rest of a row. With the
constant `LANES` it is one instruction. With less, the other lanes are 0 and their memory is not touched.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

# Unsigned, as all offsets are: signed indices would be checked for negative values.
LANES = np.uint64(16)
_LANES = int(LANES)

# No flag lets the compiler choose between roundings ("contract", "reassoc", "arcp"), because code that was compiled in
# the process and code from Numba's cache on disk could then differ in the last bit. NaN and infinity are kept.
FAST_MATH = {"nsz"}
_FLAGS = tuple(sorted(FAST_MATH))

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, _LANES)


_FLOATS = _vector(_F32)


def _all(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(_vector(element), [value] * _LANES)


class Lanes(types.Type):
    """Numba's type of a vector."""

    def __init__(self) -> None:
        super().__init__("Lanes")


lanes = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _vector(_F32))


def _spread(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_vector(value.type), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, _all(_I32, 0))


def _arithmetic(symbol: Callable[..., Any], instruction: str) -> None:
    """Define ``symbol`` for two vectors, and for a vector and a float32 that stands for all lanes."""

    @infer_global(symbol)
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if lanes in args and all(a == lanes or a == types.float32 for a in args):
                return signature(lanes, *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (x if kind == lanes else _spread(builder, x) for kind, x in zip(sig.args, args, strict=True))
        return getattr(builder, instruction)(a, b, flags=_FLAGS)

    for pair in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(symbol, *pair)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def splat(typing, value):
    """A vector with the float32 in every lane."""
    return lanes(types.float32), lambda context, builder, sig, args: _spread(builder, args[0])


@intrinsic
def at_address(typing, like, address):
    """The memory at an address as an array of unknown length with the dtype of ``like``."""

    def generate(context, builder, sig, args):
        return _array_at(context, builder, sig.return_type, args[1])

    return types.Array(like.dtype, 1, "C")(like, types.uint64), generate


@intrinsic
def weights(typing, like_p, like_c, p, c, low, high):
    """The parameter at an address, for `load` and `store`. If ``like_c`` is an integer array, it has corrections.

    ``low`` and ``high`` are the halves of the key of the noise that rounds to 24 bits.
    """
    array = types.Array(like_p.dtype, 1, "C")
    corrected = isinstance(like_c.dtype, types.Integer)
    codes = types.Array(like_c.dtype, 1, "C")
    kind = types.Tuple((array, codes, types.uint64, types.uint64)) if corrected else array

    def generate(context, builder, sig, args):
        parameter = _array_at(context, builder, array, args[2])
        if not corrected:
            return parameter
        return context.make_tuple(
            builder, kind, (parameter, _array_at(context, builder, codes, args[3]), args[4], args[5])
        )

    return kind(like_p, like_c, types.uint64, types.uint64, types.uint64, types.uint64), generate


def _array_at(context: Any, builder: Any, kind: Any, address: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    size = ir.Constant(ir.IntType(64), context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    context.populate_array(
        array,
        data=builder.inttoptr(address, array.data.type),
        shape=[ir.Constant(ir.IntType(64), 0)],
        strides=[size],
        itemsize=size,
        meminfo=None,
    )
    return array._getvalue()


_ELEMENTS = {types.float32: (_F32, 4), types.uint16: (_I16, 2), types.int16: (_I16, 2), types.int8: (_I8, 1)}


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> tuple[Any, ir.Type, int]:
    element, size = _ELEMENTS[kind.dtype]
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [index]), element, size


def _read(context: Any, builder: Any, kind: Any, array: Any, index: Any, n: Any) -> Any:
    """Elements without conversion; lanes beyond ``n`` are 0."""
    place, element, size = _place(context, builder, kind, array, index)
    few = cgutils.alloca_once(builder, _vector(element))
    whole = builder.icmp_unsigned(">=", n, ir.Constant(ir.IntType(64), _LANES))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            full = builder.load(builder.bitcast(place, _vector(element).as_pointer()))
            full.align = size
            end_then = builder.block
        with otherwise:
            builder.store(_all(element, 0), few)
            cgutils.raw_memcpy(builder, builder.bitcast(few, element.as_pointer()), place, n, size)
            part = builder.load(few)
            end_otherwise = builder.block
    value = builder.phi(_vector(element))
    value.add_incoming(full, end_then)
    value.add_incoming(part, end_otherwise)
    return value


def _write(context: Any, builder: Any, kind: Any, array: Any, index: Any, value: Any, n: Any) -> None:
    """Write elements without conversion."""
    place, element, size = _place(context, builder, kind, array, index)
    whole = builder.icmp_unsigned(">=", n, ir.Constant(ir.IntType(64), _LANES))
    few = cgutils.alloca_once(builder, _vector(element))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            builder.store(value, builder.bitcast(place, _vector(element).as_pointer())).align = size
        with otherwise:
            builder.store(value, few)
            cgutils.raw_memcpy(builder, place, builder.bitcast(few, element.as_pointer()), n, size)


@intrinsic
def load(typing, array, index, n):
    """``array[index : index + n]`` of float32, of int8, or of the bits of bfloat16 (uint16). Other lanes are 0.

    For `weights` with corrections it returns the corrected weights, see `weight_code.decode`.
    """

    def generate(context, builder, sig, args):
        kind: Any = sig.args[0]
        if isinstance(kind, types.Tuple):
            p, c = (builder.extract_value(args[0], i) for i in range(2))
            stored = builder.zext(_read(context, builder, kind.types[0], p, *args[1:]), _vector(_I32))
            code = _read(context, builder, kind.types[1], c, *args[1:])
            return builder.bitcast(_corrected(builder, stored, builder.sext(code, _vector(_I32)), code.type), _FLOATS)
        value = _read(context, builder, kind, *args)
        element = value.type.element
        if element == _I8:
            return builder.sitofp(value, _FLOATS)
        if element == _I16:
            return builder.bitcast(builder.shl(builder.zext(value, _vector(_I32)), _all(_I32, 16)), _FLOATS)
        return value

    return lanes(array, types.uint64, types.uint64), generate


@intrinsic
def store(typing, array, index, value, n):
    """``array[index : index + n] = value``: as float32, as the nearest int8, or as the bits of the nearest bfloat16.

    For `weights` with corrections it writes both, see `weight_code.encode`. Element ``index`` is the noise's first.
    """

    def generate(context, builder, sig, args):
        kind: Any = sig.args[0]
        value = args[2]
        if isinstance(kind, types.Tuple):
            p, c, low, high = (builder.extract_value(args[0], i) for i in range(4))
            narrow = kind.types[1].dtype == types.int8
            noise = _noise(builder, args[1], low, high) if narrow else None
            stored, code = _split(builder, _bits(builder, value), noise)
            _write(context, builder, kind.types[0], p, args[1], stored, args[3])
            code = builder.trunc(code, _vector(_I8 if narrow else _I16))
            _write(context, builder, kind.types[1], c, args[1], code, args[3])
            return context.get_dummy_value()
        element = _ELEMENTS[kind.dtype][0]
        if element == _I8:
            # Adding 1.5 * 2**23 leaves the nearest integer (ties to even) in the lowest bits.
            value = builder.trunc(_bits(builder, builder.fadd(value, _all(_F32, 12582912.0))), _vector(_I8))
        elif element == _I16:
            value = _bfloat16(builder, _bits(builder, value))
        _write(context, builder, kind, args[0], args[1], value, args[3])
        return context.get_dummy_value()

    return types.none(array, types.uint64, lanes, types.uint64), generate


def _corrected(builder: Any, stored: Any, code: Any, kind: Any) -> Any:
    """`weight_code.decode` of the bits of bfloat16 numbers, as the bits of float32."""
    fraction = 8 if kind.element == _I8 else 16
    magnitude = builder.and_(stored, _all(_I32, 0x7FFF))
    sign = builder.shl(builder.and_(stored, _all(_I32, 0x8000)), _all(_I32, 16))
    h = builder.add(builder.shl(magnitude, _all(_I32, fraction)), code)
    h = builder.select(builder.icmp_signed("<", h, _all(_I32, 0)), _all(_I32, 0), h)
    bits = builder.or_(builder.shl(h, _all(_I32, 16 - fraction)), sign)
    finite = builder.icmp_unsigned("<", magnitude, _all(_I32, 0x7F80))
    return builder.select(finite, bits, builder.shl(stored, _all(_I32, 16)))


def _split(builder: Any, bits: Any, noise: Any) -> tuple[Any, Any]:
    """`weight_code.encode` for bfloat16: its bits, and the codes as 32-bit integers. Without noise F is 16, else 8."""
    magnitude = builder.and_(bits, _all(_I32, 0x7FFFFFFF))
    fraction = 16 if noise is None else 8
    h = magnitude if noise is None else builder.lshr(builder.add(magnitude, noise), _all(_I32, 8))
    last = _all(_I32, (0x7F80 << fraction) - (1 << (fraction - 1)) - 1)
    h = builder.select(builder.icmp_unsigned("<", h, last), h, last)
    stored = builder.lshr(builder.add(h, _all(_I32, 1 << (fraction - 1))), _all(_I32, fraction))
    code = builder.sub(h, builder.shl(stored, _all(_I32, fraction)))
    finite = builder.icmp_unsigned("<", magnitude, _all(_I32, 0x7F7F8000))
    sign = builder.and_(builder.lshr(bits, _all(_I32, 16)), _all(_I32, 0x8000))
    stored = builder.trunc(builder.or_(stored, sign), _vector(_I16))
    return builder.select(finite, stored, _bfloat16(builder, bits)), builder.select(finite, code, _all(_I32, 0))


def _noise(builder: Any, index: Any, low: Any, high: Any) -> Any:
    """The lowest 8 bits of `hashing.random32` of adjacent elements, starting with element ``index``."""
    wide = ir.IntType(64)
    number = builder.add(_spread(builder, index), ir.Constant(_vector(wide), list(range(_LANES))))
    h = builder.trunc(builder.xor(number, builder.lshr(number, _all(wide, 32))), _vector(_I32))
    for key in (low, high):
        h = builder.xor(h, _spread(builder, builder.trunc(key, _I32)))
        h = builder.mul(builder.xor(h, builder.lshr(h, _all(_I32, 16))), _all(_I32, 0x85EBCA6B))
        h = builder.mul(builder.xor(h, builder.lshr(h, _all(_I32, 13))), _all(_I32, 0xC2B2AE35))
        h = builder.xor(h, builder.lshr(h, _all(_I32, 16)))
    return builder.and_(h, _all(_I32, 0xFF))


def _bits(builder: Any, value: Any) -> Any:
    return builder.bitcast(value, _vector(_I32))


def _unsigned(builder: Any, value: Any) -> Any:
    """The bits without the sign."""
    return builder.and_(_bits(builder, value), _all(_I32, 0x7FFFFFFF))


def _bfloat16(builder: Any, bits: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even. NaN stays NaN."""
    high = builder.lshr(bits, _all(_I32, 16))
    even = builder.add(builder.add(bits, _all(_I32, 0x7FFF)), builder.and_(high, _all(_I32, 1)))
    nan = builder.icmp_unsigned(">", builder.and_(bits, _all(_I32, 0x7FFFFFFF)), _all(_I32, 0x7F800000))
    out = builder.select(nan, _all(_I32, 0x7FC0), builder.lshr(even, _all(_I32, 16)))
    return builder.trunc(out, _vector(_I16))


def _call(builder: Any, name: str, result: ir.Type, *args: Any, **options: Any) -> Any:
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args, **options)


@intrinsic
def root(typing, x):
    """Square roots."""

    def generate(context, builder, sig, args):
        return _call(builder, f"llvm.sqrt.v{_LANES}f32", _vector(_F32), args[0])

    return lanes(lanes), generate


@intrinsic
def least(typing, x, y):
    """The smaller number in each lane, or NaN if either is NaN."""

    def generate(context, builder, sig, args):
        x, y = args
        smaller = builder.select(builder.fcmp_ordered("<", x, y), x, y)  # y if either is NaN
        return builder.select(builder.fcmp_unordered("uno", x, x), x, smaller)

    return lanes(lanes, lanes), generate


@intrinsic
def at_least(typing, x, floor):
    """``floor if x < floor else x``, which keeps NaN."""

    def generate(context, builder, sig, args):
        floor = _spread(builder, args[1])
        return builder.select(builder.fcmp_ordered("<", args[0], floor), floor, args[0])

    return lanes(lanes, types.float32), generate


# The bits of numbers that are not negative have the order of the numbers, and NaN is the largest. An integer maximum
# is one instruction, without the rules of a floating-point maximum for NaN. A NaN may have a sign (0 times infinity has
# one on x86), which would make it the smallest, so signs are cleared.
@intrinsic
def magnitude(typing, x):
    """Absolute values."""

    def generate(context, builder, sig, args):
        return builder.bitcast(_unsigned(builder, args[0]), _vector(_F32))

    return lanes(lanes), generate


@intrinsic
def top(typing, x, y):
    """The larger number in each lane, for numbers >= 0; NaN if either is NaN."""

    def generate(context, builder, sig, args):
        a, b = (_unsigned(builder, x) for x in args)
        return builder.bitcast(builder.select(builder.icmp_signed(">", a, b), a, b), _vector(_F32))

    return lanes(lanes, lanes), generate


@intrinsic
def largest(typing, x):
    """The largest lane as a float32, for numbers >= 0; NaN if any lane is NaN."""

    def generate(context, builder, sig, args):
        name = f"llvm.vector.reduce.smax.v{_LANES}i32"
        return builder.bitcast(_call(builder, name, _I32, _unsigned(builder, args[0])), _F32)

    return types.float32(lanes), generate


@intrinsic
def total(typing, x):
    """The sum of the lanes as a float32, always in the same order."""

    def generate(context, builder, sig, args):
        name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
        return _call(builder, name, _F32, ir.Constant(_F32, -0.0), args[0], fastmath=_FLAGS)

    return types.float32(lanes), generate

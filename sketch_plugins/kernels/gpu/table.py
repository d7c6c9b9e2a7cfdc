"""The table that describes parameters to Triton's kernels: its fields, and the places of the numbers, as constants.

A launch covers many tensors, and each of them is a `Row` of int64. Kernels read a field by the constant of its name, a
number of a step by that of `sketch_plugins.kernels.work`::

    from sketch_plugins.kernels.gpu.table import COLUMNS, STEP

    columns = tl.load(row + COLUMNS)
    step = tl.load(numbers + STEP)
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from sketch_plugins.kernels import tile, work


class Row(NamedTuple):
    """One tensor. Addresses are 0 where there is nothing; what depends on the launch is 0 until there is one."""

    P: int = 0  # address of the parameter
    G: int = 0  # how far behind the row the address of the gradient is, which changes in every step
    FIRST_A: int = 0  # addresses of the tensors of the first moment's store
    FIRST_B: int = 0
    SECOND_A: int = 0  # and of the second's
    SECOND_B: int = 0
    NEW: int = 0  # how far behind the row the address of the new covers is
    INDEX: int = 0  # address of the touched rows
    HASHES: int = 0  # address of the parameters of the hashes
    WEIGHTS: int = 0  # address of the weights of rows, where a bucket takes them
    ROWS: int = 0  # of the parameter, whose matrices (experts) lie behind each other
    COLUMNS: int = 0
    P_STRIDE: int = 0  # numbers between two rows of the parameter
    G_STRIDE: int = 0
    WIDTH: int = 0  # buckets of all matrices
    BEGIN: int = 0  # the first program that works on it
    TILES: int = 0  # tiles beside each other
    COUNT: int = 0  # rows that take part: all, or the touched ones
    SEED: int = 0  # of the rounding
    AXES: int = 0  # how far behind the row a cover's axes but the first are: (address, length, numbers of one slice)
    CODES: int = 0  # address of the corrections of the weights
    LAST: int = 0  # address of what the last step measured
    HEIGHT: int = 0  # rows of one matrix
    OWN: int = 0  # buckets of one matrix
    ROW: int = 0  # which vector of numbers is the tensor's: tensors of one group share theirs

    @classmethod
    def at(cls, name: str) -> int:
        """The place of a field."""
        return cls._fields.index(name)


FIELDS = tl.constexpr(len(Row._fields))
LEAST = tl.constexpr(tile.LEAST)
FOLD, MEASURE, APPLY = (tl.constexpr(phase) for phase in (work.FOLD, work.MEASURE, work.APPLY))


def __getattr__(name: str) -> tl.constexpr:
    """A field of a row, or a place among the numbers, as Triton wants its constants."""
    if name in Row._fields:
        return tl.constexpr(Row.at(name))
    value = getattr(work, name, None)
    if isinstance(value, int) and name.isupper():
        return tl.constexpr(value)
    raise AttributeError(f"neither a field of a row nor a number of a step is named {name!r}")

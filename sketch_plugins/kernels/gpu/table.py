"""The table that describes parameters to Triton's kernels. Its fields and the places of the numbers are constants.

A launch covers many tensors, and each of them is a `Row` of int64. Kernels read a field by the constant of its name,
and a number of the step by the constant in `sketch_plugins.kernels.work`::

    from sketch_plugins.kernels.gpu.table import COLUMNS, STEP

    columns = tl.load(row + COLUMNS)
    step = tl.load(numbers + STEP)
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from sketch_plugins.kernels import tile, work


class Row(NamedTuple):
    """One tensor. An address is 0 if there is nothing. Fields that depend on the launch are 0 until it is made."""

    P: int = 0  # address of the parameter
    G: int = 0  # distance from the row to the address of the gradient, which changes in every step
    FIRST_A: int = 0  # addresses of the tensors of the first moment's store
    FIRST_B: int = 0
    SECOND_A: int = 0  # addresses of the tensors of the second moment's store
    SECOND_B: int = 0
    NEW: int = 0  # distance from the row to the address of the new covers
    INDEX: int = 0  # address of the touched rows
    HASHES: int = 0  # address of the parameters of the hashes
    WEIGHTS: int = 0  # address of the weights with which rows enter buckets (row_count_min)
    ROWS: int = 0  # number of rows of the parameter, with those of all matrices (experts)
    COLUMNS: int = 0
    P_STRIDE: int = 0  # number of elements from one row of the parameter to the next
    G_STRIDE: int = 0
    WIDTH: int = 0  # number of buckets of all matrices
    BEGIN: int = 0  # the first program that works on the tensor
    TILES: int = 0  # number of tiles beside each other
    COUNT: int = 0  # number of rows that take part: all rows, or the touched ones
    SEED: int = 0  # seed of the rounding
    AXES: int = 0  # distance from the row to a cover's axes except the first: (address, length, numbers of one slice)
    CODES: int = 0  # address of the corrections of the weights
    LAST: int = 0  # address of the RMS that the last step measured, two for each matrix that is measured by itself
    HEIGHT: int = 0  # number of rows of one matrix: those that share buckets, and those that are measured together
    OWN: int = 0  # number of buckets of one matrix
    ROW: int = 0  # which vector of numbers the tensor uses; tensors of one group share theirs. With BATCH the first one

    @classmethod
    def at(cls, name: str) -> int:
        """The place of a field."""
        return cls._fields.index(name)


FIELDS = tl.constexpr(len(Row._fields))
LEAST = tl.constexpr(tile.LEAST)
FOLD, MEASURE, APPLY = (tl.constexpr(phase) for phase in (work.FOLD, work.MEASURE, work.APPLY))


def __getattr__(name: str) -> tl.constexpr:
    """A field of a row, or the place of a number, as a Triton constant."""
    if name in Row._fields:
        return tl.constexpr(Row.at(name))
    value = getattr(work, name, None)
    if isinstance(value, int) and name.isupper():
        return tl.constexpr(value)
    raise AttributeError(f"neither a field of a row nor a number of a step is named {name!r}")

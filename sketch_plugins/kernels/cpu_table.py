"""The table that describes parameters to Numba's loops. Its fields, and those of a piece, are constants.

Each parameter is a `Row` of unsigned integers: in Numba the sum of a signed and an unsigned integer is a float. Loops
read a field by the constant of its name: ``from sketch_plugins.kernels.cpu_table import COLUMNS``.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One parameter."""

    P: int  # address of the parameter
    G: int  # address of its gradient
    SIZE: int  # number of elements
    COLUMNS: int
    KIND: int  # store of the first moment
    TABLE1: int  # address of its dense numbers or codes
    SCALES: int  # address of its scales
    BLOCK: int  # number of columns that share a scale
    TABLE2: int  # address of the second moment: table, dense numbers (0: there is none), or covers of the rows
    COLUMN: int  # address of the covers of the columns, of one matrix after the other; of a sketch, the means of rows
    WIDTH: int  # number of buckets of one matrix
    BAND: int  # number of buckets of a unit
    UNITS: int  # number of units
    BASE: int  # place of its first unit in `squares` and `norms`
    AFTER: int  # 1 if the first moment averages the preconditioned gradient
    NEW: int  # place of its first row in `rows` (covers, and means of rows)
    LAST: int  # address of the RMS that the last step measured (0: none are kept)
    CODES: int  # address of the corrections of the weights (0: there are none)
    SEED: int  # seed of the noise that rounds them
    MATRICES: int  # number of matrices (experts). The rows, buckets and units of one follow those of the one before
    APART: int  # number of matrices that are handled one by one (1: the whole). Each has as many units, and own numbers


class Piece(NamedTuple):
    """A range of one parameter's units, for one call of a loop.

    If the parameter's matrices are handled one by one, the units are those of one matrix.
    """

    TASK: int  # row of the table
    BEGIN: int
    END: int
    PHASE: int  # what the sweep does: see `sketch_plugins.kernels.work`
    MAXIMA: int  # place of its first column in `maxima`
    ROW: int  # its row of `numbers`


FIELDS = len(Row._fields)


def __getattr__(name: str) -> int:
    for fields in (Row._fields, Piece._fields):
        if name in fields:
            return fields.index(name)
    raise AttributeError(f"neither a row nor a piece has a field {name!r}")

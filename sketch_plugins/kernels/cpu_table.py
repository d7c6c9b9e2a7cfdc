"""The table that describes parameters to Numba's loops: its fields, and those of a piece, as constants.

Each parameter is a `Row` of unsigned integers (signed and unsigned ones must not meet: their sum would be a float).
Loops read a field by the constant of its name, from ``from sketch_plugins.kernels.cpu_table import COLUMNS``.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One parameter."""

    P: int  # addresses of the parameter and of its gradient
    G: int
    SIZE: int  # elements
    COLUMNS: int
    KIND: int  # store of the first moment, and the addresses of its state
    TABLE1: int  # dense numbers or codes
    SCALES: int
    BLOCK: int  # columns that share a scale
    TABLE2: int  # of the second moment: table, dense numbers (0: there is none), covers of the rows
    COLUMN: int  # covers of the columns
    WIDTH: int  # buckets of one matrix
    BAND: int  # buckets of a unit
    UNITS: int
    BASE: int  # where its units begin in `squares` and `norms`
    AFTER: int  # the first moment averages the preconditioned gradient
    NEW: int  # where its rows begin in `rows`
    LAST: int  # address of the RMS that the last step measured (0: nobody keeps them)
    CODES: int  # address of the corrections of the weights (0: there are none)
    SEED: int  # of the noise that they are rounded with
    MATRICES: int  # matrices (experts) that rows, buckets and units belong to, those of one behind those of another


class Piece(NamedTuple):
    """A range of one parameter's units, for one call of a loop."""

    TASK: int  # which row
    BEGIN: int
    END: int
    PHASE: int  # what is done: see `sketch_plugins.kernels.work`
    MAXIMA: int  # where its maxima of the columns begin


FIELDS = len(Row._fields)


def __getattr__(name: str) -> int:
    for fields in (Row._fields, Piece._fields):
        if name in fields:
            return fields.index(name)
    raise AttributeError(f"neither a row nor a piece has a field {name!r}")

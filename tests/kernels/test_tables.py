"""A table's fields are written once: kernels, launcher and definition use the same places."""

import importlib

import pytest

from sketch_plugins.kernels import cpu_table, work


def test_places_of_the_cpu_s_table_are_those_of_its_row():
    assert [getattr(cpu_table, name) for name in cpu_table.Row._fields] == list(range(cpu_table.FIELDS))
    assert [getattr(cpu_table, name) for name in cpu_table.Piece._fields] == list(range(len(cpu_table.Piece._fields)))
    assert not set(cpu_table.Row._fields) & set(cpu_table.Piece._fields)  # otherwise a name would have two places
    with pytest.raises(AttributeError, match="has a field 'SPEED'"):
        _ = cpu_table.SPEED


def test_loops_read_every_number_of_a_step():
    sweeps = pytest.importorskip("sketch_plugins.kernels.sweeps", reason="needs Numba")
    import numpy as np

    row = np.arange(work.NUMBERS, dtype=np.float32)
    assert sweeps._numbers(row) == tuple(row)  # the function is inlined, and runs as Python's, too


def test_triton_s_constants_are_those_of_the_row_and_of_the_numbers():
    table = pytest.importorskip("sketch_plugins.kernels.gpu.table", reason="needs Triton")
    assert [getattr(table, name).value for name in table.Row._fields] == list(range(table.FIELDS.value))
    names = [name for name, value in vars(work).items() if name.isupper() and type(value) is int]
    shared = set(names) & set(table.Row._fields)
    assert not shared, f"a field and a number with one name: {shared}"
    assert all(getattr(table, name).value == getattr(work, name) for name in names)
    with pytest.raises(AttributeError, match="SPEED"):
        _ = table.SPEED


@pytest.mark.parametrize("name", ["common", "first", "fold", "norms", "second", "step"])
def test_no_kernel_has_a_place_of_its_own(name):
    """Every place that a kernel imports by name is that of the table."""
    module = pytest.importorskip(f"sketch_plugins.kernels.gpu.{name}", reason="needs Triton")
    table = importlib.import_module("sketch_plugins.kernels.gpu.table")
    for field in table.Row._fields:
        if hasattr(module, field):
            assert getattr(module, field).value == table.Row.at(field)

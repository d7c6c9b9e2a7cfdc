import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sketch_plugins.sharding.pieces import Fragment, pieces

WHOLES = [(), (7,), (1, 1), (5, 1), (1, 9), (6, 4), (4, 3, 2), (2, 3, 2, 2)]


@given(st.sampled_from(WHOLES), st.data())
def test_pieces_hold_every_element_of_a_fragment_once_and_in_its_place(whole, data):
    size = torch.Size(whole).numel()
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    offset = data.draw(st.integers(0, 3))
    parameter = torch.arange(float(size)).view(whole)
    flat = torch.cat([torch.full((offset,), -1.0), parameter.reshape(-1)[start:end], torch.full((2,), -1.0)])
    rows = parameter.reshape(whole[0], -1) if len(whole) > 1 else parameter.reshape(-1, 1)
    seen = []
    for piece in pieces([Fragment(3, whole, start, end - start, offset)]):
        view = piece.of(flat)
        assert view.shape == piece.shape and view.numel() == piece.numel > 0
        matrix = view.reshape(view.shape[0], -1) if len(whole) > 1 else view.reshape(-1, 1)
        n, m = matrix.shape
        assert torch.equal(matrix, rows[piece.row : piece.row + n, piece.column : piece.column + m])
        # Only whole rows keep the dimensions of a convolution.
        assert piece.shape[1:] == whole[1:] or (len(piece.shape) == 2 and piece.shape[0] == 1)
        assert piece.complete == (start == 0 and end == size)
        assert piece.place.tolist() == [piece.row, piece.column, *whole]
        seen += view.reshape(-1).tolist()
    assert seen == list(map(float, range(start, end)))


@pytest.mark.parametrize(
    ("start", "numel", "shapes"),
    [
        (0, 24, [(6, 4)]),
        (2, 20, [(1, 2), (4, 4), (1, 2)]),
        (4, 8, [(2, 4)]),
        (5, 2, [(1, 2)]),
        (3, 2, [(1, 1), (1, 1)]),
        (4, 0, []),
    ],
)
def test_a_part_of_a_first_row_whole_rows_a_part_of_a_last_row(start, numel, shapes):
    assert [piece.shape for piece in pieces([Fragment(0, (6, 4), start, numel, 0)])] == shapes

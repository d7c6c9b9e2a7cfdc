"""Experts on several ranks: whole matrices or parts of one, and no bucket with rows of two."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sketch_plugins import CSAdam, Sketchy
from sketch_plugins.checkpoints.saved import CannotReshard, Report, SavedOptimizer
from sketch_plugins.sharding.blocks import Matrix, Rows
from sketch_plugins.sharding.pieces import Fragment, Piece, pieces
from sketch_plugins.stores import Dense, Ema, Gradient
from sketch_plugins.stores.sketch import Sketch

WHOLE = (4, 18, 20)
OPTIONS = [
    {"first_moment": "int8", "block_size": 8},
    {"first_moment": "fp32", "depth": 2, "hash": "affine", "compression": 0.3},
    {"first_moment": "none", "second_moment": "row_count_min", "compression": 0.2},
    {"first_moment": "none", "bucket": "sum", "compression": 0.2},
    {"first_moment": "bf16", "compression": 1.0},
]


@given(st.sampled_from([(4, 3, 5), (3, 2, 1), (2, 4, 2, 3), (1, 3, 4)]), st.data())
def test_pieces_of_a_batch_hold_whole_matrices_or_rows_of_one(whole, data):
    size = math.prod(whole)
    start = data.draw(st.integers(0, size))
    end = data.draw(st.integers(start, size))
    parameter = torch.arange(float(size)).view(whole)
    seen, found = [], list(pieces([Fragment(3, whole, start, end - start, 1)], lambda f: 1))
    flat = torch.cat([torch.zeros(1), parameter.reshape(-1)[start:end]])
    outer, inner = parameter.flatten(1), parameter.flatten(0, 1).flatten(1)
    for piece in found:
        view = piece.of(flat)
        numbers = view.reshape(-1)
        assert piece.numel > 0 and piece.whole == whole
        if len(piece.shape) == len(whole):  # whole matrices
            assert piece.shape[1:] == whole[1:] and piece.column == 0
            assert torch.equal(view, parameter[piece.row : piece.row + piece.shape[0]])
        else:
            assert torch.equal(numbers, outer[piece.row, piece.column : piece.column + piece.numel])
            if piece.shape[1:] == whole[2:]:  # whole rows
                first = piece.row * whole[1] + piece.column // inner.shape[1]
                assert torch.equal(view.flatten(1), inner[first : first + piece.shape[0]])
            else:
                assert piece.shape[0] == 1 and piece.numel < inner.shape[1]
        seen += numbers.tolist()
    assert seen == list(map(float, range(start, end)))
    assert len({piece.key for piece in found}) == len(found) <= 5


def kept(**options):
    optimizer = CSAdam([torch.nn.Parameter(torch.zeros(1))], min_compress_size=0, **options)
    return SavedOptimizer(optimizer.state_dict()["param_groups"])


def flat(kept, world):
    """The pieces of each rank of a flat partition that holds the parameter alone."""
    n = math.prod(WHOLE)
    size = -(-n // (2 * world)) * 2
    cuts = [(min(r * size, n), min((r + 1) * size, n)) for r in range(world)]
    return [p for lo, hi in cuts for p in kept.pieces([Fragment(0, WHOLE, lo, hi - lo, 0)], 0)]


def shards(kept, world):
    """Shard(0)."""
    part = -(-WHOLE[0] // world)
    rows = [(min(r * part, WHOLE[0]), min((r + 1) * part, WHOLE[0])) for r in range(world)]
    return [Piece(0, WHOLE, (hi - lo, *WHOLE[1:]), lo, 0) for lo, hi in rows if lo < hi]


def trained(kept, piece, steps):
    """State that has averaged the piece of these gradients."""
    held = kept.held(piece, 0, torch.float32)
    state = {"step": torch.tensor(float(len(steps))), "place": piece.place}
    for name, store in held.stores.items():
        state[name] = store.allocate(held.matrix, torch.device("cpu"), torch.float32)
        for t, g in enumerate(steps, 1):
            x = cut(g, piece).reshape(held.matrix)
            store.write(state[name], Gradient(Matrix(x), None, g.dtype, 64, held.matrix), Ema(0.9, 0.1, t))
    return kept.held(piece, 0, torch.float32, state, "a piece")


def cut(whole, piece):
    """The numbers of a piece."""
    if len(piece.shape) == len(WHOLE):
        return whole[piece.row : piece.row + piece.shape[0]]
    return whole.flatten(1)[piece.row, piece.column : piece.column + piece.numel].view(piece.shape)


def estimates(held, name):
    """The estimates of all pieces for the whole."""
    out = torch.full(WHOLE, math.nan)
    for h in held:
        rows, columns = h.matrix
        read = h.stores[name].read(h.state[name], Rows(rows, torch.arange(rows), 0, columns), torch.float32)
        cut(out, h.piece).copy_(read.expand(rows, columns).reshape(h.piece.shape))
    assert torch.isfinite(out).all()
    return out


def expected(held, name, old):
    """The contents of a new piece's store, made from the old estimates."""
    store = held.stores[name]
    values = cut(old, held.piece).reshape(held.matrix)
    if isinstance(store, Sketch) and store.bucket == "sum":
        return None  # scaled: see tests/sharding/test_recut.py
    state = store.allocate(held.matrix, torch.device("cpu"), torch.float32)
    store.assign(state, values)
    return state


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [((flat, 2), (flat, 3)), ((flat, 5), (shards, 2)), ((shards, 4), (flat, 1)), ((shards, 2), (flat, 7))],
    ids=lambda v: f"{v[0].__name__} {v[1]}",
)  # fmt: skip
def test_recut(options, before, after):
    """Each expert's new buckets are made from the old pieces' estimates of its rows."""
    k = kept(**options)
    steps = [torch.randn(WHOLE, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)]
    old = [trained(k, piece, steps) for piece in before[0](k, before[1])]
    assert sum(h.piece.numel for h in old) == math.prod(WHOLE)
    new = []
    for piece in after[0](k, after[1]):
        report = Report(None, "", "", before[1], after[1])
        state = k.recut(old, piece, 0, torch.float32, report)
        new.append(k.held(piece, 0, torch.float32, state, "a new piece"))  # which checks it
    for name, store in new[0].stores.items():
        was, now = estimates(old, name), estimates(new, name)
        if isinstance(store, Dense) or options.get("compression") == 1.0:
            assert torch.equal(was, now)
        for h in new:
            wanted = expected(h, name, was)
            for key, tensor in (wanted or {}).items():
                # Codes are copied where blocks are the same, and scales to a unit in the last place.
                torch.testing.assert_close(h.state[name][key], tensor, rtol=1e-5, atol=1e-7)
            if isinstance(h.stores[name], Sketch):
                each = h.matrix[0] // h.stores[name].matrices
                assert h.stores[name].matrices == (h.piece.shape[0] if len(h.piece.shape) == 3 else 1)
                assert each == h.piece.shape[-2]


def test_whole_experts_keep_their_bits():
    """If W and then W' ranks have whole experts, nothing is lost, because buckets belong to one expert."""
    for options in ({"first_moment": "int8", "block_size": 8}, {"first_moment": "none", "hash": "affine"}):
        k = kept(compression=0.2, **options)
        steps = [torch.randn(WHOLE, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
        one = trained(k, shards(k, 1)[0], steps)
        for world in (2, 4):
            for piece, h in zip(shards(k, world), (trained(k, p, steps) for p in shards(k, world)), strict=True):
                n, first = piece.shape[0], piece.row
                table = one.state["second_moment"]["table"].unflatten(1, (4, -1))[:, first : first + n].flatten(1, 2)
                assert torch.equal(h.state["second_moment"]["table"], table)


def test_each_expert_keeps_the_rms_of_its_pieces():
    """Whole experts keep their numbers. One that was cut gets the mean over its pieces, and so does each of these."""
    saved = kept(preset="lean", lagged_rms=True)

    def pieces_of(bounds):
        return [p for a, b in pairwise(bounds) for p in saved.pieces([Fragment(0, WHOLE, a, b - a, 0)], 0)]

    def with_rms(piece, last):
        made = saved.held(piece, 0, torch.float32)
        state = {"step": torch.tensor(1.0), "place": piece.place, "rms": {"last": last}}
        for name, store in made.stores.items():
            state[name] = store.allocate(made.matrix, torch.device("cpu"), torch.float32)
        return saved.held(piece, 0, torch.float32, state, "a piece")

    def again(old, bounds):
        report = Report(None, "", "", 1, 2)
        return [saved.recut(old, piece, 0, torch.float32, report)["rms"]["last"] for piece in pieces_of(bounds)]

    each = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]])
    (piece,) = pieces_of([0, 1440])
    old = [with_rms(piece, each)]
    one, two, *rest = again(old, [0, 720, 1440])
    assert torch.equal(one, each[:2]) and torch.equal(two, each[2:]) and not rest
    # The second expert is cut after its ninth row.
    one, two, three, four = again(old, [0, 540, 1440])
    assert torch.equal(one, each[:1]) and torch.equal(two, each[1]) and torch.equal(three, each[1])
    assert torch.equal(four, each[2:])
    pieces = pieces_of([0, 540, 1440])
    cut = [with_rms(p, last) for p, last in zip(pieces, (each[:1], each[1], each[2], each[2:]), strict=True)]
    (back,) = again(cut, [0, 1440])
    assert torch.equal(back[[0, 2, 3]], each[[0, 2, 3]])
    torch.testing.assert_close(back[1], ((each[1] ** 2 + each[2] ** 2) / 2).sqrt())
    # A checkpoint in which the parameter was measured as a whole.
    assert torch.equal(with_rms(piece, torch.tensor([1.0, 2.0])).state["rms"]["last"], torch.tensor([[1.0, 2.0]] * 4))


def covariances(steps, rows=slice(None)):
    """(saved optimizer, state of Sketchy) of some of the experts."""
    p = torch.nn.Parameter(torch.zeros(WHOLE)[rows])
    optimizer = Sketchy([p], rank=5, update_freq=3, min_compress_size=0, fused=False)
    for g in steps:
        p.grad = g[rows].clone()
        optimizer.step()
    return SavedOptimizer(optimizer.state_dict()["param_groups"]), optimizer._state_of(next(optimizer.held())[2])


def test_whole_experts_keep_the_bits_of_their_covariances():
    steps = [torch.randn(WHOLE, generator=torch.Generator().manual_seed(s)) for s in range(5)]
    k, state = covariances(steps)
    (piece,) = shards(k, 1)
    old = [k.held(piece, 0, torch.float32, {**state, "place": piece.place}, "the whole")]
    for world in (2, 4):
        for piece in shards(k, world):
            new = k.recut(old, piece, 0, torch.float32, Report(None, "", "", 1, world))
            experts = slice(piece.row, piece.row + piece.shape[0])
            for name, tensor in new["preconditioner"].items():
                assert torch.equal(tensor, state["preconditioner"][name][experts]), name
    parts = [k.held(p, 0, torch.float32, k.recut(old, p, 0, torch.float32, Report(None, "", "", 1, 4)), "a part")
             for p in shards(k, 4)]  # fmt: skip
    again = k.recut(parts, shards(k, 1)[0], 0, torch.float32, Report(None, "", "", 4, 1))
    for name, tensor in again["preconditioner"].items():
        assert torch.equal(tensor, state["preconditioner"][name]), name


def test_pieces_of_one_expert_get_their_share_of_its_covariances():
    """A flat partition cuts experts: each piece's covariances come from its own expert's, and from no other's."""
    steps = [torch.randn(WHOLE, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    for g in steps:
        g[2] = 0
    k, state = covariances(steps)
    (piece,) = shards(k, 1)
    old = [k.held(piece, 0, torch.float32, {**state, "place": piece.place}, "the whole")]
    held = []
    for piece in flat(k, 3):
        made = k.recut(old, piece, 0, torch.float32, Report(None, "", "", 1, 3))
        held.append(k.held(piece, 0, torch.float32, made, "a piece"))  # which checks it
    total = torch.zeros(4)
    for h in held:
        if h.preconditioner is None:
            continue
        rows = h.state["preconditioner"]["trace_0_0"].reshape(-1)
        for n, trace in enumerate(rows):
            total[h.box.matrices.lo + n] += trace
    whole = state["preconditioner"]["trace_0_0"] + 0
    assert total[2] == 0 and (total[[0, 1, 3]] > 0).all()
    assert (total <= 2 * whole + 1e-6).all()
    back = k.recut(held, shards(k, 1)[0], 0, torch.float32, Report(None, "", "", 3, 1))
    assert back["preconditioner"]["vectors_0_0"].shape == (4, 18, 5)
    assert back["preconditioner"]["trace_0_0"][2] == 0


def test_state_of_the_old_layout_is_cut_in_the_old_layout():
    """A checkpoint without the option: the rows are dimension 0."""
    (group,) = CSAdam([torch.nn.Parameter(torch.zeros(1))], min_compress_size=0).state_dict()["param_groups"]
    del group["batch_dims"]
    k = SavedOptimizer([group])
    assert [p.shape for p in k.pieces([Fragment(0, WHOLE, 30, 720, 0)], 0)] == [(1, 330), (1, 18, 20), (1, 30)]
    (piece,) = shards(k, 1)
    held = k.held(piece, 0, torch.float32)
    assert held.matrix == (4, 360) and held.stores["second_moment"].matrices == 1
    new = kept()
    assert [p.shape for p in new.pieces([Fragment(0, WHOLE, 30, 720, 0)], 0)] == [
        (1, 10), (16, 20), (1, 18, 20), (1, 20), (1, 10),
    ]  # fmt: skip
    with pytest.raises(CannotReshard, match="first_moment"):
        new.held(piece, 0, torch.float32, trained(k, piece, [torch.ones(WHOLE)]).state, "it")

"""`embedding_rate`: matrices of vocabularies whose rows share buckets take longer steps."""

import copy

import pytest
import torch

from sketch_plugins import CSAdam, CSRMSprop, Sketchy
from sketch_plugins.optim import layout
from sketch_plugins.sharding.parts import Part

pytestmark = pytest.mark.filterwarnings(
    "ignore:fused=True. a parameter of shape", "ignore:parameter group 0. lr=0.1 is 100 times"
)
SHAPES = [(46, 8), (60, 50), (30,), (100, 7), (50, 60), (9, 8)]
LONG = [True, False, False, True, False, False]


@pytest.fixture
def small(monkeypatch):
    """Small tensors count as vocabularies, so that the interpreter is fast enough."""
    monkeypatch.setattr(layout, "is_vocabulary", lambda whole: len(whole) == 2 and whole[0] > 4 * whole[1])


def made(shapes):
    return [
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(n)) * 0.1)
        for n, shape in enumerate(shapes)
    ]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for n, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n)).to(p.device)
        optimizer.step()


OPTIONS = [
    (CSAdam, {}),
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"preset": "lean", "lagged_rms": True}),
    (CSAdam, {"depth": 2, "hash": "affine", "first_moment": "fp32"}),
    (CSRMSprop, {}),
]


@pytest.mark.parametrize(("cls", "options"), OPTIONS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_is_a_group_with_twice_the_rate(cls, options, fused, small):
    """Bit for bit, in first and in remembered steps, and after the rate has changed."""
    options = {"lr": 1e-3, "weight_decay": 0.0, "fused": fused, "min_compress_size": 0, "compression": 0.2, **options}
    ours, theirs = made(SHAPES), made(SHAPES)
    optimizer = cls(ours, embedding_rate=2.0, **options)
    groups = [{"params": [p], "lr": 2e-3 if long else 1e-3} for p, long in zip(theirs, LONG, strict=True)]
    other = cls(groups, embedding_rate=1.0, **options)
    train(optimizer, ours, 4)
    train(other, theirs, 4)
    assert all(map(torch.equal, ours, theirs))
    optimizer.param_groups[0]["embedding_rate"] = 4.0
    for group, long in zip(other.param_groups, LONG, strict=True):
        group["lr"] = 4e-3 if long else 1e-3
    train(optimizer, ours, 3, first=4)
    train(other, theirs, 3, first=4)
    assert all(map(torch.equal, ours, theirs))


def test_with_counters_on_the_device(monkeypatch, small):
    """``capturable``: the numbers of a step are computed on the device, for each factor, also in remembered groups."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in made(SHAPES)]
        options = {"min_compress_size": 0, "compression": 0.2, "first_moment": "fp32", "capturable": capturable}
        optimizer = CSAdam(params, lr=1e-3, fused=True, **options)
        train(optimizer, params, 4)
        found.append(params)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_weight_decay_does_not_have_it(small):
    p = torch.nn.Parameter(torch.ones(400, 64))
    optimizer = CSAdam([p], min_compress_size=0, lr=0.1, weight_decay=0.5, fused=False)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, 1 - 0.1 * 0.5))


def test_row_sparse_steps_do_not_have_it(small):
    found = []
    for rate in (1.0, 2.0):
        (p,) = made([(5000, 64)])
        optimizer = CSAdam([p], embedding_rate=rate, fused=False)
        index = torch.tensor([[5, 700, 4000]])
        for _ in range(2):
            p.grad = torch.sparse_coo_tensor(index, torch.ones(3, 64), p.shape, check_invariants=True)
            optimizer.step()
        found.append(p)
    assert torch.equal(*found)


def factor(shape, cls=CSAdam, **options):
    p = torch.nn.Parameter(torch.empty(shape, device="meta"))
    optimizer = cls([p], **options)
    return optimizer._rate_factor(p, optimizer.param_groups[0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8192, 256), 2.0),
        ((30522, 768), 2.0),
        ((128256, 4096), 2.0),
        ((8191, 256), 1.0),
        ((8192, 127), 1.0),
        ((14336, 16), 1.0),  # LoRA
        ((14336, 4096), 1.0),  # hidden layers
        ((28672, 8192), 1.0),
        ((4096, 14336), 1.0),
        ((256, 8192), 1.0),  # rows share buckets, and these are no words
        ((32000, 4096), 1.0),
        ((1 << 20,), 1.0),
        ((8192, 16, 16), 1.0),
    ],
)
def test_which_parameters(shape, expected):
    assert factor(torch.Size(shape)) == expected


def test_rows_with_state_of_their_own_have_no_factor():
    shape = (8192, 128)
    assert factor(shape) == 2.0 and factor(shape, embedding_rate=3) == 3.0
    assert factor(shape, preset="lean") == 2.0 and factor(shape, CSRMSprop) == 2.0
    for options in (
        {"second_moment": "dense"},
        {"second_moment": "row_count_min"},
        {"second_moment": "cover"},
        {"compression": 1.0},
        {"min_compress_size": 8192 * 128 + 1},
        {"preset": "exact"},
        {"preset": "paper_cs_v"},
        {"embedding_rate": 1.0},
    ):
        assert factor(shape, **options) == 1.0, options
    assert factor(shape, Sketchy) == 1.0  # it has the factor for what is preconditioned along one axis


def test_every_rank_decides_by_the_whole_parameter():
    p = torch.nn.Parameter(torch.zeros(8192, 128))
    optimizer = CSAdam([p])
    group = optimizer.param_groups[0]
    for shape in ((3, 128), (1, 128), (7,)):  # a shard, one row of it, and a part of a row
        data = torch.zeros(shape)
        assert optimizer._rate_factor(Part(data, data, 0, (8192, 128)), group) == 2.0


def test_checkpoints_of_earlier_versions_go_on_without_it(small):
    p, q = made([(500, 64)]), made([(500, 64)])
    writer, reader = CSAdam(p, embedding_rate=1.0), CSAdam(q)
    train(writer, p, 2)
    train(reader, q, 1)
    saved = copy.deepcopy(writer.state_dict())
    del saved["param_groups"][0]["embedding_rate"]
    reader.load_state_dict(saved)
    assert reader.param_groups[0]["embedding_rate"] == 1.0
    with torch.no_grad():
        q[0].copy_(p[0])
    train(writer, p, 2, first=2)
    train(reader, q, 2, first=2)
    assert torch.equal(p[0], q[0])


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), "2x"])
def test_values_that_are_not_allowed(value):
    with pytest.raises(ValueError, match=r"embedding_rate.*a number > 0"):
        CSAdam(made([(4, 4)]), embedding_rate=value)

"""benchmarks/quality: the table of peers, the bytes of their state, and the search of a rate."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("tqdm")
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)
from quality import peers, summary, sweep  # noqa: E402

HERE = [name for name in peers.PEERS if peers.missing(name) is None]
ABSENT = [name for name in peers.PEERS if name not in HERE]
#: The first use of each compiles for tens of seconds.
COMPILED = {name for name in HERE if name.endswith("torchao")}


class Small(nn.Module):
    heads = 4

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(300, 32)
        self.query, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 300)

    def forward(self, x):
        h = self.words(x)
        return self.head(self.down(torch.tanh(self.up(torch.tanh(self.query(h))))))


def trained(name, steps, lr):
    torch.manual_seed(0)
    model = Small()
    optimizer = peers.PEERS[name].build(model, lr)
    x = torch.randint(0, 300, (64,))
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


def test_torchs_own_peers_need_no_package():
    assert {"adamw", "sgd", "adafactor", "muon"} <= set(HERE)


@pytest.mark.parametrize("name", [name for name in HERE if name not in COMPILED])
def test_a_peer_lowers_the_loss(name):
    lr = peers.PEERS[name].start
    model, optimizer, losses = trained(name, 30, lr)
    assert losses[-1] < losses[0]
    covered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert covered == {id(p) for p in model.parameters()}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5 * lr}


@pytest.mark.parametrize("name", ABSENT)
def test_a_peer_that_is_not_installed_is_named_with_its_package(name):
    reason = peers.missing(name)
    assert any(package in reason for package in peers.PEERS[name].needs)
    assert "is not installed" in reason or "cannot be imported" in reason


def test_every_peer_has_a_title_and_none_is_named_like_one_of_ours():
    assert set(summary.TITLES) == set(peers.PEERS) | set(summary.OURS)
    assert not set(peers.PEERS) & set(summary.OURS)
    assert len(set(summary.TITLES.values())) == len(summary.TITLES)


def test_muon_has_the_hidden_matrices_and_adamw_the_rest():
    model, optimizer, _ = trained("muon", 2, 1e-3)
    muon = optimizer.parts[0]
    assert {p.shape for group in muon.param_groups for p in group["params"]} == {(32, 32), (64, 32), (32, 64)}
    total = sum(p.numel() for p in model.parameters())
    hidden = sum(p.numel() for group in muon.param_groups for p in group["params"])
    assert peers.state_bytes(optimizer) == 4 * hidden + 8 * (total - hidden)


@pytest.mark.parametrize(("name", "each"), [("adamw", 8), ("sgd", 4)])
def test_bytes_of_dense_state(name, each):
    model, optimizer, _ = trained(name, 2, 1e-3)
    assert peers.state_bytes(optimizer) == each * sum(p.numel() for p in model.parameters())


def test_bytes_are_those_of_the_memory_behind_the_state():
    """Lists, objects, parts of a larger tensor, tensors of tensors; each piece of memory once, weights never."""

    class Held:
        def __init__(self):
            self.matrix = torch.zeros(3, 3)

    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes, made.scale = codes, scale
            return made

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("counting bytes computes nothing")

    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], 0.1)
    shared = torch.zeros(10)
    quantized = Wrapped(torch.zeros(8, dtype=torch.uint8), torch.zeros(2))
    optimizer.state[p] = {"step": torch.tensor(3.0), "count": 7, "name": "a", "none": None, "weight": p.detach()}
    optimizer.state[p] |= {"slice": shared[:2], "again": [shared, shared], "object": Held(), "quantized": quantized}
    assert peers.state_bytes(optimizer) == 40 + 36 + 8 + 8


def asked(plan, value):
    """Every run that a plan asks for, with what it returns."""
    runs = []
    try:
        wanted = next(plan)
        while True:
            runs += wanted
            wanted = plan.send([value(lr, seed) for lr, seed in wanted])
    except StopIteration as end:
        return runs, end.value


@pytest.mark.parametrize("start", [1e-5, 1e-3, 0.3])
def test_a_search_ends_inside(start):
    def bowl(lr, seed):
        return abs(math.log2(lr / 2.6e-3))

    runs, best = asked(sweep.search(start, 1, most=40), bowl)
    assert abs(math.log2(best / 2.6e-3)) <= 0.5
    values = {lr: bowl(lr, 1) for lr, _ in runs}
    assert len(values) == len(runs) and sweep.ends_inside(values)


def test_a_search_leaves_rates_that_diverge():
    runs, best = asked(sweep.search(1.0, 1), lambda lr, seed: math.inf if lr > 0.01 else 1 + abs(lr - 0.004))
    assert 0.002 < best < 0.008 and len(runs) <= sweep.MOST
    runs, best = asked(sweep.search(1.0, 1), lambda lr, seed: math.inf)
    assert best is None and len(runs) == sweep.MOST


def test_a_search_without_an_end_stops_and_is_not_inside():
    runs, best = asked(sweep.search(1.0, 1, most=6), lambda lr, seed: -lr)
    assert len(runs) == 6 and best == max(lr for lr, _ in runs)
    assert not sweep.ends_inside({lr: -lr for lr, _ in runs})


def test_other_seeds_are_run_at_the_best_rate_only():
    runs, _ = asked(sweep.swept(1e-3, [4, 5, 6]), lambda lr, seed: abs(lr - 2e-3))
    assert [run for run in runs if run[1] != 4] == [(0.002, 5), (0.002, 6)]
    assert {0.001, 0.002, 0.004} <= {lr for lr, seed in runs if seed == 4}

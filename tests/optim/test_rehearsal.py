"""Every buffer of an eager step is allocated before the step changes anything, so no allocation fails half-way."""

import pytest
import torch

from sketch_plugins import registry, scratch
from sketch_plugins.optim import rehearsal
from sketch_plugins.optim.taking import Taking
from sketch_plugins.stores import Gradient

OPTIONS = [
    {},
    {"hash": "affine", "depth": 3},
    {"update_clip": 1.0, "scale_parameter": True},
    {"update_clip": 1.0, "lagged_rms": True},
    {"second_moment": "row_count_min"},
    {"second_moment": "cover"},
    {"table_dtype": "bf16", "first_moment_rounding": "stochastic", "stochastic_rounding": True},
    {"weight_bits": 24, "update_clip": 1.0, "decoupled_weight_decay": False},
    {"weight_bits": 32, "lagged_rms": True},
]


def cases():
    for name in registry.names():
        known, seen = registry.get(name).options, []
        for options in OPTIONS:
            own = {
                key: value for key, value in options.items()
                if key in known and (not known[key].choices or value in known[key].choices)
            }  # fmt: skip
            if own not in seen:
                seen.append(own)
                yield pytest.param(name, own, id=f"{name}-{own}")


@pytest.mark.parametrize(("name", "options"), [*cases()])
def test_no_buffer_is_allocated_within_a_step(name, options, monkeypatch):
    within, grown, calls = [], [], []
    commit, allocated = Taking._commit, scratch._grown

    def committing(self, *args):
        within.append(self)
        try:
            commit(self, *args)
        finally:
            within.pop()

    def growing(slot, n):
        buffer = scratch._ARENA.slots.get(slot)
        calls.extend(within)
        if within and (buffer is None or buffer.numel() < n):
            grown.append((slot[0], n))
        return allocated(slot, n)

    monkeypatch.setattr(Taking, "_commit", committing)
    monkeypatch.setattr(scratch, "_grown", growing)
    for shape in ((300, 70), (3, 2500), (6, 40, 33), (77,)):
        p = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
        optimizer = registry.get(name).cls([p], fused=False, chunk_size=700, min_compress_size=0, **options)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
            assert not grown, f"{shape}: {grown}"
    assert calls  # steps ask for buffers


def test_a_rehearsal_looks_at_one_tile_of_each_shape(monkeypatch):
    """For a tensor of many tiles it takes no more operations than for one of a few."""
    looked, get = [], Gradient.get
    monkeypatch.setattr(Gradient, "get", lambda self, at: looked.append(self.device.type) or get(self, at))
    monkeypatch.setattr(rehearsal, "REHEARSED", {})
    found = []
    for rows in (40, 4000):
        p = torch.nn.Parameter(torch.randn(rows, 64))
        optimizer = registry.get("cs_adam").cls([p], fused=False, chunk_size=640, min_compress_size=0, width=10)
        p.grad = torch.randn_like(p)
        looked.clear()
        optimizer.step()
        found.append((looked.count("meta"), looked.count("cpu")))
    assert found[0][0] == found[1][0] == 2 and found[1][1] == 100 * found[0][1]


@pytest.mark.parametrize("name", registry.names())
def test_layers_that_are_alike_are_rehearsed_once(name, monkeypatch):
    """For all optimizers and learning rates; any other option makes another step."""
    looked, get = [], Gradient.get
    monkeypatch.setattr(Gradient, "get", lambda self, at: looked.append(self.device.type) or get(self, at))
    monkeypatch.setattr(rehearsal, "REHEARSED", {})

    def rehearsed(count, shape=(40, 24), **options):
        params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(count)]
        optimizer = registry.get(name).cls(params, fused=False, min_compress_size=0, **{"lr": 0.01, **options})
        for p in params:
            p.grad = torch.randn_like(p)
        looked.clear()
        optimizer.step()
        return looked.count("meta")

    first = rehearsed(1)
    # Preconditioned ones are taken together: of several one is looked at, too, as their number decides about sizes.
    together = name == "sketchy"
    assert first > 0 and rehearsed(5) == together * first and rehearsed(2, lr=0.5) == together * first
    assert rehearsed(5, lr=0.5) == rehearsed(2) == rehearsed(1) == 0
    assert rehearsed(3, chunk_size=100) >= first and rehearsed(3, shape=(40, 25)) == first

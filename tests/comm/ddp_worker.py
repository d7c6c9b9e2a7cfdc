"""One rank of the tests of the communication hook: ``ddp_worker.py CHECK[,CHECK...] [FOLDER]``."""

import contextlib
import copy
import functools
import io
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from sketch_plugins import MemSGD, registry
from sketch_plugins.comm import BlockTopK, CountSketchTopK, MemSGDState, RandK, TopK, attach, memsgd_hook, redistribute

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SMALL = {"min_size": 20}
COMPRESSORS = {
    "topk": TopK(),
    "block_topk": BlockTopK(block=64),
    "randk": RandK(seed=3),
    "count_sketch": CountSketchTopK(depth=3, width=1.0),
}


class Net(torch.nn.Module):
    """Vectors, matrices and a convolution, one of them channels_last; their order is not that of the backward pass."""

    def __init__(self, unused=False, sparse=False):
        super().__init__()
        self.head = torch.nn.Linear(24, 11)
        self.embed = torch.nn.Embedding(37, 24, sparse=sparse)
        self.conv = torch.nn.Conv2d(1, 3, 3, padding=1)
        self.inner = torch.nn.Linear(24, 24)
        self.gone = torch.nn.Linear(24, 24) if unused else None
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x, branch=False):
        h = self.embed(x)
        h = h + self.conv(h.unsqueeze(1)).mean(1)
        h = torch.tanh(self.inner(h))
        return self.head(self.gone(h) if branch else h)


class Sum(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self):
        return self.p.sum()


def build(dtype=torch.float32, bucket_cap_mb=0.003, seed=0, hook=True, find_unused_parameters=False, **options):
    """Buckets of 3 kB: several of them, which are sorted again after the first iteration."""
    torch.manual_seed(seed)
    model = Net(unused=options.pop("unused", False), sparse=options.pop("sparse", False)).to(dtype)
    ddp = DDP(
        model,
        bucket_cap_mb=bucket_cap_mb,
        **{"find_unused_parameters": find_unused_parameters, **options.pop("ddp", {})},
    )
    return ddp, attach(ddp, **{**SMALL, **options}) if hook else None


@torch.no_grad()
def measured(ddp):
    return float(loss_of(ddp.module, 0, 0))


def loss_of(model, step, rank, **kwargs):
    g = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randint(0, 37, (4, 9), generator=g)
    y = model(x, **kwargs)
    return torch.nn.functional.cross_entropy(y.flatten(0, 1), x.flatten() % 11)


def train(ddp, optimizer, steps, first=0, **kwargs):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(ddp, step, RANK, **kwargs).backward()
        optimizer.step()


def grads(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def same_everywhere(value):
    every = [None] * WORLD
    dist.all_gather_object(every, value)
    assert all(torch.equal(torch.nan_to_num(value), torch.nan_to_num(other)) for other in every), "replicas differ"


def raises(said, function):
    try:
        function()
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"no ValueError that says {said!r}")


def sum_of_sketches(c, vectors, key, tables):
    tables.copy_(sum(c.sketch(x, tables.shape[1], key) for x in vectors))


class Reference:
    """All ranks in one process, written without the hook's code: dense tensors, a loop over ranks and parameters."""

    def __init__(self, model, compressor, start=2, density=0.1, min_size=20):
        self.model, self.compressor, self.start, self.density = model, compressor, start, density
        self.memory = {n: [torch.zeros_like(p).flatten() for _ in range(WORLD)] for n, p in model.named_parameters()}
        self.min_size, self.step = min_size, 0

    def gradients(self):
        every = []
        for rank in range(WORLD):
            self.model.zero_grad()
            loss_of(self.model, self.step, rank).backward()
            every.append({n: flat(p.grad) for n, p in self.model.named_parameters()})
        out = {}
        for key, (n, p) in enumerate(self.model.named_parameters()):
            d = p.numel()
            c = self.compressor
            if (
                self.step < self.start
                or d < self.min_size
                or c.wire_bytes(d, self.density, p.element_size()) >= p.nbytes
            ):
                out[n] = sum(g[n] / WORLD for g in every)
                continue
            memory = self.memory[n]
            for m, g in zip(memory, every, strict=True):
                m += g[n]
            picked = []
            for m in memory:
                summed = functools.partial(sum_of_sketches, c, memory, key)
                payload = c.compress(m, self.density, step=self.step, key=key, reduce=summed)
                picked.append(c.decompress(payload, d, self.density))
            for m, sent in zip(memory, picked, strict=True):
                m -= sent
            out[n] = sum(sent / WORLD for sent in picked)
        self.step += 1
        return out


def flat(tensor):
    """A flat tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).clone()


def check_reference():
    """Every compressor equals the simulation, bit for bit if the order of sums is known (gathered payloads)."""
    for name, compressor in COMPRESSORS.items():
        ddp, state = build(compressor=compressor, density=0.1)
        alone = copy.deepcopy(ddp.module)
        reference = Reference(alone, compressor)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (ddp, alone)]
        for step in range(8):
            ddp.zero_grad()
            loss_of(ddp, step, RANK).backward()
            expected = reference.gradients()
            for n, p in ddp.module.named_parameters():
                got = flat(p.grad)
                if compressor.shared or step < 2:  # gloo sums in an order of its own
                    assert torch.allclose(got, expected[n], rtol=1e-5, atol=1e-8), (name, step, n)
                else:
                    assert torch.equal(got, expected[n]), (name, step, n, (got - expected[n]).abs().max())
            for p, q in zip(ddp.parameters(), alone.parameters(), strict=True):
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        same_everywhere(weights(ddp))
        assert state.iteration == 8 and state.last_wire_bytes < state.last_dense_bytes


def check_telescopes():
    """Applied gradients plus the mean of the memories are the sum of all gradients: in float64 to 1e-12."""
    for compressor in COMPRESSORS.values():
        ddp, state = build(dtype=torch.float64, compressor=compressor, density=0.05)
        alone = copy.deepcopy(ddp.module)
        applied = total = 0.0
        for step in range(20):
            ddp.zero_grad()
            alone.zero_grad()
            loss_of(ddp, step, RANK).backward()
            for rank in range(WORLD):
                (loss_of(alone, step, rank) / WORLD).backward()
            applied = applied + torch.cat([flat(p.grad) for p in ddp.parameters()])
            total = total + torch.cat([flat(p.grad) for p in alone.parameters()])
        pending = torch.cat([
            state.memory[n]["error"] if n in state.memory else torch.zeros(p.numel(), dtype=p.dtype)
            for n, p in ddp.module.named_parameters()
        ])  # fmt: skip
        dist.all_reduce(pending)
        error = (applied + pending / WORLD - total).abs().max()
        assert error < 1e-12, error
        assert pending.norm() > 1e-3


class NaiveDGC:
    """Deep Gradient Compression of all ranks in one process, from its paper: dense tensors, no code of the package.

    For top-k of each parameter. It has a density schedule of its own.
    """

    def __init__(self, model, beta, start, warmup, density, min_size, masking=True):
        self.model, self.beta, self.start, self.warmup, self.density = model, beta, start, warmup, density
        self.min_size, self.masking, self.step = min_size, masking, 0
        self.u, self.v = ({n: [torch.zeros(p.numel(), dtype=p.dtype) for _ in range(WORLD)]
                           for n, p in model.named_parameters()} for _ in "uv")  # fmt: skip

    def gradients(self):
        t = self.step - self.start
        share = self.density if t >= self.warmup else 0.25 * (self.density / 0.25) ** (t / self.warmup)
        out = {n: torch.zeros(p.numel(), dtype=p.dtype) for n, p in self.model.named_parameters()}
        for rank in range(WORLD):
            self.model.zero_grad()
            loss_of(self.model, self.step, rank).backward()
            for n, p in self.model.named_parameters():
                u, v, d = self.u[n][rank], self.v[n][rank], p.numel()
                u.copy_(self.beta * u + flat(p.grad))
                v += u
                k = max(1, round(share * d))
                # An index takes 4 bytes, a number 8: from a density of 2 / 3 on, sending all numbers takes fewer bytes.
                if self.step < self.start or d < self.min_size or k * 12 >= d * 8:
                    out[n] += v / WORLD
                    v.zero_()
                    continue
                picked = v.abs() >= v.abs().kthvalue(d - k + 1).values
                out[n] += torch.where(picked, v, 0.0) / WORLD
                v[picked] = 0.0
                if self.masking:
                    u[picked] = 0.0
        self.step += 1
        return out


def check_momentum():
    """DGC's velocities equal a naive simulation: in the first steps, in the warm-up, of small parameters, and after."""
    for masking in (True, False):
        # The convolution's channels have equal gradients, of which any may be picked, so it is sent whole.
        options = {"density": 0.02, "start": 3, "warmup": 6, "min_size": 40}
        ddp, _ = build(dtype=torch.float64, compressor="topk", momentum=0.9, factor_masking=masking, **options)
        alone = copy.deepcopy(ddp.module)
        naive = NaiveDGC(alone, 0.9, masking=masking, **options)
        for step in range(16):
            ddp.zero_grad()
            loss_of(ddp, step, RANK).backward()
            expected = naive.gradients()
            with torch.no_grad():
                for (n, p), q in zip(ddp.module.named_parameters(), alone.parameters(), strict=True):
                    assert torch.allclose(flat(p.grad), expected[n], rtol=1e-9, atol=1e-14), (masking, step, n)
                    q.copy_(p.add_(p.grad, alpha=-0.05))
    # Parameters that are sent whole (at density 1, before the start, small ones) follow SGD with momentum, to rounding.
    plain, _ = build(dtype=torch.float64, hook=False)
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), 20)
    for options in ({"density": 1.0}, {"density": 0.01, "start": 1000}, {"density": 0.01, "min_size": 10**6}):
        ddp, state = build(dtype=torch.float64, momentum=0.9, **options)
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.05), 20)
        assert (weights(ddp) - weights(plain)).abs().max() < 1e-12, options
        assert state.memory_norm() == 0 and state.memory_bytes() == 2 * 8 * weights(ddp).numel()
    # Every gradient is clipped, in whichever way it is sent.
    whole, _ = build(dtype=torch.float64, density=1.0, clip=0.01)
    loss_of(whole, 0, RANK).backward()
    alone = copy.deepcopy(whole.module)
    total = [torch.zeros_like(p) for p in alone.parameters()]
    for rank in range(WORLD):
        alone.zero_grad()
        loss_of(alone, 0, rank).backward()
        for t, p in zip(total, alone.parameters(), strict=True):
            t += p.grad * min(1.0, 0.01 / WORLD**0.5 / float(p.grad.norm())) / WORLD
    for t, p in zip(total, whole.parameters(), strict=True):
        assert torch.allclose(t, p.grad, rtol=1e-9, atol=1e-15)
    assert sum(float(t.norm()) for t in total) < 0.9 * sum(float(p.grad.norm()) for p in alone.parameters())


def check_masking():
    """The velocity of entries that were picked but not sent stays: a rank without a gradient sends zeros."""
    for density in (0.1, 1.0):
        ddp, state = build(density=density, unused=True, find_unused_parameters=True, dtype=torch.float64, momentum=0.9)
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 3, branch=True)
        before = {kind: t.clone() for kind, t in state.memory["gone.weight"].items()}
        ddp.zero_grad()
        loss_of(ddp, 3, RANK, branch=RANK == 0).backward()
        after = state.memory["gone.weight"]
        if RANK != 0:
            assert before["momentum"].count_nonzero() > 100
            assert torch.equal(after["momentum"], 0.9 * before["momentum"])
            assert torch.allclose(after["error"], before["error"] + after["momentum"], rtol=1e-12, atol=0)


def check_dense():
    """Density 1 is DistributedDataParallel without a hook, bit for bit; so are the iterations before the start."""
    plain, _ = build(hook=False)
    whole, state = build(density=1.0)
    late, waiting = build(density=0.01, start=1000)
    for ddp in (plain, whole, late):
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9), 10)
    assert torch.equal(weights(plain), weights(whole)) and torch.equal(weights(plain), weights(late))
    assert state.compression == waiting.compression == 1.0 and not state.memory and not waiting.memory


class Small(torch.nn.Module):
    """Logistic regression with 960 weights, for many steps."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(48, 20)
        self.target = torch.randn(48, 20, generator=torch.Generator().manual_seed(9))  # a buffer would be broadcast

    def forward(self, step, rank):
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(1000 * step + rank))
        return torch.nn.functional.cross_entropy(self.head(x), (x @ self.target).argmax(1))


def check_replicas():
    """Hundreds of steps with each compressor: every replica has the same bits, and the loss has fallen."""
    for name, steps, options in (
        ("block_topk", 400, {"momentum": 0.9, "warmup": 100, "clip": 1.0}),
        ("topk", 200, {"memory_dtype": "bf16", "clip": 10.0}),
        ("randk", 200, {}),
        ("count_sketch", 200, {}),
    ):
        torch.manual_seed(0)
        ddp = DDP(Small())
        compressor = {**COMPRESSORS, "count_sketch": CountSketchTopK()}[name]
        state = attach(ddp, compressor=compressor, density=0.02, **SMALL, **options)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.02 if "momentum" in options else 0.1)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = ddp(step, RANK)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if (step + 1) % 100 == 0:
                same_everywhere(weights(ddp))
        first, last = float(sum(losses[:50]) / 50), float(sum(losses[-50:]) / 50)
        assert last < 0.93 * first, (name, first, last)
        assert state.iteration == steps and math.isfinite(state.memory_norm()) and state.compression < 0.4


def check_variants():
    """Each way to make a DistributedDataParallel, in several buckets, has the bits of the plain one; half precision."""
    ways = ({"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True},
            {"static_graph": True, "gradient_as_bucket_view": True})  # fmt: skip
    for name, compressor in COMPRESSORS.items():
        expected = None
        for way in ({}, *ways):
            ddp, state = build(compressor=compressor, density=0.05, momentum=0.5 * (name == "topk"), ddp=way)
            train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 6)
            expected = weights(ddp) if expected is None else expected
            assert torch.equal(weights(ddp), expected), (name, way)
            assert state.iteration == 6 and state.last_wire_bytes < 0.6 * state.last_dense_bytes
        for options in ({}, {"momentum": 0.9, "memory_dtype": "bf16"}):
            ddp, state = build(dtype=torch.bfloat16, compressor=compressor, density=0.05, **options)
            before = measured(ddp)
            train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.3 if not options else 0.05), 20)
            same_everywhere(weights(ddp))
            assert measured(ddp) < before, (name, before)
            assert all(p.grad.dtype == torch.bfloat16 for p in ddp.parameters())


def check_registry():
    """Every optimizer of the registry behind the hook, and MemSGD: it trains, and replicas are equal."""
    for name in (*registry.names(), "mem_sgd"):
        ddp, state = build(density=0.05)
        if name == "mem_sgd":
            optimizer = MemSGD(ddp.parameters(), lr=0.3, density=0.5)
        else:
            cls = registry.get(name).cls
            own = {"min_compress_size": 64} if "min_compress_size" in registry.get(name).options else {}
            optimizer = cls(ddp.parameters(), lr=0.02, **own)
        before = measured(ddp)
        train(ddp, optimizer, 12)
        assert measured(ddp) < before, name
        same_everywhere(weights(ddp))
        assert state.compression < 0.5


def check_no_sync():
    """Accumulation without the hook: it is called once for two backward passes, with the sum of both gradients."""
    one, state = build(density=0.1, compressor="topk")
    two, other = build(density=0.1, compressor="topk")
    for step in range(6):
        for ddp in (one, two):
            ddp.zero_grad()
        with one.no_sync():
            loss_of(one, step, RANK).backward()
        loss_of(one, step + 100, RANK).backward()
        (loss_of(two, step, RANK) + loss_of(two, step + 100, RANK)).backward()
        for (n, a), b in zip(one.module.named_parameters(), two.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), n
    assert state.iteration == other.iteration == 6


class Overflow:
    """A hook that makes a parameter's gradient overflow in one backward pass, counted from 0."""

    def __init__(self, when):
        self.when, self.calls = when, -1

    def __call__(self, grad):
        self.calls += 1
        return grad * math.inf if self.calls == self.when else grad


def check_nonfinite():
    """An infinity on one rank in one of several buckets gives NaN there on all ranks, and no sent entry is lost.

    The step is skipped. Applied gradients and memories are the sum of all gradients except that one.
    """
    for compressor, options in (*((c, {}) for c in COMPRESSORS.values()), (TopK(), {"momentum": 0.9, "masking": False}),
                                (TopK(), {"momentum": 0.9, "density": 1.0, "masking": False})):  # fmt: skip
        options = {"density": 0.05, **options}
        beta, masking = options.get("momentum", 0.0), options.pop("masking", True)
        ddp, state = build(compressor=compressor, dtype=torch.float64, factor_masking=masking, **options)
        alone = copy.deepcopy(ddp.module)
        names = [n for n, _ in alone.named_parameters()]
        ddp.module.inner.weight.register_hook(Overflow(5 if RANK == WORLD - 1 else -1))
        applied, velocity, total = ([torch.zeros(p.numel(), dtype=p.dtype) for p in alone.parameters()] for _ in "avt")
        for step in range(9):
            bad = step == 5
            ddp.zero_grad()
            loss_of(ddp, step, RANK).backward()
            gradients = [torch.zeros(p.numel(), dtype=p.dtype) for p in alone.parameters()]
            for rank in range(WORLD):
                alone.zero_grad()
                loss_of(alone, step, rank).backward()
                for n, g, p in zip(names, gradients, alone.parameters(), strict=True):
                    g += 0.0 if bad and n == "inner.weight" and rank == WORLD - 1 else flat(p.grad) / WORLD
            for i, g in enumerate(gradients):
                if beta and bad and names[i] == "inner.weight":
                    continue  # one rank's velocity has changed and the other's has not: checked below
                velocity[i] = beta * velocity[i] + g
                total[i] += velocity[i]
            if bad:
                spoilt = {n for n, p in ddp.module.named_parameters() if p.grad.isnan().any()}
                assert all(p.grad.isnan().all() for n, p in ddp.module.named_parameters() if n in spoilt) or (
                    options["density"] == 1.0
                )
                # In the first backward pass this bucket has one or two parameters; other buckets have been sent.
                assert "inner.weight" in spoilt and len(spoilt) < len(names)
                sent = sum(float(p.grad.norm()) for n, p in ddp.module.named_parameters() if n not in spoilt)
                assert sent > 0
                continue
            for a, p in zip(applied, ddp.parameters(), strict=True):
                a += flat(p.grad)
        for n, a, t in zip(names, applied, total, strict=True):
            pending = state.memory[n]["error"].clone() if n in state.memory else torch.zeros_like(a)
            assert pending.isfinite().all()
            dist.all_reduce(pending)
            if not (beta and n == "inner.weight") and (n in state.memory or beta):
                assert (a + pending / WORLD - t).abs().max() < 1e-12, (compressor, n)


def check_put_back():
    """With factor masking velocities are put back as well; nothing of a gradient that is not finite is kept."""
    for dtype, options in ((torch.float64, {}), (torch.float32, {"memory_dtype": "bf16"})):
        ddp, state = build(compressor="topk", dtype=dtype, momentum=0.9, density=0.05, **options)
        alone = copy.deepcopy(ddp.module)
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.0), 5)
        before = copy.deepcopy(state.memory)
        ddp.module.inner.weight.register_hook(lambda g: g * math.inf if RANK == 0 else g)
        ddp.zero_grad()
        loss_of(ddp, 5, RANK).backward()
        loss_of(alone, 5, RANK).backward()
        close = {"rtol": 1e-12, "atol": 1e-15} if not options else {"rtol": 2**-6, "atol": 1e-5}
        for n, p in alone.named_parameters():
            m, u = before[n]["error"].double(), before[n]["momentum"].double()
            if n != "inner.weight" or RANK != 0:
                u = 0.9 * u + flat(p.grad)
                m = m + u
            after = state.memory[n]
            assert torch.allclose(after["momentum"].double(), u, **close), n
            assert torch.allclose(after["error"].double(), m, **close), n
        # The state that is saved now is settled, too, and the next step continues from it.
        assert all(torch.equal(slot["error"], state.state_dict()["memory"][n]["error"]) for n, slot in before.items()
                   if n == "inner.weight" and RANK == 0)  # fmt: skip


def check_scaler():
    """A GradScaler that overflows and changes its scale: the training is the same, and memories are unscaled."""
    plain, unscaled = build(density=0.1, compressor="topk")
    scaled, state = build(density=0.1, compressor="topk")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    state.scaler = scaler
    optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.1) for ddp in (plain, scaled)]
    train(plain, optimizers[0], 9)
    scales = set()
    for step in range(9):
        optimizers[1].zero_grad()
        scaler.scale(loss_of(scaled, step, RANK)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        scales.add(scaler.get_scale())
    assert len(scales) >= 3
    # Scales are powers of two, so nothing is rounded differently.
    assert torch.equal(weights(plain), weights(scaled))
    assert abs(state.memory_norm() - unscaled.memory_norm()) < 1e-6
    before, kept, scale = weights(scaled), copy.deepcopy(state.memory), scaler.get_scale()
    optimizers[1].zero_grad()
    (scaler.scale(loss_of(scaled, 9, RANK)) * (math.inf if RANK == 0 else 1.0)).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(before, weights(scaled)) and scaler.get_scale() == scale / 2
    if RANK == 0:  # all of its gradients were infinite, so this step has no effect
        for n, slot in state.memory.items():
            assert torch.allclose(slot["error"], kept[n]["error"], rtol=1e-6, atol=0)
    same_everywhere(torch.tensor(scaler.get_scale()))
    # One gradient of one rank in one of several buckets: the optimizer has not moved, and the others lose nothing.
    ddp, state = build(density=0.1, compressor="topk", scaler=scaler)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    ddp.module.head.weight.register_hook(Overflow(6 if RANK == 0 else -1))
    alone = copy.deepcopy(ddp.module)
    for step in range(7):
        before, kept = weights(ddp), copy.deepcopy(state.memory)
        alone.load_state_dict(ddp.module.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, step, RANK)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(before, weights(ddp))
    alone.zero_grad()
    loss_of(alone, 6, RANK).backward()
    for n, p in alone.named_parameters():
        if n in kept:
            expected = kept[n]["error"] + (0.0 if n == "head.weight" and RANK == 0 else flat(p.grad))
            assert torch.allclose(state.memory[n]["error"], expected, rtol=1e-5, atol=1e-8), n


def check_half():
    """bfloat16 gradients: the part of a large sum that rounding removes stays in the memory."""
    ddp, state = build(dtype=torch.bfloat16, density=0.1, compressor="topk")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    train(ddp, optimizer, 10)
    same_everywhere(weights(ddp))
    assert all(slot["error"].dtype == torch.float32 for slot in state.memory.values())
    assert all(p.grad.dtype == torch.bfloat16 for p in ddp.parameters())
    # An entry that float16 cannot hold is sent in several iterations.
    p = torch.nn.Parameter(torch.zeros(64, dtype=torch.float16))
    one = DDP(Sum(p))
    state = MemSGDState([("p", p)], compressor="topk", density=1 / 64, min_size=2)
    one.register_comm_hook(state, memsgd_hook)
    state.iteration = 2
    state.slot(p)["error"][7] = 1e5
    for expected in (torch.finfo(torch.float16).max, 1e5 + 1.0 - torch.finfo(torch.float16).max):
        p.grad = None
        one().backward()
        assert p.grad[7] == torch.tensor(expected, dtype=torch.float16) and p.grad.count_nonzero() == 1
    # So is one of a parameter that is sent whole, with momentum: the velocity is 1, then 1.5.
    one = DDP(Sum(p))
    state = attach(one, density=1.0, momentum=0.5)
    state.slot(p)["error"][7] = 1e5
    for expected, other in ((torch.finfo(torch.float16).max, 1.0), (1e5 + 2.5 - torch.finfo(torch.float16).max, 1.5)):
        p.grad = None
        one().backward()
        assert p.grad[7] == torch.tensor(expected, dtype=torch.float16) and p.grad[8] == other
    assert state.memory_norm() == 0


def check_fits():
    """Three ranks in a group of their own: the largest float16 numbers sum to infinity, and nothing is lost."""
    group = dist.new_group([0, 1, 2])
    if RANK == 3:
        return
    for compressor in (RandK(), CountSketchTopK(width=1.0)):
        p = torch.nn.Parameter(torch.zeros(256, dtype=torch.float16))
        one = DDP(Sum(p), process_group=group)
        state = attach(one, compressor=compressor, density=1 / 32, min_size=2)
        state.iteration = 2
        state.slot(p)["error"].fill_(1e5)
        one().backward()
        assert state.world_size == 3 and p.grad.isnan().all()
        assert torch.equal(state.memory["p"]["error"], torch.full((256,), 1e5 + 1))


def check_sparse():
    """nn.Embedding(sparse=True): its gradient is averaged, the rest compressed."""
    plain, _ = build(hook=False, sparse=True)
    ddp, state = build(sparse=True, density=0.1)
    for step in range(4):
        for model in (plain, ddp):
            model.zero_grad()
            loss_of(model, step, RANK).backward()
        a, b = plain.module.embed.weight.grad, ddp.module.embed.weight.grad
        assert b.is_sparse and torch.allclose(a.to_dense(), b.to_dense(), atol=1e-7)
    assert "embed.weight" not in state.memory and "inner.weight" in state.memory
    clipped, _ = build(sparse=True, density=1.0, clip=0.01)
    loss_of(clipped, 0, RANK).backward()
    alone = copy.deepcopy(clipped.module)
    expected = 0.0
    for rank in range(WORLD):
        alone.zero_grad()
        loss_of(alone, 0, rank).backward()
        g = alone.embed.weight.grad.to_dense()
        expected = expected + g * min(1.0, 0.01 / WORLD**0.5 / float(g.norm())) / WORLD
    assert torch.allclose(clipped.module.embed.weight.grad.to_dense(), expected, rtol=1e-5, atol=1e-9)
    ddp, _ = build(sparse=True, density=0.1, momentum=0.9)
    raises("momentum=0.9 does not support the sparse gradient", lambda: loss_of(ddp, 0, RANK).backward())
    dist.barrier()


def check_unused():
    """A parameter that only some ranks, or none, have used: its memory is applied when it is used again.

    With momentum this is the sum of the velocities, with gradients of 0 where the parameter is not used.
    """
    for options in ({"density": 0.1}, *({"density": d, "momentum": 0.5, "factor_masking": False} for d in (0.1, 1.0))):
        ddp, state = build(unused=True, find_unused_parameters=True, dtype=torch.float64, **options)
        applied = total = velocity = torch.zeros(24, 24, dtype=torch.float64)
        alone = copy.deepcopy(ddp.module)
        for step in range(16):
            branches = [step % 2 == 0 and (rank + step) % 4 < 2 for rank in range(WORLD)]
            ddp.zero_grad()
            alone.zero_grad()
            loss_of(ddp, step, RANK, branch=branches[RANK]).backward()
            for rank in range(WORLD):
                (loss_of(alone, step, rank, branch=branches[rank]) / WORLD).backward()
            grad = ddp.module.gone.weight.grad
            if step % 2:
                assert grad is None or not grad.any()
            applied = applied + (0.0 if grad is None else grad)
            velocity = options.get("momentum", 0.0) * velocity
            velocity = velocity + (0.0 if alone.gone.weight.grad is None else alone.gone.weight.grad)
            total = total + velocity
        pending = state.memory["gone.weight"]["error"].clone()
        dist.all_reduce(pending)
        assert pending.norm() > 1e-6
        assert (applied + pending.view_as(applied) / WORLD - total).abs().max() < 1e-12, options


def check_join():
    """Ranks with unequal numbers of batches: a rank that has left sends zeros; all weights are equal at the end."""
    for name, compressor in COMPRESSORS.items():
        ddp, state = build(density=0.1, compressor=compressor, momentum=0.5 * (name == "randk"))
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with Join([ddp]):
            for step in range(6 + 3 * RANK):
                optimizer.zero_grad()
                loss_of(ddp, step, RANK).backward()
                optimizer.step()
        same_everywhere(weights(ddp))
        assert state.iteration == 6 + 3 * (WORLD - 1)


def check_wire():
    """The bytes that the state reports are those that arrive at the process group, and those computed by hand."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from _wire import CountingGroup

    for compressor, dtype in itertools.product(COMPRESSORS.values(), (torch.float32, torch.float64, torch.bfloat16)):
        for density in (0.05, 0.4):
            group = CountingGroup()
            model = Net().to(dtype)
            ddp = DDP(model, bucket_cap_mb=0.003, process_group=group)
            state = attach(ddp, compressor=compressor, density=density, **SMALL)
            item = dtype.itemsize
            dense = item * sum(p.numel() for p in model.parameters())
            for step in range(2):  # DistributedDataParallel sends its new buckets to all ranks
                loss_of(ddp, step, RANK).backward()
            before = group.sent - state.wire_bytes
            for step in range(2, 5):
                sent = group.sent
                loss_of(ddp, step, RANK).backward()
                assert group.sent - sent == state.last_wire_bytes and state.last_dense_bytes == dense
                sizes = [p.numel() for p in model.parameters()]
                ways = [compressor.wire_bytes(d, density, item) if d >= 20 else item * d for d in sizes]
                # A payload that would be larger than the gradient is replaced by the gradient.
                flags = state.last_wire_bytes - sum(min(way, item * d) for way, d in zip(ways, sizes, strict=True))
                assert 0 < flags <= item * len(sizes) and flags % item == 0, flags  # one of each bucket
            assert state.wire_bytes == group.sent - before and state.dense_bytes == 5 * dense


def check_errors():
    ddp, _ = build(hook=False)
    raises("model is a Net", lambda: attach(ddp.module))
    state = MemSGDState(Net().named_parameters())
    ddp.register_comm_hook(state, memsgd_hook)
    raises("not among the", lambda: loss_of(ddp, 0, RANK).backward())
    dist.barrier()
    raises("already has a communication hook", lambda: attach(ddp))
    ddp, state = build(density=0.1)
    raises("already has a communication hook", lambda: attach(ddp, density=0.5))
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 4)  # the first one continues
    assert state.iteration == 4 and state.last_density == 0.1
    ddp, _ = build(hook=False)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)
    raises("already has a communication hook", lambda: attach(ddp))
    ddp, _ = build(compressor=BlockTopK(64 if RANK else 128))
    raises("different options", lambda: loss_of(ddp, 0, RANK).backward())
    dist.barrier()


def check_pickle():
    """A pickled state has no process group; after bind it works again."""
    ddp, state = build(density=0.1)
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 4)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    other.bind(ddp.module.named_parameters())
    assert other.iteration == 4 and other.memory_norm() == state.memory_norm() and other.density == state.density


def check_save(folder):
    """Saved and resumed on as many ranks: equal bit for bit to the run that was not interrupted."""
    options = {"density": 0.05, "momentum": 0.5, "memory_dtype": "bf16"}
    ddp, state = build(**options)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    train(ddp, optimizer, 6)
    state.save(f"{folder}/run")
    if RANK == 0:
        torch.save(ddp.module.state_dict(), f"{folder}/model.pt")
    pending = sum_of(state)
    gathered = state.gather()
    assert (gathered is None) == (RANK != 0)
    train(ddp, optimizer, 5, first=6)
    for way in ("files", "gathered"):
        other, fresh = build(seed=1, **options)
        other.module.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
        if way == "files":
            fresh.load(f"{folder}/run")
        else:
            box = [gathered]
            dist.broadcast_object_list(box)
            fresh.load_gathered(box[0])
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), 5, first=6)
        assert torch.equal(weights(ddp), weights(other)), way
    if RANK == 0:
        torch.save(pending, f"{folder}/pending.pt")
    # A state of another time on one rank is an error on both ranks, before anything is sent.
    other, fresh = build(**options)
    fresh.load_state_dict({**state.state_dict(), "iteration": 7 + RANK})
    raises(
        "the ranks are at different iterations of the gradient compression (7, 8",
        lambda: train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1),
    )
    mine = state.state_dict()
    raises("each rank has a memory of its own", lambda: fresh.load_state_dict({**mine, "rank": (RANK + 1) % WORLD}))
    raises(
        "which the model does not have",
        lambda: fresh.load_state_dict({**mine, "memory": {"x": {"error": torch.zeros(1)}}}),
    )
    raises("no files memsgd", lambda: fresh.load(folder))
    raises("from all 2 ranks after the same iteration", lambda: redistribute([mine]))
    raises("momentum", lambda: build(density=0.05)[1].load_state_dict(mine))


def check_again():
    """On many ranks: gathered compressors resume bit for bit, all-reduced ones to rounding (other buckets at first).

    The last step before had an infinity, so that something has to be put back.
    """
    for name in ("block_topk", "randk"):
        compressor = COMPRESSORS[name]
        options = {"compressor": compressor, "density": 0.05, "momentum": 0.5}
        ends, saved = [], None
        for first in (0, 6):
            ddp, state = build(seed=first, **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=4)
            state.scaler, optimizer = scaler, torch.optim.SGD(ddp.parameters(), lr=0.05)
            if saved is not None:
                for one, kept in zip((ddp.module, state, scaler), saved, strict=True):
                    one.load_state_dict(kept)
            elif RANK == 0:
                ddp.module.inner.weight.register_hook(Overflow(5))
            for step in range(first, 12):
                if step == 6 and saved is None:
                    saved = copy.deepcopy([one.state_dict() for one in (ddp.module, state, scaler)])
                optimizer.zero_grad()
                scaler.scale(loss_of(ddp, step, RANK)).backward()
                scaler.step(optimizer)
                scaler.update()
            same_everywhere(weights(ddp))
            ends.append((weights(ddp), *(state.memory[n][k] for n in sorted(state.memory) for k in state.memory[n])))
        for one, other in zip(*ends, strict=True):
            assert torch.equal(one, other) or (compressor.shared and torch.allclose(one, other, atol=1e-5)), name


def sum_of(state):
    """The mean over the ranks of everything that was not sent yet."""
    pending = torch.cat([slot["error"].double() for _, slot in sorted(state.memory.items())])
    dist.all_reduce(pending)
    return pending / WORLD


def check_resume(folder):
    """The files of two ranks on this number of ranks: the mean of the memories stays the same."""
    ddp, state = build(density=0.05, momentum=0.5, seed=RANK)
    ddp.module.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
    state.load(f"{folder}/run")
    # bfloat16 memories were averaged and rounded to nearest: an error of half a unit of 2**-8 for each.
    pending = torch.load(f"{folder}/pending.pt", weights_only=True)
    assert torch.allclose(sum_of(state), pending, rtol=2**-8, atol=1e-9)
    assert state.iteration == 6
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 4, first=6)
    same_everywhere(weights(ddp))


def main():
    folder = sys.argv[2] if len(sys.argv) > 2 else ""
    dist.init_process_group("gloo")
    for check in sys.argv[1].split(","):
        begin = time.perf_counter()
        try:
            globals()[f"check_{check}"](*([folder] if check in ("save", "resume") else []))
        except BaseException:
            print(f"FAILED: check_{check} on rank {RANK}", flush=True)
            raise
        dist.barrier()
        print(f"{check}: {time.perf_counter() - begin:.2f} s", flush=True)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

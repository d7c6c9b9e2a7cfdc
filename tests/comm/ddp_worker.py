"""One rank of the tests of the communication hook: ``ddp_worker.py CHECK[,CHECK...] [FOLDER]``."""

import contextlib
import copy
import functools
import io
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
    """Vectors, matrices and a convolution, one of them channels_last, in an order that is not that of the backward."""

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
    """Buckets of 3 kB: several of them, that are sorted anew after the first iteration."""
    torch.manual_seed(seed)
    model = Net(unused=options.pop("unused", False), sparse=options.pop("sparse", False)).to(dtype)
    ddp = DDP(model, bucket_cap_mb=bucket_cap_mb, find_unused_parameters=find_unused_parameters)
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
    """In the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).clone()


def check_reference():
    """Every compressor equals the simulation: bit for bit where the order of sums is known (gathered payloads)."""
    for name, compressor in COMPRESSORS.items():
        ddp, state = build(compressor=compressor, density=0.1)
        alone = copy.deepcopy(ddp.module)
        reference = Reference(alone, compressor)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (ddp, alone)]
        for step in range(12):
            ddp.zero_grad()
            loss_of(ddp, step, RANK).backward()
            expected = reference.gradients()
            for n, p in ddp.module.named_parameters():
                got = flat(p.grad)
                if compressor.shared or step < 2:  # gloo adds in an order of its own
                    assert torch.allclose(got, expected[n], rtol=1e-5, atol=1e-8), (name, step, n)
                else:
                    assert torch.equal(got, expected[n]), (name, step, n, (got - expected[n]).abs().max())
            for p, q in zip(ddp.parameters(), alone.parameters(), strict=True):
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        same_everywhere(weights(ddp))
        assert state.iteration == 12 and state.last_wire_bytes < state.last_dense_bytes


def check_telescopes():
    """What was applied and the mean of the memories are the sum of all gradients: in float64 to 1e-12."""
    for compressor in COMPRESSORS.values():
        ddp, state = build(dtype=torch.float64, compressor=compressor, density=0.05)
        alone = copy.deepcopy(ddp.module)
        applied = total = 0.0
        for step in range(40):
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


def check_dense():
    """Density 1 is DistributedDataParallel without a hook, bit for bit; so are the iterations before the start."""
    plain, _ = build(hook=False)
    whole, state = build(density=1.0)
    late, waiting = build(density=0.01, start=1000)
    for ddp in (plain, whole, late):
        train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9), 10)
    assert torch.equal(weights(plain), weights(whole)) and torch.equal(weights(plain), weights(late))
    assert state.compression == waiting.compression == 1.0 and not state.memory and not waiting.memory


def check_replicas():
    """Thousands of steps: every replica has the same bits, and the loss has fallen."""
    for name, steps, options in (
        ("block_topk", 2000, {"momentum": 0.9, "warmup": 100, "clip": 1.0}),
        ("topk", 200, {"memory_dtype": "bf16", "clip": 10.0}),
        ("randk", 200, {}),
    ):
        ddp, state = build(compressor=COMPRESSORS[name], density=0.02, bucket_cap_mb=0.01, **options)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01 if "momentum" in options else 0.1)
        first = measured(ddp)
        for part in range(4):
            train(ddp, optimizer, steps // 4, first=steps // 4 * part)
            same_everywhere(weights(ddp))
        last = measured(ddp)
        assert last < 0.8 * first, (name, first, last)
        assert state.iteration == steps and math.isfinite(state.memory_norm())


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
        train(ddp, optimizer, 30)
        assert measured(ddp) < before, name
        same_everywhere(weights(ddp))
        assert state.compression < 0.5


def check_no_sync():
    """Accumulation without the hook: one call for two backward passes, with the sum of both gradients."""
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


def check_nonfinite():
    """An infinity on one rank: NaN on all of them, the memory of the bucket reset on all, and on it goes."""
    for compressor in COMPRESSORS.values():
        ddp, state = build(compressor=compressor, density=0.05, bucket_cap_mb=25)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        train(ddp, optimizer, 5)
        assert state.memory_norm() > 0
        ddp.zero_grad()
        loss = loss_of(ddp, 5, RANK) * (math.inf if RANK == WORLD - 1 else 1.0)
        loss.backward()
        for p in ddp.parameters():
            assert p.grad.isnan().all()
        assert state.memory_norm() == 0
        train(ddp, optimizer, 5, first=6)
        assert weights(ddp).isfinite().all() and state.memory_norm() > 0
        same_everywhere(weights(ddp))


def check_scaler():
    """A GradScaler that overflows and changes its scale: the same training as without, memories unscaled."""
    plain, unscaled = build(density=0.1, compressor="topk", bucket_cap_mb=25)
    scaled, state = build(density=0.1, compressor="topk", bucket_cap_mb=25)
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
    # scales are powers of two: nothing is rounded differently
    assert torch.equal(weights(plain), weights(scaled))
    assert abs(state.memory_norm() - unscaled.memory_norm()) < 1e-6
    before = weights(scaled)
    optimizers[1].zero_grad()
    (scaler.scale(loss_of(scaled, 9, RANK)) * (math.inf if RANK == 0 else 1.0)).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert torch.equal(before, weights(scaled)) and state.memory_norm() == 0
    same_everywhere(torch.tensor(scaler.get_scale()))


def check_half():
    """bfloat16 gradients: what rounding of the sum of many cuts off stays in the memory."""
    ddp, state = build(dtype=torch.bfloat16, density=0.1, compressor="topk")
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    train(ddp, optimizer, 10)
    same_everywhere(weights(ddp))
    assert all(slot["error"].dtype == torch.float32 for slot in state.memory.values())
    assert all(p.grad.dtype == torch.bfloat16 for p in ddp.parameters())
    # An entry that float16 cannot hold goes in parts.
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


def check_unused():
    """A parameter that only some ranks, or none, have used: what it keeps is applied when it is used again."""
    ddp, state = build(density=0.1, unused=True, find_unused_parameters=True, dtype=torch.float64)
    applied = total = 0.0
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
        total = total + (0.0 if alone.gone.weight.grad is None else alone.gone.weight.grad)
    pending = state.memory["gone.weight"]["error"].clone()
    dist.all_reduce(pending)
    assert pending.norm() > 1e-6
    assert (applied + pending.view_as(applied) / WORLD - total).abs().max() < 1e-12


def check_join():
    """Ranks with unequal numbers of batches: who has left sends zeros, and the weights are the same at the end."""
    for compressor in ("block_topk", "randk"):
        ddp, state = build(density=0.1, compressor=compressor)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        with Join([ddp]):
            for step in range(6 + 3 * RANK):
                optimizer.zero_grad()
                loss_of(ddp, step, RANK).backward()
                optimizer.step()
        same_everywhere(weights(ddp))
        assert state.iteration == 6 + 3 * (WORLD - 1)


def check_wire():
    """The bytes that the state reports are those that arrive at the process group, and add up by hand."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from _wire import CountingGroup

    for compressor in COMPRESSORS.values():
        group = CountingGroup()
        model = Net()
        ddp = DDP(model, bucket_cap_mb=0.003, process_group=group)
        state = attach(ddp, compressor=compressor, density=0.05, **SMALL)
        dense = 4 * sum(p.numel() for p in model.parameters())
        for step in range(2):  # DistributedDataParallel tells all ranks of its new buckets
            loss_of(ddp, step, RANK).backward()
        before = group.sent - state.wire_bytes
        for step in range(2, 6):
            sent = group.sent
            loss_of(ddp, step, RANK).backward()
            assert group.sent - sent == state.last_wire_bytes and state.last_dense_bytes == dense
            sizes = [p.numel() for p in model.parameters()]
            ways = [compressor.wire_bytes(d, 0.05) if d >= 20 else 4 * d for d in sizes]
            flags = state.last_wire_bytes - sum(min(way, 4 * d) for way, d in zip(ways, sizes, strict=True))
            assert 0 < flags <= 4 * len(sizes) and flags % 4 == 0, flags  # one of each bucket
        assert state.wire_bytes == group.sent - before and state.dense_bytes == 6 * dense


def check_errors():
    ddp, _ = build(hook=False)
    raises("model is a Net", lambda: attach(ddp.module))
    state = MemSGDState(Net().named_parameters())
    ddp.register_comm_hook(state, memsgd_hook)
    raises("none of the", lambda: loss_of(ddp, 0, RANK).backward())
    dist.barrier()


def check_pickle():
    """What a state writes has no process group; after bind it goes on."""
    ddp, state = build(density=0.1)
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), 4)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    other.bind(ddp.module.named_parameters())
    assert other.iteration == 4 and other.memory_norm() == state.memory_norm() and other.density == state.density


def check_save(folder):
    """Saved and resumed on as many ranks: bit for bit the run that was not interrupted."""
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
    # Of another time on one rank: an error on both, before anything is sent.
    other, fresh = build(**options)
    fresh.load_state_dict({**state.state_dict(), "iteration": 7 + RANK})
    raises("the ranks are at iterations 7, 8", lambda: train(other, torch.optim.SGD(other.parameters(), lr=0.1), 1))
    mine = state.state_dict()
    raises("memories belong to ranks", lambda: fresh.load_state_dict({**mine, "rank": (RANK + 1) % WORLD}))
    raises("that the model has not", lambda: fresh.load_state_dict({**mine, "memory": {"x": {}}}))
    raises("no memsgd", lambda: fresh.load(folder))
    raises("of all 2 ranks", lambda: redistribute([mine]))
    raises("momentum", lambda: build(density=0.05)[1].load_state_dict(mine))


def sum_of(state):
    """The mean over the ranks of what was not sent yet."""
    pending = torch.cat([slot["error"].double() for _, slot in sorted(state.memory.items())])
    dist.all_reduce(pending)
    return pending / WORLD


def check_resume(folder):
    """The files of two ranks on this number of them: the mean of the memories is what it was."""
    ddp, state = build(density=0.05, momentum=0.5, seed=RANK)
    ddp.module.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
    state.load(f"{folder}/run")
    # bfloat16 memories were averaged and rounded to nearest: half a unit of 2**-8 of each
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

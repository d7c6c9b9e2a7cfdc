"""One rank of the FSDP2 tests: ``fsdp2_worker.py CHECK[,CHECK...] [FOLDER]``."""

import copy
import importlib.util
import os
import sys
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sketch_plugins import registry, state_report
from sketch_plugins.optim import self_check

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
SMALL = {"min_compress_size": 64}
# The options with which the numbers of a method do not depend on the cut of a parameter.
EXACT = {
    # int8 blocks lie along rows, and rows are not cut.
    "cs_adam": [{"preset": "exact"}, {"second_moment": "dense"}, {"first_moment": "bf16", "second_moment": "dense"}],
    "cs_rmsprop": [{"preset": "exact"}],
    "cs_adagrad": [{"preset": "exact"}],
    "cs_momentum": [{"first_moment": "fp32"}, {"first_moment": "int8", "first_moment_rounding": "nearest"}],
    "cs_lion": [{"first_moment": "bf16"}],
    "sm3": [],
    "sketchy": [{"preset": "exact", "update_clip": 0.0, "scale_parameter": False, "momentum_of": "all"}],
}


class Net(torch.nn.Module):
    """An embedding, a convolution, matrices with rows that no number of ranks divides, one of fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(37, 24)
        self.conv = torch.nn.Conv1d(24, 10, 3, padding=1)
        self.inner = torch.nn.Linear(10, 33)
        self.few = torch.nn.Linear(33, 3, bias=False)
        self.head = torch.nn.Linear(3, 37)

    def forward(self, x):
        h = self.conv(self.embed(x).mT).mT
        return self.head(self.few(torch.tanh(self.inner(h))))


def build(name, options, mesh=None, seed=0, shard=True):
    torch.manual_seed(seed)
    model = Net()
    if shard:
        for layer in (model.embed, model.conv, model.inner):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    own = {"reference_rms": 1.0, **SMALL, **options}
    own = {k: v for k, v in own.items() if k in registry.get(name).options}
    return model, registry.get(name).cls(model.named_parameters(), lr=0.02, **own)


def batch(step, rank=0):
    g = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 37, (4, 9), generator=g)


def train(model, optimizer, steps, first=0, ranks=(0,)):
    """Train on the mean over the ranks' batches; under FSDP each rank has one of them."""
    for step in range(first, first + steps):
        for rank in ranks:
            x = batch(step, rank)
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            (loss / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def full(model):
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    wrong = [n for n in a if not torch.equal(a[n], b[n])]
    assert not wrong, f"weights differ: {wrong}"
    return True


def tensors(value, prefix=""):
    if isinstance(value, dict):
        for k, v in value.items():
            yield from tensors(v, f"{prefix}.{k}")
    elif isinstance(value, torch.Tensor):
        yield prefix, value.to_local() if isinstance(value, DTensor) else value


def state_of(optimizer):
    return [dict(tensors(optimizer.state[p])) for g in optimizer.param_groups for p in g["params"]]


def same_state(a, b):
    ours, theirs = state_of(a), state_of(b)
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        wrong = sorted(x.keys() ^ y.keys()) or [k for k in x if not torch.equal(x[k], y[k])]
        assert not wrong, f"state of parameter {i}: {wrong}"
    return True


def check_equal(name):
    """With the same gradients the weights are equal, bit for bit, if the method does not depend on the cut."""
    for options in EXACT[name]:
        alone, single = build(name, options, shard=False)
        model, optimizer = build(name, options)
        for step in range(4):
            g = torch.Generator().manual_seed(step)
            for p, q in zip(alone.parameters(), model.parameters(), strict=True):
                p.grad = torch.randn(p.shape, generator=g)
                q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)
            single.step()
            optimizer.step()
        assert same(full(alone), full(model))


def check_remembered(name):
    """A cached step of shards equals that of an optimizer without a cache; empty shards count their steps."""
    # With more ranks than a layer has rows, some shards are empty: one test of this is enough.
    if name not in (("cs_adam", "sm3") if WORLD == 2 else ("cs_adam",)) or importlib.util.find_spec("numba") is None:
        print(f"remembered {name}: not checked: two are enough, and without Numba there is nothing to remember")
        return
    warnings.filterwarnings("ignore", message="fused=True: a parameter of shape")
    results = []
    for forgets in (False, True):
        model, optimizer = build(name, {"fused": True})
        for step in range(7):
            if forgets:
                optimizer._step_cache = None
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + step)
            train(model, optimizer, 1, first=step)
            if step == 4 and not forgets:
                kinds = {type(group).__name__ for group in optimizer._step_cache._groups.values()}
                empty = any(group.empty for group in optimizer._step_cache._groups.values())
                assert empty == (WORLD == 4 and RANK == 3), "of the layer of three rows the last rank has none"
                assert kinds == ({"RememberedShards"} if name == "cs_adam" else kinds), kinds
        results.append((model, optimizer))
    (model, optimizer), (other, expected) = results
    assert same_state(optimizer, expected) and same(full(model), full(other))
    assert {float(state["step"]) for state in optimizer.state.values()} == {7.0}


def check_agreed(name):
    """The first process decides whether a kernel is right, because replicas may not take different paths."""
    for first, why in ((0, None), (1, "differs by 3")):
        text = f"kernel of {name} {first}"
        if first == RANK:
            assert self_check._agreed(text, why) == why
        dist.barrier()
        assert self_check._agreed(text, None if why else "does not compile") == why


def check_experts(name):
    """Experts in one parameter: each has its own buckets, so a rank with whole experts takes one process's steps.

    With fewer experts than ranks, some ranks have none. Shard(1) and Shard(2) cut the experts themselves.
    """
    if "batch_dims" not in registry.get(name).options:
        return
    mesh = init_device_mesh("cpu", (WORLD,))
    g = torch.Generator().manual_seed(0)
    # Each expert is measured by itself, and Sketchy's covariances are each expert's.
    options = {"update_clip": 0.3, "scale_parameter": True, "reference_rms": 1.0, "lagged_rms": True, "rank": 6}
    options = {key: value for key, value in options.items() if key in registry.get(name).options}
    for experts, cut in ((2 * WORLD, 0), (WORLD + 1, 0), (1, 0), (3, 1), (3, 2)):
        whole = torch.randn(experts, 18, 20, generator=g)
        p = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(cut)]))
        q = torch.nn.Parameter(whole.clone())
        made = {"min_compress_size": 64, "fused": False, **options}
        if "compression" in registry.get(name).options:
            made["compression"] = 0.2
        ours, alone = (registry.get(name).cls([x], **made) for x in (p, q))
        for step in range(3):
            q.grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
            q.grad *= torch.arange(1.0, experts + 1).view(-1, 1, 1)
            p.grad = distribute_tensor(q.grad, mesh, [Shard(cut)])
            ours.step()
            alone.step()
        local, state = p.to_local(), ours.state[p]
        for table in (t for name, t in state.items() if local.numel() and name.endswith(".table")):
            rows = -(-local.shape[1] // 5)  # a fifth of each matrix
            assert table.shape[1:] == (local.shape[0] * rows, local.shape[2])
        if "rms.last" in state:
            assert state["rms.last"].shape == (local.shape[0], 2)
        full = p.full_tensor()
        if cut == 0:
            # The products of a batch of matrices may be summed in another order than those of a larger one.
            same = torch.equal(full, q) if name != "sketchy" else torch.allclose(full, q, rtol=1e-3, atol=1e-4)
            assert same, (experts, (full - q).abs().max())
        if name == "sketchy" and local.numel():
            assert state["preconditioner.values_0_1"].shape == (local.shape[0], min(6, local.shape[2]))
        assert torch.isfinite(full).all() and not torch.equal(full, whole)
        # Through a state dict, whose tensors have the size of the largest shard's.
        again = registry.get(name).cls([torch.nn.Parameter(p.detach().clone())], **made)
        again.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert same_state(ours, again)


def check_trains(name):
    """The ranks' mean gradient: close to one process that sees all batches; how close is the method's own."""
    single, alone = build(name, {}, shard=False)
    model, optimizer = build(name, {})
    before = full(model)
    train(single, alone, 8, ranks=range(WORLD))
    for step in range(8):
        train(model, optimizer, 1, first=step, ranks=(RANK,))
    a, b = full(single), full(model)
    moved = sum(float((a[n] - before[n]).square().sum()) for n in a) ** 0.5
    apart = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
    assert apart < 0.6 * moved, (apart, moved)
    report = state_report(optimizer)
    total = torch.tensor(report.state_bytes)
    dist.all_reduce(total)
    whole = state_report(alone).state_bytes
    # Every shard of a cover has all columns; tables of few rows round up.
    print(f"{name}: bytes {int(total)} sharded, {whole} whole, apart {apart / moved:.3f}")


def check_bytes(name):
    """BERT's shapes: the state of a rank is its share of the whole."""
    shapes = [(3072, 256), (256, 256), (1024, 256), (256, 1024), (256,), (1024,)]
    mesh = init_device_mesh("cpu", (WORLD,))
    cls = registry.get(name).cls
    whole = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    shards = [torch.nn.Parameter(distribute_tensor(torch.zeros(s), mesh, [Shard(0)])) for s in shapes]
    a, b = cls(whole), cls(shards)
    for p, q in zip(whole, shards, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
    a.step()
    b.step()
    mine, share = state_report(b).state_bytes, state_report(a).state_bytes / WORLD
    extra = 0
    if name == "sm3":  # a shard's cover of the columns is whole
        extra = sum(4 * s[1] * (1 - 1 / WORLD) for s in shapes if len(s) == 2)
    if name == "sketchy":  # and so is its covariance of the columns, and there is a buffer
        extra = sum(2 * 4 * 32 * s[1] * (1 - 1 / WORLD) for s in shapes if len(s) == 2)
    assert share * 0.9 <= mine <= share * 1.1 + extra * 1.1, (mine, share, extra)


def check_sharded_checkpoint(name, folder):
    """Saved as shards and loaded into another model: the run continues as if it had not been interrupted."""
    model, optimizer = build(name, {})
    train(model, optimizer, 3, ranks=(RANK,))
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    if name == "sm3":  # once asynchronously
        # With a group of its own, because its messages would mix with those of the training.
        group = dist.new_group(backend="gloo")
        future = dcp.async_save(state, checkpoint_id=f"{folder}/{name}", process_group=group)
        train(model, optimizer, 1, first=3, ranks=(RANK,))
        future.result()
    else:
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        train(model, optimizer, 1, first=3, ranks=(RANK,))
    other, fresh = build(name, {}, seed=1)
    state = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, fresh)}
    dcp.load(state, checkpoint_id=f"{folder}/{name}")
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, fresh, state["optim"])
    train(other, fresh, 1, first=3, ranks=(RANK,))
    assert same(full(model), full(other)) and same_state(optimizer, fresh)


def check_full_checkpoint(name):
    """The full state dict on rank 0, broadcast to a new model; and the flattened one."""
    model, optimizer = build(name, {})
    train(model, optimizer, 3, ranks=(RANK,))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = copy.deepcopy(get_model_state_dict(model, options=options))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))  # the step counter is no copy
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    flat, shards = copy.deepcopy(flat), copy.deepcopy(get_model_state_dict(model))
    train(model, optimizer, 1, first=3, ranks=(RANK,))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    other, fresh = build(name, {}, seed=1)
    set_model_state_dict(other, weights if RANK == 0 else {}, options=options)
    set_optimizer_state_dict(other, fresh, state if RANK == 0 else {}, options=options)
    train(other, fresh, 1, first=3, ranks=(RANK,))
    assert same(full(model), full(other)) and same_state(optimizer, fresh)
    other, fresh = build(name, {}, seed=1)
    set_model_state_dict(other, shards)
    get_optimizer_state_dict(other, fresh)  # makes the state
    set_optimizer_state_dict(other, fresh, flat, options=StateDictOptions(flatten_optimizer_state_dict=True))
    train(other, fresh, 1, first=3, ranks=(RANK,))
    assert same(full(model), full(other)) and same_state(optimizer, fresh)


def check_meshes(name):
    """HSDP (2 x 2), and tensor parallelism along columns."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = build(name, {}, mesh=mesh)
    train(model, optimizer, 2, ranks=(RANK,))
    state = optimizer.state_dict()
    train(model, optimizer, 1, first=2, ranks=(RANK,))
    other, fresh = build(name, {}, mesh=mesh)
    train(other, fresh, 2, ranks=(RANK,))
    fresh.load_state_dict(state)  # of two steps ago, in memory: its tensors have changed since then
    flat = init_device_mesh("cpu", (WORLD,))
    p = torch.nn.Parameter(distribute_tensor(torch.ones(12, 40), flat, [Shard(1)]))
    own = {k: v for k, v in SMALL.items() if k in registry.get(name).options}
    columns = registry.get(name).cls([p], **own)
    p.grad = distribute_tensor(torch.randn(12, 40, generator=torch.Generator().manual_seed(0)), flat, [Shard(1)])
    columns.step()
    assert columns.state[p]["place"].tolist() == [0, 10 * RANK, 12, 40]
    columns.load_state_dict(columns.state_dict())
    columns.step()


def check_tensor_parallel(name):
    """FSDP2 over tensor parallelism: linear layers cut along both dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def both(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(24, 36), torch.nn.Tanh(), torch.nn.Linear(36, 24))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        own = {k: v for k, v in SMALL.items() if k in registry.get(name).options}
        return model, registry.get(name).cls(model.named_parameters(), lr=0.01, **own)

    def steps(model, optimizer, numbers):
        for step in numbers:
            seed = 10 * step + mesh.get_local_rank("dp")
            model(torch.randn(4, 24, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = both(0)
    steps(model, optimizer, range(2))
    first = next(model.parameters())
    # Tensor parallelism cuts first, and each half is cut again.
    assert optimizer.state[first]["place"].tolist() == [(0, 18, 9, 27)[RANK], 0, 36, 24]
    weights, state = copy.deepcopy(get_model_state_dict(model)), copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, range(2, 4))
    other, fresh = both(1)
    set_model_state_dict(other, weights)
    fresh.load_state_dict(state)
    steps(other, fresh, range(2, 4))
    assert all(
        torch.equal(p.to_local(), q.to_local()) for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )
    assert same_state(optimizer, fresh)


def check_placements(name):
    """Gradients that are partial sums, or whole, give the same steps as sharded ones."""
    mesh = init_device_mesh("cpu", (WORLD,))
    own = {k: v for k, v in SMALL.items() if k in registry.get(name).options}
    found = []
    for kind in ("shard", "partial", "replicate"):
        torch.manual_seed(0)
        # Large enough for kernels; of unequal shards; one of which a rank has nothing.
        whole = [torch.randn(64, 1024), torch.randn(64, 1024), torch.randn(33, 24), torch.randn(1, 70)]
        params = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in whole]
        optimizer = registry.get(name).cls(params, **own)
        for step in range(4):
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                if kind == "partial":
                    p.grad = DTensor.from_local(g / WORLD, mesh, [Partial()], run_check=False)
                elif kind == "replicate":
                    p.grad = DTensor.from_local(g, mesh, [Replicate()], run_check=False)
                else:
                    p.grad = distribute_tensor(g, mesh, [Shard(0)])
            optimizer.step()
        found.append([p.full_tensor() for p in params])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def check_nan(name):
    """A NaN on one rank: every rank raises, or none does; if they raise, nothing has changed."""
    model, optimizer = build(name, {})
    train(model, optimizer, 1, ranks=(RANK,))
    before = full(model)
    for p in model.parameters():
        p.grad = distribute_tensor(torch.ones(p.shape), p.device_mesh, p.placements)
    if RANK == WORLD - 1:
        next(model.parameters()).grad.to_local()[0] = float("nan")
    try:
        optimizer.step()
        raised = 0
    except ValueError as error:
        raised = 1
        assert "not finite" in str(error)
    total = torch.tensor(raised)
    dist.all_reduce(total)
    assert int(total) in (0, WORLD), int(total)
    if raised:
        assert same(before, full(model))


def check_deferred(name):
    """A NaN on one rank is known on all of them before the next step, and no rank's weights have moved."""
    if name != "sketchy":
        return
    model, optimizer = build(name, {"nonfinite": "deferred", "rank": 4, "weight_decay": 0.1})
    other, reference = build(name, {"nonfinite": "error", "rank": 4, "weight_decay": 0.1})
    for step in range(4):
        before, void = full(model), step == 2
        for one in (model, other):
            for number, p in enumerate(one.parameters()):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + number))
                g = torch.zeros_like(g) if void and one is other else g
                p.grad = distribute_tensor(g, p.device_mesh, p.placements)
        if void and RANK == WORLD - 1:
            next(model.parameters()).grad.to_local()[0] = float("nan")
        for group in reference.param_groups:
            group["lr"], group["weight_decay"] = (0.0, 0.0) if void else (0.02, 0.1)
        try:
            optimizer.step()
            assert step != 3, "no error before the next step"
        except ValueError as error:
            assert step == 3 and "gradients of the last step were not finite" in str(error), (step, error)
            assert same(before, full(model))
            optimizer.step()
        reference.step()
        assert same(full(model), full(other)) and same_state(optimizer, reference)
        assert not void or same(before, full(model))
    optimizer.check_last_step()


def check_errors(name):
    model, optimizer = build(name, {})
    train(model, optimizer, 1, ranks=(RANK,))
    state = optimizer.state_dict()
    single, alone = build(name, {}, shard=False)
    train(single, alone, 1)
    for into, what in ((alone, state), (optimizer, alone.state_dict())):
        before = {k: v.clone() for s in state_of(into) for k, v in s.items()}
        try:
            into.load_state_dict(what)
        except ValueError as error:
            assert "parameter" in str(error), error
        else:
            raise AssertionError("the state of another partition was loaded")
        assert all(torch.equal(v, before[k]) for s in state_of(into)[-1:] for k, v in s.items())


def check_fsdp1(name):
    """Pieces of FSDP1 are refused by name, because it is unknown which rows they hold."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(
            torch.nn.Linear(8, 8), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        try:
            registry.get(name).cls(model.parameters())
        except ValueError as error:
            assert "FSDP1" in str(error) and "fully_shard" in str(error), error
        else:
            raise AssertionError("a flat parameter of FSDP1 was taken")


def main():
    folder = sys.argv[2] if len(sys.argv) > 2 else ""
    dist.init_process_group("gloo")
    for check in sys.argv[1].split(","):
        for name in registry.names():
            begin = time.perf_counter()
            try:
                globals()[f"check_{check}"](name, *([folder] if check == "sharded_checkpoint" else []))
            except BaseException:
                print(f"FAILED: check_{check} of {name} on rank {RANK}", flush=True)
                raise
            dist.barrier()
            print(f"{check} {name}: {time.perf_counter() - begin:.2f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

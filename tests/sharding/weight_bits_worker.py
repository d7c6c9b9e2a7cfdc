"""One rank of the tests of ``weight_bits`` under FSDP2: ``weight_bits_worker.py FOLDER``."""

import copy
import os
import sys
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sketch_plugins import SM3, CSAdam, Sketchy, full_precision_state_dict, load_full_precision_state_dict

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CODES = "weight_correction.codes"
EXACT = {"preset": "exact", "min_compress_size": 64}


class Net(torch.nn.Module):
    """Rows that no number of ranks divides, and a layer with fewer rows than ranks."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(37, 24)
        self.inner = torch.nn.Linear(24, 33)
        self.norm = torch.nn.LayerNorm(33)
        self.few = torch.nn.Linear(33, 1, bias=False)
        self.head = torch.nn.Linear(1, 37)

    def forward(self, x):
        return self.head(self.few(self.norm(torch.tanh(self.inner(self.embed(x))))))


def build(cls, bits, seed=0, shard=True, **options):
    torch.manual_seed(seed)
    model = Net().to(torch.bfloat16)
    if shard:
        for layer in (model.embed, model.inner):
            fully_shard(layer)
        fully_shard(model)
    return model, cls(model.named_parameters(), lr=1e-2, weight_bits=bits, **options)


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randint(0, 37, (4, 9), generator=torch.Generator().manual_seed(100 * step + RANK))
        torch.nn.functional.cross_entropy(model(x).float().flatten(0, 1), x.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def given(models, step):
    """The same gradients for a model that is sharded, and one that is not."""
    g = torch.Generator().manual_seed(step)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        p.grad = torch.randn(p.shape, generator=g).bfloat16()
        q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)


def whole(values):
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in values.items()}


def same(a, b):
    wrong = [name for name in a if not torch.equal(a[name], b[name])]
    assert not wrong and a.keys() == b.keys(), wrong


def state_of(optimizer):
    return {
        (i, name): value.to_local() if isinstance(value, DTensor) else value
        for i, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if not name.endswith(".mark")  # the state dict's
    }


def check_equal():
    """32 bits of a sharded model equal those of one process, bit for bit, so no correction was void."""
    alone, single = build(CSAdam, 32, shard=False, **EXACT)
    model, optimizer = build(CSAdam, 32, **EXACT)
    for step in range(4):
        given((alone, model), step)
        single.step()
        optimizer.step()
    same(full_precision_state_dict(alone, single), whole(full_precision_state_dict(model, optimizer)))
    some = [state[CODES] for state in optimizer.state.values() if state[CODES].numel()]
    assert some and all(bool(codes.any()) for codes in some)


def check_sharded_checkpoint(folder):
    for cls, bits in ((CSAdam, 24), (SM3, 32), (Sketchy, 24)):
        model, optimizer = build(cls, bits, min_compress_size=64)
        train(model, optimizer, range(3))
        state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{cls.__name__}")
        weights = whole(full_precision_state_dict(model, optimizer))
        if RANK == 0:
            torch.save(weights, f"{folder}/{cls.__name__}.full")
        train(model, optimizer, [3, 4])
        other, fresh = build(cls, bits, seed=1, min_compress_size=64)
        state = {"model": get_model_state_dict(other), "optim": get_optimizer_state_dict(other, fresh)}
        dcp.load(state, checkpoint_id=f"{folder}/{cls.__name__}")
        set_model_state_dict(other, state["model"])
        set_optimizer_state_dict(other, fresh, state["optim"])
        same(weights, whole(full_precision_state_dict(other, fresh)))
        train(other, fresh, [3, 4])
        same(whole(full_precision_state_dict(model, optimizer)), whole(full_precision_state_dict(other, fresh)))
        same(state_of(optimizer), state_of(fresh))


def check_full_checkpoint():
    model, optimizer = build(CSAdam, 24, min_compress_size=64)
    train(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = copy.deepcopy(get_model_state_dict(model, options=options))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, [3])
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    other, fresh = build(CSAdam, 24, seed=1, min_compress_size=64)
    set_model_state_dict(other, weights if RANK == 0 else {}, options=options)
    set_optimizer_state_dict(other, fresh, state if RANK == 0 else {}, options=options)
    train(other, fresh, [3])
    same(state_of(optimizer), state_of(fresh))
    same(whole(dict(model.named_parameters())), whole(dict(other.named_parameters())))


def check_void():
    """Only a model's weights are loaded: this rank's weights have no corrections then."""
    model, optimizer = build(CSAdam, 32, **EXACT)
    train(model, optimizer, range(2))
    other, _ = build(CSAdam, 32, seed=1, **EXACT)
    set_model_state_dict(model, get_model_state_dict(other))
    got = whole(full_precision_state_dict(model, optimizer))
    same(got, {name: value.float() for name, value in whole(dict(other.named_parameters())).items()})


def check_replicas():
    """Only one rank writes a weight: that rank warns about the consequences, once."""
    model, optimizer = build(CSAdam, 24, shard=False, **EXACT)
    said = []
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=g).bfloat16()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said += [str(one.message) for one in caught if "drift apart" in str(one.message)]
        if RANK == 1:
            with torch.no_grad():
                model.norm.weight.mul_(1.0)
    assert len(said) == (RANK == 1) and all("'norm.weight'" in one for one in said), said


def check_full_precision():
    """Whole float32 tensors into shards, and back."""
    alone, _ = build(CSAdam, 32, shard=False)
    g = torch.Generator().manual_seed(5)
    weights = {name: torch.randn(p.shape, generator=g) for name, p in alone.named_parameters()}
    model, optimizer = build(CSAdam, 32)
    load_full_precision_state_dict(model, optimizer, weights)
    out = full_precision_state_dict(model, optimizer)
    assert all(isinstance(value, DTensor) for value in out.values())
    same(whole(out), weights)
    load_full_precision_state_dict(model, optimizer, out)
    same(whole(full_precision_state_dict(model, optimizer)), weights)
    gathered = full_precision_state_dict(model, optimizer, device="cpu", whole=True, keep=RANK == 0)
    assert not any(isinstance(value, DTensor) for value in gathered.values())
    same(gathered, weights if RANK == 0 else {})


def check_load(folder):
    """A checkpoint that was recut for this number of ranks: all 32 bits are the same."""
    model, optimizer = build(SM3, 32, seed=1, min_compress_size=64)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    same(torch.load(f"{folder}/../SM3.full"), whole(full_precision_state_dict(model, optimizer)))
    train(model, optimizer, [3])


def main():
    dist.init_process_group("gloo")
    if sys.argv[1] == "load":
        check_load(sys.argv[2])
    else:
        check_equal()
        check_void()
        check_replicas()
        check_full_precision()
        check_sharded_checkpoint(sys.argv[2])
        check_full_checkpoint()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

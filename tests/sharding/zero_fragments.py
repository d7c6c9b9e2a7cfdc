"""Run by test_deepspeed_fragments.py in two processes, each a rank: real engines, one after the other.

The optimizer of every configuration checks the flat tensors that it gets in its first step: it compares them with the
weights from before the engine was built.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import weakref
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from sketch_plugins.sharding import deepspeed as zero
from sketch_plugins.sharding.pieces import Original, pieces

BASE = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero_force_ds_cpu_optimizer": False}


def stage(number: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **options}}


CPU = {"device": "cpu", "pin_memory": False}
#: name -> configuration; keys in upper case are the test's own.
CONFIGS: dict[str, dict[str, Any]] = {
    "0": {},
    "0 bf16": {**BF16},
    "1": stage(1),
    "1 bf16": {**stage(1), **BF16},
    "1 BF16_Optimizer": {**stage(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}, "WRAPPER": "BF16_Optimizer"},
    "2": stage(2),
    "2 bf16 groups": {**stage(2), **BF16, "GROUPS": True},
    "2 round robin": {**stage(2, round_robin_gradients=True), "GROUPS": True},
    "1 round robin bf16": {**stage(1, round_robin_gradients=True), **BF16},
    "2 aligned": {**stage(2, parameter_alignment=True), **BF16},
    "2 offload": {**stage(2, offload_optimizer=CPU), **OFFLOAD},
    "2 offload bf16 round robin": {**stage(2, offload_optimizer=CPU, round_robin_gradients=True), **OFFLOAD, **BF16},
    "2 one parameter": {**stage(2), "ONE": True},
    "2 tiny": {**stage(2), "TINY": True},
    "3": stage(3),
    "3 bf16 groups": {**stage(3), **BF16, "GROUPS": True},
    "3 sub-groups": {**stage(3, sub_group_size=25), "GROUPS": True, "SUB_GROUPS": True},
    "3 offload": {**stage(3, offload_optimizer=CPU), **OFFLOAD, **BF16},
    "3 zero.Init": {**stage(3), "INIT": True},
    "3 zero.Init bf16 sub-groups": {**stage(3, sub_group_size=25), **BF16, "INIT": True, "SUB_GROUPS": True},
    "3 tiny": {**stage(3), "TINY": True},
}


class Watch(torch.optim.SGD):
    """Records its arguments, and calls `look` with each group and tensor of a step."""

    look: Any = None

    def __init__(self, params: Any) -> None:
        self.originals: list[list[Original]] = []
        super().__init__(params, lr=0.1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        given = self.param_groups[-1]["params"]
        before = sum(map(len, self.originals))
        self.originals.append([Original(weakref.ref(p), zero.whole_shape(p), before + i) for i, p in enumerate(given)])

    def step(self, closure: Any = None) -> Any:
        if self.look is not None:
            for number, group in enumerate(self.param_groups):
                for p in group["params"]:
                    self.look(number, p)
        return super().step(closure)


ZERO_SUPPORTED_OPTIMIZERS.append(Watch)


class Model(torch.nn.Module):
    """An embedding that is tied, an n-d weight, vectors, one number, a frozen layer; few sizes are even."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)
        self.conv = torch.nn.Conv1d(3, 5, 3, padding=1)
        self.inner = torch.nn.Linear(10, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(1))  # DeepSpeed fails on a 0-d one

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(tokens))  # batch x 3 x 6
        x = self.conv(x)  # batch x 5 x 6
        x = self.norm(self.inner(torch.cat([x, x[..., :4]], -1)) * self.scale)
        return self.head(x).float().square().mean()


class One(torch.nn.Module):
    """One parameter that is a view and needs no padding: the flat buffer is its own storage."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(40.0)[16:].view(4, 6))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.w.float().square().mean()


class Tiny(torch.nn.Module):
    """Fewer elements than a partition, so that a rank has padding only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.w.float().square().mean()


def engine_of(options: dict[str, Any]) -> tuple[Any, Watch, dict[int, torch.Tensor]]:
    """An engine, its optimizer, and number -> the trainable weights that it began with."""
    config = {**BASE, **{k: v for k, v in options.items() if not k.isupper()}}
    torch.manual_seed(0)
    kind = One if options.get("ONE") else Tiny if options.get("TINY") else Model
    plain = kind()
    torch.manual_seed(0)
    if options.get("INIT"):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = kind()
        gather: Any = deepspeed.zero.GatheredParameters(list(model.parameters()))
    else:
        model, gather = kind(), contextlib.nullcontext()
    if options.get("GROUPS"):
        matrices = lambda m: [p for n, p in m.named_parameters() if "norm" not in n and "bias" not in n]  # noqa: E731
        vectors = lambda m: [p for n, p in m.named_parameters() if "norm" in n or "bias" in n]  # noqa: E731
        split = [vectors, matrices]
    else:
        split = [lambda m: list(m.parameters())]
    with gather:
        assert all(torch.equal(a.float(), b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)) or (
            "bf16" in options
        )
        groups = [part(model) for part in split]
        weights = {
            index: (p.detach().bfloat16() if "bf16" in options else p.detach()).float().clone()
            for index, p in enumerate(p for part in groups for p in part)
            if p.requires_grad
        }
    optimizer = Watch([{"params": part} for part in groups])
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return engine, optimizer, weights


def check(options: dict[str, Any]) -> str:
    engine, optimizer, weights = engine_of(options)
    assert type(engine.optimizer).__name__ == options.get("WRAPPER", type(engine.optimizer).__name__)
    # Before deepspeed 0.17 bf16 meant BF16_Optimizer in stage 0, too.
    flat = "zero_optimization" in options or type(engine.optimizer).__name__ == "BF16_Optimizer"
    seen: list[tuple[int, int, int]] = []  # index, start, numel
    ordinary, steps = 0, 0

    def look(_: int, tensor: torch.Tensor) -> None:
        nonlocal ordinary, steps
        steps += 1
        originals = [o for group in optimizer.originals for o in group]
        assert zero.managed(originals) == flat
        found = zero.fragments(tensor, originals)
        if not flat:
            assert found == [] and zero.process_group(originals) is None
            ordinary += 1
            return
        assert found and dist.get_world_size(zero.process_group(originals)) == dist.get_world_size()
        assert [f.offset for f in found] == sorted(f.offset for f in found)
        for f in found:
            if f.numel == 0:
                continue
            whole = weights[f.index]
            assert tuple(whole.shape) == f.whole, (whole.shape, f)
            part = whole.reshape(-1)[f.start : f.start + f.numel]
            assert torch.equal(part, tensor.detach()[f.offset : f.offset + f.numel].cpu()), f
            seen.append((f.index, f.start, f.numel))
        for piece in pieces(found):
            matrix = weights[piece.index]
            matrix = matrix.reshape(len(matrix), -1) if matrix.dim() > 1 else matrix.reshape(1, -1)
            if matrix.shape[0] == 1 and len(piece.whole) < 2:
                expected = matrix[0, piece.row : piece.row + piece.numel]
            else:
                rows = piece.shape[0]
                columns = piece.numel // rows
                expected = matrix[piece.row : piece.row + rows, piece.column : piece.column + columns]
            assert torch.equal(expected.reshape(-1), piece.of(tensor.detach()).reshape(-1).cpu()), piece

    optimizer.look = look
    loss = engine(torch.arange(6).view(2, 3) + dist.get_rank() % 2)
    engine.backward(loss)
    engine.step()
    optimizer.look = None
    assert steps, "the optimizer was not called"
    if flat:
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, seen)
        for index, whole in weights.items():
            parts = sorted((s, n) for rank in everywhere for i, s, n in rank if i == index)
            at = 0
            for start, numel in parts:
                assert start == at, (index, parts)
                at += numel
            assert at == whole.numel(), (index, parts)
        assert {i for rank in everywhere for i, _, _ in rank} == set(weights)  # nothing of a frozen one
    else:
        assert ordinary >= len(weights)
    if options.get("SUB_GROUPS"):
        assert steps > len(optimizer.originals)
    engine.destroy()
    return "ok"


#: Attribute that is removed from a running engine -> the name that the error must contain.
PARAMETER = {2: ("_dp_group", "_hp_mapping"), 3: ("_z3_optimizer", "ds_numel", "ds_process_group")}
OWNER = {3: ("grad_position", "fp32_partitioned_groups_flat", "get_param_id")}


def contract(number: int) -> dict[str, str]:
    """Remove each attribute that the code relies on, and return the messages."""
    engine, optimizer, _ = engine_of(stage(number))
    said = {}
    flats = (
        engine.optimizer.single_partition_of_fp32_groups
        if number == 2
        else engine.optimizer.fp32_partitioned_groups_flat
    )
    flat, originals = flats[0], optimizer.originals[0]
    assert zero.fragments(flat, originals)

    def ask(name: str) -> None:
        try:
            zero.managed(originals)
            zero.fragments(flat, originals)
            zero.process_group(originals)
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)

    trained = [o.ref() for o in originals if o.ref().requires_grad]
    for name in PARAMETER[number]:
        kept = [getattr(p, name) for p in trained]  # a KeyError names an attribute that has moved
        for p in trained:
            delattr(p, name)
        ask(name)
        for p, value in zip(trained, kept, strict=True):
            setattr(p, name, value)
    wrapper = engine.optimizer
    for name in OWNER.get(number, ()):
        other = type("Moved", (), {n: getattr(wrapper, n) for n in OWNER[number] if n != name})()
        for p in trained:
            p._z3_optimizer = other
        ask(name)
        for p in trained:
            p._z3_optimizer = wrapper
    if number == 2:
        linked = [p._hp_mapping for p in trained if p._hp_mapping is not None]
        kept = [m.hp_fragment for m in linked]
        for m in linked:
            m.hp_fragment = torch.zeros(1)
        ask("_hp_mapping.hp_fragment")
        for m, t in zip(linked, kept, strict=True):
            m.hp_fragment = t
        moved = next(p for p in trained if p._hp_mapping is not None)
        data = moved.data
        moved.data = data.clone()
        ask("views of one buffer")
        moved.data = data
    ask("")
    engine.destroy()
    # An engine that is gone leaves its attributes, but its parameters are ordinary ones again.
    assert zero.fragments(trained[0], originals) == []
    return said


#: The configurations for four ranks, which share two cores.
FOUR = ("1 BF16_Optimizer", "2 bf16 groups", "2 round robin", "2 tiny", "3 sub-groups", "3 tiny")


def main(out: str) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    results: dict[str, Any] = {}
    many = dist.get_world_size() > 2
    for name, options in CONFIGS.items():
        if many and name not in FOUR:
            continue
        try:
            results[name] = check(options)
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other rank may be waiting for this one
    else:
        for number in () if many else (2, 3):
            results[f"contract {number}"] = contract(number)
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(results, file)
    os._exit(0)  # a rank that has failed must not wait for the other one


if __name__ == "__main__":
    main(sys.argv[1])

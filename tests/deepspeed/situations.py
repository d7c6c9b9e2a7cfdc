"""Run by test_situations.py in two processes: what may befall an optimizer between two steps."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import sys
import traceback
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import sketch_deepspeed  # noqa: F401
from sketch_plugins import CSAdam, Sketchy, state_report
from sketch_plugins.sharding.state_names import kind_of

SMALL = {"lr": 1e-2, "min_compress_size": 64}


class Model(torch.nn.Module):
    """Two matrices of one size: partitions that fit either."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(64, 96, bias=False)
        self.b = torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).float().square().mean()


def engine_of(stage: int, cls: Any = CSAdam, copied: Any = None, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Model()
    optimizer = cls([{"params": [model.a.weight]}, {"params": [model.b.weight]}], **SMALL)
    if copied is not None:
        model, optimizer = copied((model, optimizer))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        engine.backward(engine(x.to(next(engine.module.parameters()).dtype)))
        engine.step()


def kept(engine: Any, first: int = 0) -> list[torch.Tensor]:
    """All of the optimizer's numbers and state on this rank, or those of its groups from the first one on."""
    leaves = torch.utils._pytree.tree_leaves
    return [
        tensor.detach().clone()
        for group in engine.basic_optimizer.param_groups[first:]
        for p in group["params"]
        for tensor in (p, *leaves(engine.basic_optimizer.state.get(p, {})))
    ]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def looked_at_while_away() -> bool:
    """A report between offload_states and reload_states, when nothing links parameters to partitions."""
    found = []
    for look in (False, True):
        engine = engine_of(2)
        train(engine, range(2))
        engine.offload_states()
        if look:
            state_report(engine.basic_optimizer)
            engine.basic_optimizer.load_state_dict(engine.basic_optimizer.state_dict())
        engine.reload_states()
        train(engine, range(2, 4))
        found.append(kept(engine))
        engine.destroy()
    return same(*found)


def bytes_of_copies() -> dict[str, list[int]]:
    ways: list[Any] = [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
    out: dict[str, list[int]] = {}
    for stage in (2, 3):
        for copied in ways:
            engine = engine_of(stage, copied=copied)
            train(engine, range(1))
            out.setdefault(str(stage), []).append(state_report(engine.basic_optimizer).state_bytes)
            engine.destroy()
    return out


def not_a_number() -> dict[str, Any]:
    """In the last group's gradient, on one rank, where DeepSpeed has been told not to look."""
    engine = engine_of(2, Sketchy, bf16={"enabled": True, "check_grad_overflow": False})
    train(engine, range(1))
    before = kept(engine, -1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    engine.backward(engine(x.bfloat16()))
    if dist.get_rank() == 1:
        engine.optimizer.averaged_gradients[1][0].fill_(float("nan"))
    said = ""
    try:
        engine.step()
    except ValueError as error:
        said = str(error)
    # DeepSpeed has left the optimizer with the group whose step has failed.
    out = {"said": said, "second group": same(before, kept(engine, -1))}
    engine.destroy()
    return out


def deferred() -> str:
    """ZeRO steps its groups one by one, so the next step would not be that of the same parameters."""
    engine = engine_of(2, Sketchy)
    for group in engine.basic_optimizer.param_groups:
        group["nonfinite"] = "deferred"
    before = kept(engine)
    try:
        train(engine, range(1))
    except ValueError as error:
        after = kept(engine)  # DeepSpeed has left the optimizer with the group whose step has failed
        assert after and same(before[: len(after)], after)
        return str(error)
    finally:
        engine.destroy()
    return "a step was taken"


def after_its_engine() -> bool:
    """Marks of ZeRO are still on the parameters: a step of one rank alone waits for nobody."""
    engine = engine_of(2)
    parameters = list(engine.module.parameters())
    engine.destroy()
    if dist.get_rank() == 0:
        optimizer = Sketchy([torch.nn.Parameter(p.detach().clone()) for p in parameters] + parameters, **SMALL)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return True


def poisoned() -> str:
    engine = engine_of(2, Sketchy)
    train(engine, range(2))
    optimizer = engine.basic_optimizer
    state = copy.deepcopy(optimizer.state_dict())
    for pieces in state["state"].values():
        for name, tensor in pieces.items():
            if kind_of(name) == "preconditioner":
                tensor.fill_(float("nan"))
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return "loaded"


def main(out: str) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    try:
        results: dict[str, Any] = {
            function.__name__: function()
            for function in (looked_at_while_away, bytes_of_copies, not_a_number, deferred, after_its_engine, poisoned)
        }
    except Exception:
        results = {"error": traceback.format_exc()}
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(results, file)
    os._exit(0)  # a rank that has failed must not wait for the other one


if __name__ == "__main__":
    main(sys.argv[1])

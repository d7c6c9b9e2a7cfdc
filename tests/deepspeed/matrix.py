"""Run by test_matrix.py in two processes, each a rank: every optimizer of the registry in every stage of ZeRO.

Writes what it measured; the test decides. What a case needs and the processor lacks is written as its reason to skip.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import sketch_deepspeed  # noqa: F401
from sketch_plugins import registry
from sketch_plugins.sharding.state_names import kind_of

VOCABULARY, DIM, LENGTH, BATCH = 1536, 96, 12, 2
CPU = {"device": "cpu", "pin_memory": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "zero0 bf16": {"bf16": {"enabled": True}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero2 offload": {"zero_optimization": {"stage": 2, "offload_optimizer": CPU}},
}
#: Where the state lies concerns no rule: a first moment in int8, a cover, preconditioners.
OFFLOADED = ("cs_adam", "sm3", "sketchy")
#: Presets in which each element has numbers of its own: the same whichever rank has which element.
ELEMENTWISE = {
    "cs_adam": {"preset": "exact"},
    "cs_adagrad": {"preset": "exact"},
    "cs_momentum": {"preset": "exact"},
    "cs_rmsprop": {"preset": "exact"},
    "sm3": {"preset": "paper", "first_moment": "fp32", "second_moment": "dense", "lr": 0.05},
}
RATES = {"cs_momentum": 0.05, "cs_adagrad": 0.02, "sm3": 1e-3, "sketchy": 4e-4, "cs_lion": 1e-3}
OPTIONS: dict[str, Any] = {"sketchy": {"rank": 4, "update_freq": 2}}


class Layer(torch.nn.Module):
    """BERT's, without the dropout."""

    def __init__(self) -> None:
        super().__init__()
        # The softmax does not depend on a bias of the keys: its gradient would be rounding errors.
        self.query, self.key, self.value, self.output = (torch.nn.Linear(DIM, DIM, bias=i != 1) for i in range(4))
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(DIM), torch.nn.LayerNorm(DIM)])
        self.up, self.down = torch.nn.Linear(DIM, 4 * DIM), torch.nn.Linear(4 * DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2) / math.sqrt(DIM), -1) @ self.value(x)
        x = self.norms[0](x + self.output(a))
        return self.norms[1](x + self.down(torch.nn.functional.gelu(self.up(x))))


class Model(torch.nn.Module):
    """Of BERT's proportions: half of the parameters in the embedding, which is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(VOCABULARY, DIM)
        self.places = torch.nn.Embedding(LENGTH, DIM)
        self.layers = torch.nn.Sequential(Layer(), Layer())
        self.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        logits = x @ self.words.weight.T + self.bias
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def new_model() -> Model:
    torch.manual_seed(0)
    model = Model()
    torch.nn.init.normal_(model.words.weight, std=0.1)
    return model


def tokens_of(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(100 * step + rank))


def params_of(name: str) -> dict[str, Any]:
    return {"lr": RATES.get(name, 1e-2), "weight_decay": 0.01, **OPTIONS.get(name, {})}


def engine_of(name: str, config: dict[str, Any], params: dict[str, Any]) -> Any:
    model = new_model()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # 1 is the default
        "optimizer": {"type": name, "params": params},
        **config,
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(tokens_of(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def base(engine: Any) -> Any:
    return engine.basic_optimizer


def tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for value in state.values() for t in tensors(value)] if isinstance(state, dict) else []


def numbers(engine: Any) -> list[torch.Tensor]:
    """All that a step changes on this rank: masters and state."""
    wrapper = engine.optimizer
    masters = getattr(wrapper, "single_partition_of_fp32_groups", None)
    if masters is None:
        masters = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    if masters is None:
        masters = [p for group in base(engine).param_groups for p in group["params"]]
    state = base(engine).state
    return [t.detach().clone() for t in [*masters, *(t for p in masters for t in tensors(state[p]))]]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def nbytes(optimizer: Any) -> int:
    return sum(
        t.numel() * t.element_size() for state in optimizer.state.values() for t in tensors(without_places(state))
    )


def of_columns(optimizer: Any) -> int:
    """Bytes of sketches of columns, of which each process that holds rows of a matrix has one of its own."""
    return sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for name, t in state.items()
        if kind_of(name) == "preconditioner" and name.endswith("_1")
    )


def without_places(state: Any) -> Any:
    """Without the number of the step and the place of a piece, a few bytes each."""
    if not isinstance(state, dict):
        return state
    return {key: without_places(value) for key, value in state.items() if kind_of(key) not in ("step", "place")}


def weights(engine: Any) -> dict[str, torch.Tensor]:
    named = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().float().clone() for name, p in named.items()}


def single_process(name: str, params: dict[str, Any], steps: int, bf16: bool = False) -> tuple[Any, dict[str, Any]]:
    """The run of one process on the batches of both ranks, in plain torch."""
    model = new_model()
    if bf16:
        model.bfloat16()
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = registry.get(name).cls(masters, **params)
    for step in range(steps):
        halves = [torch.autograd.grad(model(tokens_of(step, rank)), list(model.parameters())) for rank in (0, 1)]
        for master, a, b in zip(masters, *halves, strict=True):
            master.grad = ((a + b) / 2).float()
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
    return optimizer, {n: p.detach().float() for n, p in model.named_parameters()}


def check(name: str, config: dict[str, Any], folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    params = params_of(name)
    engine = engine_of(name, config, params)
    out["losses"] = train(engine, range(3))
    engine.save_checkpoint(folder, tag="t")
    train(engine, range(3, 5))
    expected, mine = numbers(engine), nbytes(base(engine))
    out["class"] = type(base(engine)).__name__
    out["bytes"] = mine
    engine.destroy()
    again = engine_of(name, config, {**params, "lr": 0.5})  # the checkpoint's rate has to win
    again.load_checkpoint(folder, tag="t")
    train(again, range(3, 5))
    out["resumed"] = same(numbers(again), expected)
    again.destroy()
    if name in ELEMENTWISE:
        bf16 = "bf16" in config
        params = {**params, **ELEMENTWISE[name]}
        engine = engine_of(name, config, params)
        train(engine, range(3))
        _, reference = single_process(name, params, 3, bf16)
        found = weights(engine)
        each = {n: (found[n] - reference[n]).abs().max().item() for n in reference}
        out["differs"] = max(each.values())
        out["where"] = max(each, key=each.__getitem__)
        start = {n: p.detach().float() for n, p in new_model().named_parameters()}
        out["moved"] = max((found[n] - start[n]).abs().max().item() for n in reference)
        engine.destroy()
    return out


def scaled_fp16(engine: Any, loss: torch.Tensor) -> None:
    """DeepSpeed's dynamic scale of the loss, which it has for fp16; rank 1's loss overflows."""
    engine.backward(loss * (float("inf") if dist.get_rank() == 1 else 1.0))


def scaled_fp32(engine: Any, loss: torch.Tensor) -> None:
    """A scale of the loss with which a large loss of rank 1 has gradients beyond float32."""
    spiked = dist.get_rank() == 1
    engine.optimizer.override_loss_scale(2.0**127 if spiked else SCALE)
    engine.backward(loss * (2.0**20 if spiked else 1.0))
    engine.optimizer.override_loss_scale(SCALE)


def infinite_by_hand(engine: Any, loss: torch.Tensor) -> None:
    """One element of one gradient of rank 1 is infinite."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[3] = float("inf")
        return gradient

    hook = engine.module.bias.register_hook(spoil) if dist.get_rank() == 1 else None
    engine.backward(loss)
    if hook is not None:
        hook.remove()


SCALE = 2.0**8
FP16 = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 100}
#: How a gradient comes to be infinite: the precision of the run, and what is done in the step in question.
OVERFLOWS: dict[str, tuple[dict[str, Any], Any]] = {
    "fp16": ({"fp16": FP16}, scaled_fp16),
    "bf16": ({"bf16": {"enabled": True}}, infinite_by_hand),
    "fp32": ({}, scaled_fp32),
}


def overflow(name: str, config: dict[str, Any], how: str) -> dict[str, Any]:
    """The second step's gradients are not finite on one rank, all skip it; then everything goes on."""
    precision, spoil = OVERFLOWS[how]
    if how == "fp16" and not get_accelerator().is_fp16_supported():
        return {"skip": "this processor has no float16 arithmetic: DeepSpeed refuses fp16"}
    config = {**{k: v for k, v in config.items() if k != "bf16"}, **precision}
    engine = engine_of(name, config, params_of(name))
    if how == "fp32":
        engine.optimizer.override_loss_scale(SCALE)
    train(engine, range(1))
    before, steps = numbers(engine), engine.skipped_steps
    spoil(engine, engine(tokens_of(9, dist.get_rank())))
    engine.step()
    out = {"skipped": engine.skipped_steps - steps, "untouched": same(numbers(engine), before)}
    losses = train(engine, range(1, 3))
    out |= {"finite": all(map(math.isfinite, losses)), "moves": not same(numbers(engine), before)}
    engine.destroy()
    return out


def overflows_of(name: str, label: str) -> list[str]:
    # DeepSpeed decides about a step, whatever the optimizer. Offloaded it is decided as in stage 2 without.
    if name not in ("cs_adam", "sketchy") or "offload" in label:
        return []
    # In fp32 without ZeRO nothing of DeepSpeed looks at the gradients.
    return [how for how in OVERFLOWS if (label, how) != ("zero0 bf16", "fp32")]


class Cases:
    """Runs cases one after the other. One that fails costs its own results, and no others.

    It has to fail on both ranks: if one waits for the other in the middle of a case, there is no way on for either.
    """

    def __init__(self, place: str) -> None:
        self.store = dist.FileStore(place, 2)
        self.results: dict[str, Any] = {}

    def run(self, key: str, action: Any, *arguments: Any) -> None:
        try:
            self.results[key] = action(*arguments)
        except Exception:
            self.results[key] = {"error": traceback.format_exc()}
        self.store.set(f"{key} {dist.get_rank()}", "ended")
        self.store.wait([f"{key} {1 - dist.get_rank()}"], timedelta(seconds=60))


def main(out: str, folder: str) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    cases = Cases(f"{out}.store")
    try:
        for name in registry.names():
            whole = single_process(name, params_of(name), 1)[0]
            cases.results[name] = {"bytes": nbytes(whole), "columns": of_columns(whole)}
            for label, config in CONFIGS.items():
                if label == "zero2 offload" and name not in OFFLOADED:
                    continue
                key = f"{name} {label}"
                cases.run(key, check, name, config, f"{folder}/{key.replace(' ', '-')}")
                for how in overflows_of(name, label):
                    cases.run(f"{key} overflow {how}", overflow, name, config, how)
    except Exception:
        cases.results["error"] = traceback.format_exc()
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(cases.results, file)
    os._exit(0)  # a rank that has failed must not wait for the other one


if __name__ == "__main__":
    main(*sys.argv[1:])

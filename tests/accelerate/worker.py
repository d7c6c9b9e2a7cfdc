"""Run by test_accelerate.py in two processes: the optimizers through ``Accelerator.prepare``.

``worker.py OUT FOLDER RUNNER,...`` writes the results to ``OUT.RANK``: runner -> optimizer -> "ok" or a traceback.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin, set_seed

import sketch_accelerate  # noqa: F401
from sketch_plugins import cast_model, full_precision_state_dict, registry

MICROS, SAVED, LAST = 2, 2, 4  # micro-batches of a step; the steps that are saved after, and that end a run
#: Methods whose result does not depend on the cut of the parameters: here FSDP2 has to equal DDP to the last bit.
EXACT = {"cs_adam": "exact", "cs_rmsprop": "exact", "cs_adagrad": "exact"}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(61, 33)
        self.inner = torch.nn.Linear(33, 47)
        self.norm = torch.nn.LayerNorm(47)
        self.head = torch.nn.Linear(47, 61)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.norm(torch.tanh(self.inner(self.embed(x)))))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())


def accelerator_of(runner: str) -> Accelerator:
    """An accelerator in the state that the launcher and a machine with GPUs would give it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    state = PartialState(cpu=True)
    if runner.startswith("zero"):
        import deepspeed

        # Gloo is enough; DeepSpeed's own way would be compiled first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "zero_optimization": {"stage": int(runner[4])},
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 1.0,
            "gradient_accumulation_steps": MICROS,
        }
        if "offload" in runner:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if "named" in runner:
            config["optimizer"] = {"type": "cs_adam", "params": {"lr": "auto", "min_compress_size": 64}}
        # `accelerate launch --use_deepspeed` sets this; accelerate reads it only if no CPU is requested.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        try:
            return Accelerator(
                deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), gradient_accumulation_steps=MICROS
            )
        finally:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]
    plugin = None
    if runner.startswith("fsdp"):
        # accelerate uses FSDP only with several GPUs, and trains with DDP otherwise. FSDP2 itself runs on a CPU, so the
        # accelerator is told so before it decides.
        state.distributed_type = DistributedType.MULTI_GPU
        _, kind, saved, *_ = (*runner.split(" "), "sharded")
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=1 if kind == "1" else 2,
            state_dict_type=f"{saved.upper()}_STATE_DICT",
            auto_wrap_policy="size_based_wrap",
            min_num_params=1000,
            cpu_ram_efficient_loading=saved == "full",
        )
    precision = "bf16" if "bf16" in runner else "no"
    return Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=plugin, gradient_accumulation_steps=MICROS)


def build(runner: str, name: str, seed: int, **options: Any) -> tuple[Any, ...]:
    accelerator = accelerator_of(runner)
    set_seed(seed)
    model = Net()
    if "24 bits" in runner:
        cast_model(model, torch.bfloat16)
        options = {"weight_bits": 24, **options}
    own = {"lr": 0.01, "min_compress_size": 64, "rank": 4, "update_freq": 2, **options}
    own = {k: v for k, v in own.items() if k in registry.get(name).options or k == "preset"}
    if "named" in runner:
        from accelerate.utils import DummyOptim

        optimizer: Any = DummyOptim(model.parameters(), lr=own["lr"])
    else:
        optimizer = registry.get(name).cls(model.named_parameters(), **own)
    rows = (torch.arange(64 * 8) * 7 % 59).reshape(64, 8)
    data = torch.utils.data.DataLoader(rows, batch_size=4)
    given = [model, optimizer, data]
    if "named" not in runner:
        given.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))
    return accelerator, *accelerator.prepare(*given)


def train(accelerator: Accelerator, prepared: tuple[Any, ...], first: int, last: int) -> list[float]:
    model, optimizer, data, *schedule = prepared
    losses = []
    for number, x in enumerate(data):
        if not first * MICROS <= number < last * MICROS:
            continue
        with accelerator.accumulate(model):
            loss = model(x)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for one in schedule:
                one.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(value: Any, key: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested state, as this rank has it."""
    if isinstance(value, dict):
        return {k: t for name, v in value.items() for k, t in tensors(v, f"{key}/{name}").items()}
    if isinstance(value, torch.Tensor):
        return {key: (value.to_local() if hasattr(value, "to_local") else value).detach().clone()}
    return {}


def whole(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """All weights, under the names that they have in the model."""
    named = accelerator.unwrap_model(model).named_parameters()
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in named}


def inner(optimizer: Any) -> Any:
    while not type(optimizer).__module__.startswith("sketch_plugins."):
        optimizer = optimizer.optimizer
    return optimizer


def held(ours: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The numbers that have state, and the state, on this rank: ZeRO-3 passes parameters to a step only."""
    every = list(ours.state.items())
    return tensors({str(i): p for i, (p, _) in enumerate(every)}), tensors(
        {str(i): s for i, (_, s) in enumerate(every)}
    )


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    assert a and a.keys() == b.keys(), (what, a.keys() ^ b.keys())
    wrong = [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])]
    assert not wrong, (what, wrong)


def check(runner: str, name: str, folder: Path) -> str:
    """Trains. A state that is saved in the middle and loaded into other weights ends with the same weights."""
    accelerator, *prepared = build(runner, name, seed=0)
    ours = inner(prepared[1])
    assert accelerator.num_processes == 2 and accelerator.process_index == int(os.environ["RANK"])
    assert type(ours) is registry.get(name).cls
    if runner.startswith("fsdp"):
        assert accelerator.is_fsdp2 and all(hasattr(p, "to_local") for g in ours.param_groups for p in g["params"])
    before = whole(accelerator, prepared[0]) if "zero3" not in runner else {}
    losses = train(accelerator, prepared, 0, SAVED)
    assert all(
        not torch.equal(value, before.get(key)) for key, value in whole(accelerator, prepared[0]).items() if before
    )
    saved = str(folder / f"{runner}-{name}".replace(" ", "-"))
    accelerator.save_state(saved)
    losses += train(accelerator, prepared, SAVED, LAST)
    weights, state = held(ours)
    # Bytes of a dense Adam; with sharding, this rank's share.
    dense = 8 * sum(p.numel() for p in Net().parameters()) / (1 if runner.startswith("ddp") else 2)
    size = sum(t.nbytes for t in state.values())
    assert size < 0.75 * dense, (size, dense)
    if "24 bits" in runner:
        exported = tensors(full_precision_state_dict(accelerator.unwrap_model(prepared[0]), ours))

    accelerator, *prepared = build(runner, name, seed=1)
    accelerator.load_state(saved)
    assert train(accelerator, prepared, SAVED, LAST) == losses[SAVED * MICROS :]
    ours = inner(prepared[1])
    for was, now, what in zip((weights, state), held(ours), ("weights", "state"), strict=True):
        equal(was, now, f"{what} after a resume")
    if "24 bits" in runner:
        again = tensors(full_precision_state_dict(accelerator.unwrap_model(prepared[0]), ours))
        equal(exported, again, "exported weights after a resume")
        kept = tensors(accelerator.unwrap_model(prepared[0]).state_dict())
        for key, value in again.items():  # at most half of a unit in the last place away
            torch.testing.assert_close(value, kept[key].float(), rtol=2**-8, atol=0)
        assert any(not torch.equal(value, kept[key].float()) for key, value in again.items())
    return "ok"


def check_exact(name: str, preset: str) -> str:
    """FSDP2 in accelerate equals DDP in accelerate if the method does not depend on the cut."""
    ends = []
    for runner in ("ddp", "fsdp 2 sharded"):
        accelerator, *prepared = build(runner, name, seed=0, preset=preset)
        train(accelerator, prepared, 0, LAST)
        ends.append({k.removeprefix("module."): v for k, v in whole(accelerator, prepared[0]).items()})
    # The gradients' norm is summed in another order, so clipping differs in the last bit.
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-5, atol=1e-6)
    return "ok"


def check_fsdp1(name: str) -> str:
    try:
        build("fsdp 1", name, seed=0)
    except ValueError as error:
        assert "FSDP1" in str(error) and "fsdp_version: 2" in str(error), error
        return "ok"
    return "FSDP1 was not refused"


def main(out: str, folder: str, runners: list[str]) -> None:
    results: dict[str, dict[str, str]] = {}
    for runner in runners:
        if runner == "fsdp 1":
            checks = {name: partial(check_fsdp1, name) for name in registry.names()}
        elif runner == "exact":
            checks = {name: partial(check_exact, name, preset) for name, preset in EXACT.items()}
        else:
            # The tests of sketch_deepspeed cover every optimizer in every stage.
            names = ["cs_adam"] if "zero" in runner or "24 bits" in runner else registry.names()
            checks = {name: partial(check, runner, name, Path(folder)) for name in names}
        for name, one in checks.items():
            try:
                results.setdefault(runner, {})[name] = one()
            except Exception:
                results.setdefault(runner, {})[name] = traceback.format_exc()
                write(out, results)
                os._exit(0)  # the other rank may be waiting for this one, which must not wait for it
    write(out, results)
    dist.destroy_process_group()


def write(out: str, results: dict[str, dict[str, str]]) -> None:
    Path(f"{out}.{os.environ['RANK']}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3].split(","))

"""The lines to write in each framework for a rung of `advise`'s ladder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sketch_plugins.memory.report import format_bytes

#: Trainer's argument, Lightning's precision, accelerate's ``mixed_precision``, DeepSpeed's block, for each precision.
_PRECISIONS: dict[str, tuple[str | None, str, str, str | None]] = {
    "fp32": (None, "32-true", "no", None),
    "bf16": (None, "bf16-true", "no", "bf16"),
    "bf16-mixed": ("bf16", "bf16-mixed", "bf16", "bf16"),
    "fp16-mixed": ("fp16", "16-mixed", "fp16", "fp16"),
}
_CHECKPOINTING = 'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
_CAST = "model = cast_model(model, torch.bfloat16)  # or load it in bfloat16"
#: Elements of DeepSpeed's buckets. Its default is 5e8, which is 1 GB in bfloat16.
BUCKET = 20_000_000


@dataclass(frozen=True)
class Settings:
    """The settings that are turned on.

    Attributes:
        optimizer: ``"adamw"`` (torch's) or ``"cs_adam"``.
        precision: precision of weights and autocast, by the names of `sketch_plugins.plan`.
        lean: the preset without momentum.
        weight_bits: 24, or None.
        in_backward: steps in backward.
        checkpointing: activations are recomputed.
        offloaded: DeepSpeed keeps float32 weights, gradients and state in host memory.
        batch: samples of a pass.
        accumulation: passes of a step.
    """

    optimizer: str
    precision: str
    lean: bool = False
    weight_bits: int | None = None
    in_backward: bool = False
    checkpointing: bool = False
    offloaded: bool = False
    batch: int = 8
    accumulation: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """Options of the optimizer."""
        bits = {} if self.weight_bits is None else {"weight_bits": self.weight_bits}
        return {**({"preset": "lean"} if self.lean else {}), **bits}


def refused(own: Settings) -> dict[str, str]:
    """Framework -> the reason why it cannot have these settings."""
    why = []
    if own.weight_bits:
        why.append("it steps a float32 copy of the weights itself, so that weight_bits means nothing")
    if own.in_backward and not own.offloaded:
        why.append("its engine keeps the gradients until backward ends, so that no step can be taken in it")
    return {"deepspeed": "; ".join(why)} if why else {}


def lines(own: Settings) -> dict[str, str]:
    """Framework -> code, or for DeepSpeed its configuration in JSON, for frameworks that can have these settings."""
    made = {"trainer": _trainer(own), "lightning": _lightning(own), "accelerate": _accelerate(own)}
    return made if refused(own) else {**made, "deepspeed": json.dumps(_deepspeed(own), indent=2)}


def notes(own: Settings, params: int) -> dict[str, str]:
    """Framework -> what it keeps in memory beyond the plan of a model with ``params`` parameters.

    In bf16 and fp16 without ZeRO, DeepSpeed keeps half-precision weights and gradients and a float32 copy of the
    weights, and copies the gradients to float32 in the step: 12 bytes a parameter. The plan counts weights and
    gradients of 2 or 4 bytes each. AdamW's state is float32 then, where the plan's has the dtype of the weights.
    """
    block, half = _PRECISIONS[own.precision][3], own.precision == "bf16"
    if own.offloaded or refused(own) or block is None:
        return {}
    adamw = half and own.optimizer == "adamw"
    kept = "float32 copies of weights and gradients" + (", and AdamW's state in float32" if adamw else "")
    more = 12 - 2 * (2 if half else 4) + (4 if adamw else 0)
    return {
        "deepspeed": f"in {block} DeepSpeed has {kept}: about {more} bytes a parameter ({format_bytes(more * params)}) "
        "more in the step than the table counts"
    }


def _trainer(own: Settings) -> str:
    ours, flag = own.optimizer != "adamw", _PRECISIONS[own.precision][0]
    if own.offloaded:
        flag = "bf16"
    given: dict[str, Any] = {"optim": "adamw_torch_fused"}
    if ours:
        given["optim"] = f"{own.optimizer}_layerwise" if own.in_backward and not own.offloaded else own.optimizer
        if own.options:
            given["optim_args"] = ",".join(f"{name}={value}" for name, value in own.options.items())
    if flag is not None:
        given[flag] = True
    if own.in_backward and not own.offloaded:
        given["max_grad_norm"] = 0.0
    if own.checkpointing:
        given |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    given["per_device_train_batch_size"] = own.batch
    given["gradient_accumulation_steps"] = own.accumulation
    if own.offloaded:
        # Trainer makes the optimizer, so the configuration has no block for it.
        config = {name: value for name, value in _deepspeed(own).items() if name in ("bf16", "zero_optimization")}
        # "auto": Trainer fills in its own arguments. Without it DeepSpeed would not clip to max_grad_norm.
        filled = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        given["deepspeed"] = {**config, **dict.fromkeys(filled, "auto")}
    casts = _is_cast(own)
    top = ["import torch"] if casts else []
    top += ["import sketch_transformers  # before TrainingArguments"] if ours else []
    top += ["from sketch_plugins import cast_model"] if casts else []
    top += ["from transformers import TrainingArguments", ""]
    return "\n".join([*top, *([_CAST] if casts else []), _call("args = TrainingArguments", ['"out"'], given)])


def _lightning(own: Settings) -> str:
    precision = "bf16-true" if own.offloaded else _PRECISIONS[own.precision][1]
    imports, arguments, before = [], [], []
    if own.optimizer != "adamw":
        cls = "SketchDeepSpeedStrategy" if own.offloaded else "SketchStrategy"
        words = [f'optimizer="{own.optimizer}"']
        if own.options:
            words.append(f"optimizer_kwargs={_python(own.options)}")
        if own.offloaded:
            words += ["stage=2", "offload_optimizer=True", f"reduce_bucket_size={BUCKET}"]
        imports.append(cls)
        arguments.append(f"strategy={cls}({', '.join(words)})")
        if own.in_backward and not own.offloaded:
            imports.append("OptimizerInBackward")
            arguments.append("callbacks=[OptimizerInBackward()]")
    arguments.append(f'precision="{precision}"')
    arguments.append("devices=1")
    if own.accumulation > 1:
        arguments.append(f"accumulate_grad_batches={own.accumulation}")
    if own.checkpointing:
        before.append(f"{_CHECKPOINTING}  # where the module builds its model")
    ours = [f"from sketch_lightning import {', '.join(sorted(imports))}"] if imports else []
    return "\n".join([
        "from lightning import Trainer",
        *ours,
        "from torch.utils.data import DataLoader",
        "",
        *before,
        f"data = DataLoader(dataset, batch_size={own.batch})",
        "trainer = Trainer(",
        *(f"    {argument}," for argument in arguments),
        ")  # the module builds AdamW" if imports else ")",
    ])  # fmt: skip


def _accelerate(own: Settings) -> str:
    mixed = "bf16" if own.offloaded else _PRECISIONS[own.precision][2]
    ours, casts, back = own.optimizer != "adamw", _is_cast(own), own.in_backward and not own.offloaded
    names = [*(["CSAdam"] if ours else []), *(["InBackward"] if back else []), *(["cast_model"] if casts else [])]
    options = "".join(f", {name}={_python(value)}" for name, value in own.options.items())
    made = f"CSAdam(model.parameters(), lr=1e-4{options})"
    if not ours:
        made = "torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)"
    words, config = [f'mixed_precision="{mixed}"'], []
    if own.accumulation > 1:
        words.append(f"gradient_accumulation_steps={own.accumulation}")
    if own.offloaded:
        # accelerate gets the optimizer as an object, and fills in what is "auto".
        config = [
            "config = {",
            f'    "zero_optimization": {_python(_deepspeed(own)["zero_optimization"])},',
            '    "train_micro_batch_size_per_gpu": "auto",',
            '    "gradient_accumulation_steps": "auto",',
            "}",
        ]
        words.append("deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)")
    top = ["import torch"] if casts or not ours else []
    top += ["import sketch_accelerate"] if ours else []
    top.append(f"from accelerate import Accelerator{', DeepSpeedPlugin' if own.offloaded else ''}")
    top += [f"from sketch_plugins import {', '.join(names)}"] if names else []
    return "\n".join([
        *top,
        "from torch.utils.data import DataLoader",
        "",
        *([_CAST] if casts else []),
        *([_CHECKPOINTING] if own.checkpointing else []),
        f"optimizer = {made}  # your learning rate",
        f"data = DataLoader(dataset, batch_size={own.batch})",
        *config,
        f"accelerator = Accelerator({', '.join(words)})",
        "model, optimizer, data = accelerator.prepare(model, optimizer, data)",
        *(["InBackward(optimizer, last=lambda: accelerator.sync_gradients)"] if back else []),
    ])  # fmt: skip


def _deepspeed(own: Settings) -> dict[str, Any]:
    block = "bf16" if own.offloaded else _PRECISIONS[own.precision][3]
    zero: dict[str, Any] = {"stage": 0}
    if own.offloaded:
        zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": BUCKET}
    return {
        "train_micro_batch_size_per_gpu": own.batch,
        "gradient_accumulation_steps": own.accumulation,
        **({} if block is None else {block: {"enabled": True}}),
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW" if own.optimizer == "adamw" else own.optimizer,
            "params": {"lr": 1e-4, **own.options},
        },
    }


def _is_cast(own: Settings) -> bool:
    """Whether the model's own weights have to be bfloat16 before any framework gets them."""
    return own.precision == "bf16" and not own.offloaded


def _call(what: str, words: list[str], given: dict[str, Any]) -> str:
    arguments = [*words, *(f"{name}={_python(value)}" for name, value in given.items())]
    return "\n".join([f"{what}(", *(f"    {argument}," for argument in arguments), ")"])


def _python(value: Any) -> str:
    """A literal as people write it, with double quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_python(key)}: {_python(item)}" for key, item in value.items()) + "}"
    return json.dumps(value) if isinstance(value, str) else repr(value)

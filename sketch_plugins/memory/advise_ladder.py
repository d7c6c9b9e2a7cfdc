"""The ladder of advice: which rungs it has, in which order, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sketch_plugins.memory.advise_lines import Settings
from sketch_plugins.memory.plan_optimizers import Choice, choices


@dataclass(frozen=True)
class Step:
    """A rung before it is planned."""

    name: str
    cost: str
    choice: Choice
    own: Settings

    def without_checkpointing(self) -> Step:
        """The same rung for a model that cannot recompute its activations."""
        return replace(self, own=replace(self.own, checkpointing=False))


def ladder(start: Settings, device: str, module: bool) -> tuple[list[Step], list[str]]:
    """``(rungs, what is left out and why)``; rungs that turn checkpointing on come last."""
    steps: list[Step] = []
    notes = []
    own = start

    def add(name: str, cost: str, text: str, offloaded: bool = False) -> None:
        (choice,) = choices(text, start.precision)
        pure_bf16 = choice.pure_bf16 or offloaded
        steps.append(Step(name, cost, replace(choice, label=name, pure_bf16=pure_bf16, offloaded=offloaded), own))

    add("AdamW, as it is", "nothing: the run to compare with", "adamw")
    own = replace(own, optimizer="cs_adam")
    add(
        "sketched state",
        "several rows share a second moment, the momentum has 8 bits; AdamW's learning rate",
        "cs_adam",
    )
    own, options = replace(own, lean=True), "preset=lean"
    add("lean state", "there is no momentum; AdamW's learning rate", f"cs_adam:{options}")
    if start.precision == "bf16":
        notes.append(
            "24-bit weights are no rung, for the weights are bfloat16 already: weight_bits=24 takes a byte a parameter "
            "more and keeps the updates that bfloat16 rounds away"
        )
    else:
        own, options = replace(own, precision="bf16", weight_bits=24), f"{options},weight_bits=24"
        cost = "weights, gradients and activations in bfloat16; 8 more bits of each weight are among the state"
        add("bf16 with 24-bit weights", cost, f"cs_adam:{options}")
    own = replace(own, in_backward=True)
    cost = "no clipping by the gradients' common norm, no gradients to look at; one process, or FSDP2"
    add("steps in backward", cost, f"cs_adam_layerwise:{options}")
    if start.checkpointing:
        notes.append("gradient checkpointing is on from the start and therefore no rung")
    elif module:
        notes.append("gradient checkpointing is no rung: turn it on in the module itself, and ask again")
    else:
        own = replace(own, checkpointing=True)
        cost = "the forward pass is computed twice: about a third more time"
        add("gradient checkpointing", cost, f"cs_adam_layerwise:{options}")
    if device == "cpu":
        notes.append("offloading is no rung: on a CPU the budget is host memory itself")
        return steps, notes
    own = replace(own, precision="bf16", weight_bits=None, offloaded=True)
    cost = (
        "DeepSpeed's ZeRO-2 keeps float32 weights, gradients and state on the host and takes the steps there, in place "
        "of 24-bit weights and steps in backward; the time of the transfers and its buckets (reduce_bucket_size) are "
        "not predicted"
    )
    add("offload to host memory", cost, "cs_adam_layerwise:preset=lean", offloaded=True)
    return steps, notes

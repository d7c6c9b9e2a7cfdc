"""Predict the memory of a training step with each optimizer, and the largest batch, without a GPU and without weights.

The model runs on tensors that have shapes but no memory (`plan_trace`), once for each batch size. So everything that a
pass allocates is counted, but nothing is computed. ``docs/plan.md`` says what is counted, and how accurate it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sketch_plugins.memory.plan_checks import BudgetBelowWeights, budget_and_reserve, check_choices, check_zero
from sketch_plugins.memory.plan_model import Described
from sketch_plugins.memory.plan_optimizers import Choice, choices
from sketch_plugins.memory.plan_rows import Runs, parameter_bytes, row_of
from sketch_plugins.memory.plan_table import Plan
from sketch_plugins.memory.report import format_bytes

#: Called with the number of finished steps, the number of all steps, and the name of the current one.
Progress = Callable[[int, int, str], None]


def plan(
    model: Any,
    *,
    sample: Callable[[int], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int = 8,
    seq_len: int = 512,
    gpu_memory: int | str | None = None,
    precision: str = "bf16-mixed",
    optimizers: str | Sequence[str | Choice] = "all",
    task: str | None = None,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    zero_stage: int = 0,
    world_size: int | None = None,
    device: str = "cuda",
    reserve: int | str | None = None,
    progress: Progress = lambda done, of, what: None,
) -> Plan:
    """Memory of a training step for each optimizer, and the largest batch within a budget.

    For every optimizer, ``peak = max(forward and backward, step)`` in the steady state, where the optimizer has state:

        forward and backward = parameters + state + max over the pass (gradients so far + everything else)
        step                 = parameters + state + all gradients + temporaries of the step

    In backward (names ending in ``_layerwise``) a gradient is freed as soon as it is complete, and there is no step.

    Args:
        model: a name (``"bert-large-uncased"``), a directory with a config.json, such a file, a configuration of
            transformers; or a module, or a function that makes one, and then ``sample`` and ``loss``.
        sample: batch size -> batch.
        loss: (model, batch) -> loss.
        batch_size: samples of one pass.
        seq_len: tokens of a sample (models of transformers).
        gpu_memory: budget: ``"16GiB"``, bytes, or a fraction of the memory of this machine's GPU.
        precision: ``"fp32"``; ``"bf16"``: weights, gradients and activations are bfloat16; ``"bf16-mixed"`` and
            ``"fp16-mixed"``: float32 weights under autocast, whose casts are counted, as in Trainer with ``bf16=True``.
        optimizers: ``"all"``, or names; ``"cs_adam:preset=lean"`` has options, ``"cs_adam_layerwise"`` takes its steps
            in backward, ``"adamw"`` is torch's fused one, ``"adamw_foreach"`` its default on CUDA.
        task: ``"masked-lm"``, ``"causal-lm"``, ``"seq2seq-lm"``, ``"sequence-classification"``; None: the task of the
            configuration's architecture.
        gradient_checkpointing: as the model in transformers does it.
        accumulation: passes of a step; from the second pass on, all gradients exist from the beginning.
        zero_stage: 1, 2 or 3 of DeepSpeed's ZeRO, computed by a formula, see docs/plan.md.
        world_size: number of ranks, with ``zero_stage``.
        device: ``"cuda"``, or ``"cpu"``, whose kernels keep other things for backward.
        reserve: part of the budget that torch's allocator cannot use; None: 512 MiB on CUDA for its context.
        progress: function that is called with the number of finished steps, their total, and the name of the current
            one.

    Returns:
        A `Plan`.

    Raises:
        ValueError: an argument is not allowed; the budget is less than the parameters alone; the model cannot be run
            without numbers.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("seq_len", seq_len, 1),
        ("accumulation", accumulation, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer of at least {least}")
    check_choices(precision, gradient_checkpointing, device)
    check_zero(zero_stage, world_size)
    wanted = choices(optimizers, precision)
    if zero_stage:
        kept = [choice for choice in wanted if not choice.in_backward]
        if not kept or (len(kept) < len(wanted) and optimizers != "all"):
            raise ValueError("steps in backward (NAME_layerwise) and ZeRO cannot be combined: use one of them")
        wanted = kept
    budget, kept_back = budget_and_reserve(gpu_memory, reserve, device)
    described = Described(model, sample, loss, task, seq_len, gradient_checkpointing)
    runs = Runs(described, device == "cuda", precision, accumulation)
    most = None if budget is None else budget - kept_back
    sharding = (zero_stage, world_size or 1)
    if most is not None:
        _check_budget(runs, wanted, most, sharding, gpu_memory)
    rows = []
    for number, choice in enumerate(wanted):
        progress(number, len(wanted), choice.label)
        rows.append(row_of(choice, runs, batch_size, most, sharding))
    progress(len(wanted), len(wanted), "done")
    return Plan(
        model=described.label,
        params=sum(p.numel() for p in runs.subject(wanted[0]).model.parameters()),
        batch_size=batch_size,
        seq_len=described.seq_len,
        precision=precision,
        device=device,
        gpu_memory=budget,
        reserve=kept_back,
        zero_stage=zero_stage,
        world_size=world_size or 1,
        gradient_checkpointing=gradient_checkpointing,
        accumulation=accumulation,
        rows=rows,
    )


def _check_budget(runs: Runs, wanted: Sequence[Choice], most: int, sharding: tuple[int, int], given: Any) -> None:
    least = min(parameter_bytes(runs, choice, sharding) for choice in wanted)
    if least > most:
        raise BudgetBelowWeights(
            f"gpu_memory={given!r} leaves {format_bytes(most)}, but the parameters alone take {format_bytes(least)}",
            "use more memory, a lower precision (bf16), a smaller model, or zero_stage=3",
        )

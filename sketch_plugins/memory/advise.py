"""Advice on settings with which a model fits a budget: a ladder in the order of the rungs' cost in quality and time.

Every rung keeps the settings of the ones before it, and its bytes are those of `plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sketch_plugins.memory.advise_ladder import Step, ladder
from sketch_plugins.memory.advise_lines import Settings, lines, notes, refused
from sketch_plugins.memory.advise_table import Advice, Rung, format_count
from sketch_plugins.memory.plan import Progress, plan
from sketch_plugins.memory.plan_checks import BudgetBelowWeights, budget_and_reserve, check_choices
from sketch_plugins.memory.plan_cuda import WORKSPACE
from sketch_plugins.memory.plan_table import Plan, Row
from sketch_plugins.memory.report import format_bytes

#: Wish -> its description.
WISHES = {
    "largest-batch": "the largest batch",
    "largest-model": "the largest model",
    "least-change": "the least change that fits",
}
#: Bytes that DeepSpeed's offloading keeps in host memory for each parameter: float32 weights and float32 gradients.
HOST_BYTES = 8
#: What helps a model whose weights do not fit.
_BEYOND = (
    ". DeepSpeed's ZeRO-3, which the ladder does not have, keeps the weights in host memory "
    '("offload_param": {"device": "cpu"}), or divides them over several GPUs (see plan with zero_stage=3)'
)


def advise(
    model: Any,
    *,
    gpu_memory: int | str,
    wish: str = "least-change",
    sample: Callable[[int], Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batch_size: int = 8,
    seq_len: int = 512,
    precision: str = "bf16-mixed",
    task: str | None = None,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    device: str = "cuda",
    reserve: int | str | None = None,
    progress: Progress = lambda done, of, what: None,
) -> Advice:
    r"""The ladder for a model and a budget, and the rung that grants a wish.

    The rungs from the bottom: AdamW as it is; sketched state (`cs_adam`); lean state (``preset="lean"``); bfloat16 with
    24-bit weights; steps in backward; gradient checkpointing; float32 weights, gradients and state in host memory.

    ``"largest-batch"`` chooses the rung with the largest batch, ``"largest-model"`` the one with the most parameters at
    ``batch_size``; of equal ones the lowest. ``"least-change"`` stops at the first rung in which ``batch_size`` fits.

    The largest model has

    .. math:: P \cdot (budget - reserve - w) / (peak - w)

    parameters, where P is the model's number and w the workspace of cuBLAS (64 MiB on CUDA). This assumes that weights,
    gradients, state *and activations* grow in proportion to the parameters, as with more layers of the same kind. Wider
    layers need less memory for activations, and more of them fit.

    Args:
        model: as in `sketch_plugins.plan`.
        gpu_memory: the budget.
        wish: ``"largest-batch"``, ``"largest-model"`` or ``"least-change"``.
        sample: as in `sketch_plugins.plan`, like all others below.
        loss: with a module: the loss.
        batch_size: samples of a pass.
        seq_len: tokens of a sample.
        precision: precision of the lowest rungs.
        task: task of the model.
        gradient_checkpointing: True: checkpointing is on from the start, and has no rung.
        accumulation: passes of a step.
        device: device whose kernels are assumed.
        reserve: part of the budget that torch cannot use.
        progress: called after each part of the work.

    Raises:
        ValueError: an unknown wish; no budget, or one below the weights in the lowest precision of the ladder; see also
            `sketch_plugins.plan`.
    """
    if not isinstance(wish, str) or wish not in WISHES:
        raise ValueError(f"wish={wish!r} is not one of {', '.join(WISHES)}")
    if gpu_memory is None:
        raise ValueError("advice needs a budget: set gpu_memory, as in gpu_memory='16GiB'")
    check_choices(precision, gradient_checkpointing, device)
    budget, kept_back = budget_and_reserve(gpu_memory, reserve, device)
    assert budget is not None
    module = isinstance(model, nn.Module) or (callable(model) and not hasattr(model, "model_type"))
    start = Settings("adamw", precision, checkpointing=gradient_checkpointing, accumulation=accumulation)
    steps, remarks = ladder(replace(start, batch=batch_size), device, module)

    def planned(of: Sequence[Step], checkpointing: bool) -> Plan:
        return plan(
            model,
            sample=sample,
            loss=loss,
            batch_size=batch_size,
            seq_len=seq_len,
            precision=precision,
            optimizers=[step.choice for step in of],
            task=task,
            gradient_checkpointing=checkpointing,
            accumulation=accumulation,
            device=device,
            progress=progress,
            # For the largest model, a model that is too large has an answer as well, and no batch is searched for.
            gpu_memory=None if wish == "largest-model" else gpu_memory,
            reserve=None if wish == "largest-model" else reserve,
        )

    first = [step for step in steps if step.own.checkpointing == gradient_checkpointing]
    last = steps[len(first) :]
    try:
        found = planned(first, gradient_checkpointing)
    except BudgetBelowWeights as error:
        # The ladder has bfloat16 weights already, and is for one process.
        raise ValueError(
            f"{error.finding} in bfloat16, the lowest precision of the ladder: use a larger budget or a smaller "
            f"model{_BEYOND if device == 'cuda' else ''}"
        ) from None
    rows, limit = list(found.rows), budget - kept_back
    if last and not (wish == "least-change" and any(row.peak <= limit for row in rows)):
        try:
            rows += planned(last, True).rows
        except ValueError as error:
            if "does not support gradient checkpointing" not in str(error):
                raise
            remarks.append(f"gradient checkpointing is no rung: {error}")
            last = [step.without_checkpointing() for step in last if step.own.offloaded]
            rows += planned(last, False).rows if last else []
    lean = next(row.state for row, step in zip(rows, steps, strict=False) if step.own.lean)
    rungs = [
        _rung(step, row, limit, wish, found.params, WORKSPACE if device == "cuda" else 0, lean)
        # There are fewer rows if the first rung that fits was found.
        for step, row in zip([*first, *last], rows, strict=False)
    ]
    chosen, verdict = _choose(wish, rungs, batch_size)
    if wish == "least-change" and chosen is not None:
        rungs = rungs[: chosen + 1]
    if wish == "largest-model":
        remarks.append(
            "largest model: weights, gradients, state and activations are assumed to grow in proportion to the "
            f"parameters, as with more layers of the same kind, at batch {batch_size}"
        )
    return Advice(
        wish=wish,
        model=found.model,
        params=found.params,
        batch_size=batch_size,
        title=f"{found.title}: {WISHES[wish]}",
        budget=budget,
        reserve=kept_back,
        rungs=rungs,
        chosen=chosen,
        verdict=verdict,
        notes=remarks,
    )


def _rung(step: Step, row: Row, limit: int, wish: str, params: int, workspace: int, lean: int) -> Rung:
    own, most = step.own, None
    if wish == "largest-model":
        most = max(0, int(params * (limit - workspace) / max(1, row.peak - workspace)))
    elif wish == "largest-batch" and row.largest_batch:
        own = replace(own, batch=row.largest_batch)
    return Rung(
        name=step.name,
        cost=step.cost,
        plan=row,
        fits=row.peak <= limit,
        largest_model=most,
        host=HOST_BYTES * params + lean if own.offloaded else 0,
        lines=lines(own),
        refused=refused(own),
        notes=notes(own, params),
    )


def _choose(wish: str, rungs: Sequence[Rung], batch: int) -> tuple[int | None, str]:
    """``(index of the rung that grants the wish, the choice in words)``."""
    if wish == "least-change":
        for place, rung in enumerate(rungs):
            if rung.fits:
                said = f"stopped at rung {place}, {rung.name}: the first one in which batch {batch} fits"
                return place, f"{said} (peak {format_bytes(rung.plan.peak)})"
        least = min(range(len(rungs)), key=lambda i: rungs[i].plan.peak)
        peak, smaller = format_bytes(rungs[least].plan.peak), max(rung.plan.largest_batch or 0 for rung in rungs)
        said = f"batch {batch} fits in no rung: the least peak is {peak}, in rung {least}, {rungs[least].name}"
        return None, f"{said}. {f'A batch of {smaller} fits' if smaller else 'Not even one sample fits'}"

    def most(rung: Rung) -> int:
        return (rung.largest_model if wish == "largest-model" else rung.plan.largest_batch) or 0

    best = max(range(len(rungs)), key=lambda i: (most(rungs[i]), -i))
    if not most(rungs[best]):
        return None, "not even one sample fits in any rung"
    if wish == "largest-model":
        before = f"{format_count(most(rungs[0]))} with AdamW" if most(rungs[0]) else "nothing with AdamW"
        said = f"the largest model has about {format_count(most(rungs[best]))} parameters, in rung {best}, "
        return best, f"{said}{rungs[best].name} ({before})"
    before = f"{most(rungs[0])} with AdamW" if most(rungs[0]) else "none fits with AdamW"
    return best, f"the largest batch is {most(rungs[best])}, in rung {best}, {rungs[best].name} ({before})"

"""Predict the memory of a training step with each optimizer, and the largest batch, without a GPU and without weights.

The model runs on tensors that have shapes but no memory (`plan_trace`), once for each batch size. So everything that a
pass allocates is counted, but nothing is computed. ``docs/plan.md`` says what is counted, and how accurate it is.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sketch_plugins.memory.meter import parse_budget, total_memory
from sketch_plugins.memory.plan_cuda import WORKSPACE
from sketch_plugins.memory.plan_optimizers import Choice, Cost, choices, cost, sharded_cost
from sketch_plugins.memory.plan_trace import CUDA_BLOCK, Subject, Timeline
from sketch_plugins.memory.report import format_bytes
from sketch_plugins.memory.search import largest

#: Name -> (dtype of the weights, dtype of autocast).
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
}
#: Memory of a CUDA context, into which kernels are loaded. torch's allocator does not know about it.
RESERVE = 512 * 2**20
_MOST = 1 << 20

#: Called with the number of finished steps, the number of all steps, and the name of the current one.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Row:
    """One optimizer of a plan; all sizes in bytes.

    Attributes:
        optimizer: its name.
        parameters: the weights, both trained and frozen.
        gradients: their maximum over time.
        state: state of the optimizer.
        activations: the maximum of everything else: what backward needs, temporaries, buffers, the batch, workspace.
        peak: the maximum of the total; less than the sum, because gradients grow while activations are freed.
        at_peak: the four kinds at the time of the peak; they add up to ``peak``.
        when: the peak is in ``"forward and backward"`` or in the optimizer's ``"step"``.
        largest_batch: the largest batch whose peak is within the budget; 0: no batch fits; None: there is no budget.
        precision: precision of the weights and of autocast.
    """

    optimizer: str
    parameters: int
    gradients: int
    state: int
    activations: int
    peak: int
    at_peak: dict[str, int]
    when: str
    largest_batch: int | None
    precision: str


class BudgetBelowWeights(ValueError):
    """The budget is less than the weights alone.

    Attributes:
        finding: the figures, without advice.
    """

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}: {advice}")
        self.finding = finding


@dataclass(frozen=True)
class Plan:
    """The result of `plan`; ``print(plan)`` shows the table.

    Attributes:
        model: its name.
        params: number of its parameters (elements).
        batch_size: samples of a pass.
        seq_len: tokens of a sample; None if the caller makes the batches.
        precision: see `plan`.
        device: ``"cuda"`` or ``"cpu"``.
        gpu_memory: the budget in bytes; None: no budget was given.
        reserve: the part of it that torch's allocator cannot use.
        zero_stage: stage of DeepSpeed's ZeRO; 0: no ZeRO.
        world_size: its ranks; all figures are for one of them.
        gradient_checkpointing: whether backward recomputes activations.
        accumulation: passes of a step.
        rows: one for each optimizer.
    """

    model: str
    params: int
    batch_size: int
    seq_len: int | None
    precision: str
    device: str
    gpu_memory: int | None
    reserve: int
    zero_stage: int
    world_size: int
    gradient_checkpointing: bool
    accumulation: int
    rows: list[Row] = field(repr=False)

    def __getitem__(self, optimizer: str) -> Row:
        """The row of an optimizer."""
        for row in self.rows:
            if row.optimizer == optimizer:
                return row
        raise KeyError(f"{optimizer!r} is not in the plan; it has {', '.join(row.optimizer for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        """A line that says what is planned."""
        length = "" if self.seq_len is None else f", sequences of {self.seq_len}"
        return f"{self.model}, {self.params:,} parameters, batch {self.batch_size}{length}, {self.precision}"

    @property
    def notes(self) -> str:
        """A line with the other circumstances."""
        parts = [f"on {'CUDA' if self.device == 'cuda' else 'a CPU'}"]
        if self.gpu_memory is not None:
            parts.append(f"budget {format_bytes(self.gpu_memory)}")
            if self.reserve:
                parts.append(f"of which {format_bytes(self.reserve)} are left to the CUDA context")
        if self.gradient_checkpointing:
            parts.append("gradient checkpointing")
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} passes a step")
        if self.zero_stage:
            parts.append(f"ZeRO-{self.zero_stage} over {self.world_size} ranks, by formula")
        return ", ".join(parts)

    def table(self) -> Table:
        """A rich table with a row for each optimizer."""
        table = Table(title=self.title, caption=self.notes)
        table.add_column("optimizer", overflow="fold")
        for heading in ("parameters", "gradients", "state", "activations", "peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("peak in")
        if self.gpu_memory is not None:
            table.add_column("largest batch", justify="right")
        for row in self.rows:
            cells = [row.parameters, row.gradients, row.state, row.activations, row.peak]
            batch = [] if self.gpu_memory is None else [str(row.largest_batch) if row.largest_batch else "none"]
            fits = self.gpu_memory is None or row.peak <= self.gpu_memory - self.reserve
            when = "backward" if row.when != "step" else "step"
            table.add_row(row.optimizer, *map(format_bytes, cells), when, *batch, style=None if fits else "dim")
        return table

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        Console(width=120, file=text, markup=False, emoji=False, force_jupyter=False).print(self.table())
        return text.getvalue()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a bar for each optimizer with the memory at its peak, and the budget as a line.

        Args:
            path: file to write; its suffix selects the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ValueError: another suffix, or matplotlib is not installed.
        """
        check_plot(path)
        figures = importlib.import_module("matplotlib.figure")
        figure = figures.Figure(figsize=(9, 1.6 + 0.36 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        names = [row.optimizer for row in self.rows]
        left = [0.0] * len(names)
        colours = {"parameters": "#4c72b0", "gradients": "#dd8452", "state": "#c44e52", "activations": "#bbbbbb"}
        for kind, colour in colours.items():
            sizes = [row.at_peak[kind] / 1e9 for row in self.rows]
            axes.barh(names, sizes, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        if self.gpu_memory is not None:
            axes.axvline((self.gpu_memory - self.reserve) / 1e9, color="black", linestyle="--", label="budget")
            for place, row in enumerate(self.rows):
                note = f" batch ≤ {row.largest_batch}" if row.largest_batch else " no batch fits"
                axes.text(left[place], place, note, va="center", fontsize=8)
            axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel("GB at the peak")
        axes.set_title(self.title, fontsize=10)
        figure.legend(loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=150)


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
    _check_zero(zero_stage, world_size)
    wanted = choices(optimizers, precision)
    if zero_stage:
        kept = [choice for choice in wanted if not choice.in_backward]
        if not kept or (len(kept) < len(wanted) and optimizers != "all"):
            raise ValueError("steps in backward (NAME_layerwise) and ZeRO cannot be combined: use one of them")
        wanted = kept
    budget, kept_back = budget_and_reserve(gpu_memory, reserve, device)
    described = _Described(model, sample, loss, task, seq_len, gradient_checkpointing)
    runs = _Runs(described, device == "cuda", precision, accumulation)
    most = None if budget is None else budget - kept_back
    sharding = (zero_stage, world_size or 1)
    if most is not None:
        _check_budget(runs, wanted, most, sharding, gpu_memory)
    rows = []
    for number, choice in enumerate(wanted):
        progress(number, len(wanted), choice.label)
        rows.append(_row(choice, runs, batch_size, most, sharding))
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


def check_choices(precision: Any, gradient_checkpointing: Any, device: Any) -> None:
    """Check arguments that `plan` and `sketch_plugins.advise` share.

    Raises:
        ValueError: one of them is not allowed.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if not isinstance(gradient_checkpointing, bool):
        raise ValueError(f"gradient_checkpointing={gradient_checkpointing!r} is not allowed: it must be True or False")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not one of cuda, cpu")


def budget_and_reserve(gpu_memory: Any, reserve: Any, device: str) -> tuple[int | None, int]:
    """Both in bytes, as `plan` takes them; ``(None, 0)`` without a budget.

    Raises:
        ValueError: one of them is not allowed, or there is no budget to subtract ``reserve`` from, or none is left.
    """
    if gpu_memory is None:
        if reserve is not None:
            raise ValueError(
                f"reserve={reserve!r} is subtracted from a budget, and there is none: set gpu_memory, too, as in "
                "gpu_memory='16GiB'"
            )
        return None, 0
    budget = _budget(gpu_memory, device, "gpu_memory")
    kept_back = _budget((RESERVE if device == "cuda" else 0) if reserve is None else reserve, device, "reserve")
    if kept_back >= budget:
        raise ValueError(
            f"gpu_memory={gpu_memory!r} is not larger than the {format_bytes(kept_back)} of reserve, which "
            "torch cannot use: use more memory or a smaller reserve"
        )
    return budget, kept_back


def check_plot(path: str | os.PathLike[str]) -> None:
    """Check that `Plan.plot` can write to a path.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{os.fspath(path)!r} cannot be the file of a plot: its name must end in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{os.fspath(path)!r} cannot be written: No such file or directory: {Path(path).parent}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ValueError(f"a plot needs matplotlib ({error}): pip install matplotlib") from error


class _Described:
    """The model, given by name, configuration, module or function."""

    def __init__(
        self,
        model: Any,
        sample: Callable[[int], Any] | None,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        task: str | None,
        seq_len: int,
        gradient_checkpointing: bool,
    ) -> None:
        self.seq_len: int | None = None
        if isinstance(model, nn.Module) or (callable(model) and not hasattr(model, "model_type")):
            if sample is None or loss is None:
                raise ValueError(
                    "a module needs two functions: sample=(batch size -> batch) and loss=((model, batch) -> loss)"
                )
            if gradient_checkpointing or task is not None:
                raise ValueError(
                    "gradient_checkpointing and task are only for models of transformers: set them in the module itself"
                )
            self.build: Callable[[], nn.Module] = (lambda: _on_meta(model)) if isinstance(model, nn.Module) else model
            self.sample, self.loss = sample, loss
            self.label = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")
            return
        if sample is not None or loss is not None:
            raise ValueError("sample and loss are only for modules of your own: models of transformers have theirs")
        try:
            planning = importlib.import_module("sketch_transformers.planning")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "transformers":
                raise
            raise ValueError(
                "models by name or configuration need transformers: pip install 'sketch-plugins[transformers]'"
            ) from error
        found: Any = planning.HuggingFaceModel(model, task, seq_len, gradient_checkpointing)
        self.build, self.sample, self.loss, self.label = found.build, found.sample, found.loss, found.label
        self.seq_len = seq_len


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = torch.empty_like(tensor, device="meta", requires_grad=False)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy.deepcopy(model, memo)


class _Runs:
    """The passes that have run so far, by dtype of the weights, kind and batch."""

    def __init__(self, model: _Described, cuda: bool, precision: str, accumulation: int) -> None:
        self.model, self.cuda, self.precision, self.accumulation = model, cuda, precision, accumulation
        self._subjects: dict[torch.dtype, Subject] = {}
        self._seen: dict[Any, Timeline] = {}

    def dtypes(self, choice: Choice) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtypes of the weights and of autocast."""
        return PRECISIONS["bf16" if choice.pure_bf16 else self.precision]

    def subject(self, choice: Choice) -> Subject:
        """The model in the dtype of the choice."""
        dtype, _ = self.dtypes(choice)
        if dtype not in self._subjects:
            self._subjects[dtype] = Subject(self.model.build, dtype)
        return self._subjects[dtype]

    def timeline(self, choice: Choice, in_backward: bool, batch: int) -> Timeline:
        """The timeline of one pass, which runs once."""
        dtype, autocast = self.dtypes(choice)
        key = dtype, autocast, in_backward, batch
        if key not in self._seen:

            def loss(model: nn.Module, given: Any) -> Tensor:
                if autocast is None:
                    return self.model.loss(model, given)
                with torch.autocast("cpu", dtype=autocast):
                    return self.model.loss(model, given)

            self._seen[key] = self.subject(choice).trace(
                lambda: self.model.sample(batch),
                loss,
                cuda=self.cuda,
                in_backward=in_backward,
                accumulation=self.accumulation,
            )
        return self._seen[key]

    def expected(self, choice: Choice, in_backward: bool, near: int) -> Callable[[int], Timeline | None]:
        """Timelines of other batches, computed from two batches that run."""
        # A batch of one is special: some operators return a view there that would be a copy for larger batches.
        first = max(near, 2)
        pair = first, 2 * first
        one, two = (self.timeline(choice, in_backward, batch) for batch in pair)
        return lambda batch: one.between(two, pair, batch)


@dataclass(frozen=True)
class _Peak:
    gradients: int
    activations: int
    total: int
    at_peak: dict[str, int]
    when: str


def _row(choice: Choice, runs: _Runs, batch: int, most: int | None, sharding: tuple[int, int]) -> Row:
    stage, world = sharding
    subject = runs.subject(choice)
    spent = sharded_cost(choice, subject, runs.cuda, stage, world) if stage else cost(choice, subject, runs.cuda)
    in_backward = choice.in_backward or stage >= 2
    parameters = _parameters(runs, choice, sharding)

    def of(timeline: Timeline) -> _Peak:
        return _peak(timeline, runs, choice, spent, sharding)

    peak = of(runs.timeline(choice, in_backward, batch))
    found = None
    if most is not None:
        limit = most

        def fits(size: int) -> bool:
            return of(runs.timeline(choice, in_backward, size)).total <= limit

        found = _largest(fits, runs.expected(choice, in_backward, batch), lambda t: of(t).total <= limit, batch)
    return Row(
        optimizer=choice.label,
        parameters=parameters,
        gradients=peak.gradients,
        state=spent.state,
        activations=peak.activations,
        peak=peak.total,
        at_peak=peak.at_peak,
        when=peak.when,
        largest_batch=found,
        precision="bf16" if choice.pure_bf16 else runs.precision,
    )


def _largest(
    fits: Callable[[int], bool],
    expected: Callable[[int], Timeline | None],
    would: Callable[[Timeline], bool],
    batch: int,
) -> int:
    """Search with timelines computed from two runs, and confirm the result by runs of this batch and the next one."""
    if expected(batch) is None:
        return largest(fits, batch, _MOST, max_trials=60)

    def might(size: int) -> bool:
        timeline = expected(size)
        return timeline is not None and would(timeline)

    found = largest(might, batch, _MOST, max_trials=60)
    if (found == 0 or fits(found)) and (found == _MOST or not fits(found + 1)):
        return found
    return largest(fits, max(found, 1), _MOST, max_trials=60)


def _parameters(runs: _Runs, choice: Choice, sharding: tuple[int, int]) -> int:
    block = CUDA_BLOCK if runs.cuda else 1
    whole = sum(-(-p.nbytes // block) * block for p in runs.subject(choice).model.parameters())
    return -(-whole // sharding[1]) if sharding[0] == 3 else whole


def _peak(timeline: Timeline, runs: _Runs, choice: Choice, spent: Cost, sharding: tuple[int, int]) -> _Peak:
    stage, world = sharding
    block = CUDA_BLOCK if runs.cuda else 1
    subject = runs.subject(choice)
    gradients = [-(-p.nbytes // block) * block for p in subject.parameters]
    parameters = _parameters(runs, choice, sharding)
    # ZeRO-3 gathers the next parameter while it works on one, so the largest parameter counts twice.
    gathered = 2 * max(gradients, default=0) if stage == 3 else 0
    share = -(-sum(gradients) // world) if stage >= 2 else 0
    workspace = WORKSPACE if runs.cuda else 0
    ratio = spent.step / max(gradients, default=1) if choice.in_backward else 0.0
    moment = timeline.peak(ratio)
    weights = timeline.base - timeline.other
    passing = {
        "parameters": parameters,
        "gradients": moment.gradients + share,
        "state": spent.state,
        "activations": moment.total - weights - moment.gradients + gathered + workspace,
    }
    left = 0 if choice.in_backward else share or sum(gradients)
    in_pass = sum(passing.values())
    step = {
        "parameters": parameters,
        "gradients": left,
        "state": spent.state,
        "activations": timeline.other + workspace,
    }
    if not choice.in_backward and sum(step.values()) + spent.bound > in_pass:
        step["activations"] += spent.step
    in_step = sum(step.values())
    return _Peak(
        gradients=max(moment.most_gradients + share, left),
        activations=max(moment.most_others + gathered + workspace, step["activations"]),
        total=max(in_pass, in_step),
        at_peak=passing if in_pass >= in_step else step,
        when="forward and backward" if in_pass >= in_step else "step",
    )


def _check_zero(stage: int, world_size: int | None) -> None:
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_stage={stage!r} is not one of 0, 1, 2, 3")
    if stage and world_size is None:
        raise ValueError(f"zero_stage={stage} needs world_size, the number of processes")
    if world_size is not None and (isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1):
        raise ValueError(f"world_size={world_size!r} is not allowed: world_size must be an integer of at least 1")
    if not stage and world_size not in (None, 1):
        raise ValueError(
            f"world_size={world_size} has no effect without zero_stage, because nothing is shared between the "
            "processes: set zero_stage=1, 2 or 3"
        )


def _budget(given: Any, device: str, name: str) -> int:
    if name == "reserve" and re.fullmatch(r"0+(\.0*)?\s*([KMGT]?i?B)?", str(given).strip()):
        return 0
    total = 0
    if device == "cpu" or torch.cuda.is_available():
        total = total_memory(torch.device(device))
    size = parse_budget(given, total, name)
    if size <= 0:
        raise ValueError(
            f"{name}={given!r} is a fraction of a GPU's memory, and there is no GPU here: give a size, as in 16GiB"
        )
    return size


def _check_budget(runs: _Runs, wanted: Sequence[Choice], most: int, sharding: tuple[int, int], given: Any) -> None:
    least = min(_parameters(runs, choice, sharding) for choice in wanted)
    if least > most:
        raise BudgetBelowWeights(
            f"gpu_memory={given!r} leaves {format_bytes(most)}, but the parameters alone take {format_bytes(least)}",
            "use more memory, a lower precision (bf16), a smaller model, or zero_stage=3",
        )

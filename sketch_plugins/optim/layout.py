"""What a parameter's state consists of: the stores of its moments, and their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import HALF
from sketch_plugins.notices import warn
from sketch_plugins.optim.groups import Groups
from sketch_plugins.optim.rule import Further, LastRms
from sketch_plugins.optim.weight_bits import WeightCorrection, Written, computes_its_numbers, corrects
from sketch_plugins.sharding.blocks import is_batch, is_vocabulary, matrix_shape
from sketch_plugins.sharding.parts import Part, Shaped, whole_shape
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.sharding.state_names import CORRECTION, PLACE, is_ours
from sketch_plugins.stores import Store
from sketch_plugins.stores.kinds import SHAPED, StoreOptions, store_of
from sketch_plugins.stores.sketch import Sketch

# Matrices with fewer columns have no `row_scales`, which take 4 / D bytes a parameter.
SCALED = 128


class StateLayout(Groups):
    """Which stores, and which other state, the options of a group give a parameter or a part of one."""

    # What is remembered of weights with corrections. It is neither copied nor pickled.
    _written: Written | None = None
    # Whether the warning about parameters without effect of `weight_bits` has had its chance.
    _bits_are_known = False
    # Identities of parts whose state no step has changed yet, if the step counter is on a device (`capturable`) and the
    # next step depends on it (`lagged_rms`).
    _unmeasured: frozenset[Any] = frozenset()

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        """The learning rate that a group usually takes if steps are not relative to the weights, see `usual_rates`.

        None means that there is no usual rate.
        """
        return None

    def _further(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        """State beside the two moments. Parameters with such state take their step in `_eager`, not in a kernel."""
        return {}

    def _beside(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        """All state beside the two moments: `_further`, and the state that kernels also keep."""
        rms = {"rms": LastRms(self._matrices(p, group))} if group.get("lagged_rms") else {}
        out = {**self._further(p, group), **rms}
        if corrects(p, group):
            out[CORRECTION] = WeightCorrection(self._matrix_shape(p, group), group["weight_bits"])
        return out

    def _stores(self, p: Shaped, group: Mapping[str, Any]) -> tuple[Store | None, Store | None]:
        """The (first, second) moment stores of a parameter, or of a part of one."""
        exact, batch = is_exact(p, group), self._batch(p, group)
        matrix = matrix_shape(p.shape, batch)
        first, second = group.get("first_moment", "none"), group.get("second_moment", "none")
        if exact:
            first, second = ("fp32" if first != "none" else first), ("dense" if second != "none" else second)
        # With one column, the code and the scale of a block of one element would take more than the number itself.
        elif first == "int8" and matrix[1] == 1:
            first = "fp32"
        # Optimizers without sketches lack these options.
        options = StoreOptions(
            compression=group.get("compression", 1.0),
            width=group.get("width", 0),
            depth=group.get("depth", 1),
            hash=group.get("hash", "strided"),
            bucket=group.get("bucket", "mean"),
            bf16=group.get("table_dtype", "fp32") == "bf16",
            matrices=max(1, math.prod(p.shape[:batch])),  # a shard may contain none of the matrices
            seed=group["seed"],
            block_size=group.get("block_size", 128),
            stochastic=group.get("first_moment_rounding", "nearest") == "stochastic",
            variant=group.get("variant", "II"),
            scaled=self._scales_rows(group) and matrix[1] >= SCALED and not is_vocabulary(whole_shape(p)),
        )
        shaped = options
        if second in SHAPED:
            count = options.matrices if batch else None
            shaped = options._replace(dims=matrix if batch else tuple(p.shape), batch=count)
        return store_of(1, first, options), store_of(2, second, shaped)

    def _scales_rows(self, group: Mapping[str, Any]) -> bool:
        """Whether a group has ``row_scales``. Other code's optimizers may have an entry of that name without it."""
        return "row_scales" in self.OPTIONS and bool(group["row_scales"])

    def batch_axes(self, whole: tuple[int, ...], group: Mapping[str, Any]) -> int:
        """How many of the first axes of a parameter of this shape are a batch of matrices: see ``batch_dims``.

        ``whole`` is the shape of the whole parameter, so that shards and pieces agree. Only sketches, covers and
        covariances depend on the result; without them the rows of a parameter are dimension 0.
        """
        axes = self.measured_axes(whole, group)
        return axes if axes and self._has_matrices(whole, group) else 0

    def measured_axes(self, whole: tuple[int, ...], group: Mapping[str, Any]) -> int:
        """`batch_axes`, however the moments are kept: `update_clip` and `scale_parameter` measure each matrix."""
        option = group.get("batch_dims", 0)
        if option == 0 or len(whole) < 3:
            return 0
        return int(option == 1 or is_batch(whole))

    def _has_matrices(self, whole: tuple[int, ...], group: Mapping[str, Any]) -> bool:
        """Whether rows of a parameter share state: cells of a sketch, or covers."""
        if math.prod(whole) < group["min_compress_size"]:
            return False
        second = group.get("second_moment")
        return second in ("count_min", "row_count_min", "cover") or group.get("first_moment") == "count_sketch"

    def _batch(self, p: Shaped, group: Mapping[str, Any]) -> int:
        """`batch_axes` for a parameter, or for a part of one. A piece of one matrix of a batch is no batch."""
        whole = whole_shape(p)
        return self.batch_axes(whole, group) if len(p.shape) == len(whole) else 0

    def _matrices(self, p: Shaped, group: Mapping[str, Any]) -> int | None:
        """The number of matrices that are measured one by one; None if the parameter, or part, is no batch."""
        whole = whole_shape(p)
        axes = self.measured_axes(whole, group) if len(p.shape) == len(whole) else 0
        return math.prod(p.shape[:axes]) if axes else None

    def _rate_factor(self, p: Shaped, group: Mapping[str, Any]) -> float:
        """The factor of a part's learning rate: ``embedding_rate`` if it belongs to an embedding or output layer.

        The shape of the whole parameter decides, so that all ranks agree.
        """
        factor, whole = group.get("embedding_rate", 1.0), whole_shape(p)
        if factor == 1.0 or group.get("second_moment") != "count_min" or is_exact(p, group):
            return 1.0
        if not is_vocabulary(whole):
            return 1.0
        second = self._stores(p, group)[1]
        return float(factor) if isinstance(second, Sketch) and second.buckets(whole[0]) < whole[0] else 1.0

    def _matrix_shape(self, p: Shaped, group: Mapping[str, Any]) -> tuple[int, int]:
        return matrix_shape(p.shape, self._batch(p, group))

    def planned_state(self, p: Shaped, group: Mapping[str, Any]) -> dict[str, tuple[Store | Further, int]]:
        """The store and the bytes of each kind of state of a parameter (or part), whether or not it exists yet."""
        first, second = self._stores(p, group)
        shape, dtype = self._matrix_shape(p, group), arithmetic(p)
        named = {"first_moment": first, "second_moment": second}
        return {
            **{name: (store, store.nbytes(shape, dtype)) for name, store in named.items() if store is not None},
            **{name: (part, part.nbytes(dtype)) for name, part in self._beside(p, group).items()},
        }

    def _expected(self, part: Part, group: Mapping[str, Any]) -> set[str]:
        """The kinds of state that a part has, by name."""
        names = zip(("first_moment", "second_moment"), self._stores(part, group), strict=True)
        out = {"step", *(name for name, store in names if store is not None), *self._beside(part, group)}
        return out if part.piece is None else out | {PLACE}

    def _layout(self, p: Shaped, group: Mapping[str, Any], part: Part) -> dict[str, Any]:
        """The layout of each kind of state of a tensor with the shape of ``p``, as a shard of the part's parameter."""
        if not isinstance(p, Part):
            p = Part(p, p, part.index, part.whole, part.piece)
        dtype = arithmetic(p)
        stores = dict(zip(("first_moment", "second_moment"), self._stores(p, group), strict=True))
        layout: dict[str, Any] = {
            name: store.layout(self._matrix_shape(p, group), dtype)
            for name, store in stores.items()
            if store is not None
        }
        layout |= {name: further.layout(dtype) for name, further in self._beside(p, group).items()}
        if part.piece is not None:
            layout[PLACE] = ((2 + len(part.whole),), torch.int64)
        return layout

    def _state_of(self, part: Part) -> dict[str, Any] | None:
        """The state of a part, `nested`, or None if it has no entries of ours.

        The mapping is made again in each call. Its tensors are those of the state.
        """
        whole = self.state.get(part.owner)
        state = self._parts.state_of(part, whole) if whole else {}
        return state if "step" in state or any(map(is_ours, state)) else None

    @contextmanager
    def _weights_kept(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Around a step: set void corrections to 0 before it, and remember what it wrote after it.

        If the step fails, weights that other code has written stay without corrections, which are void then, too.
        """
        groups = [group for group in groups if group.get("weight_bits")]
        if not groups:
            yield
            return
        if not self._bits_are_known:
            self._look_for_bits()
        written = self._written = self._written or Written()
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        written.check(self._parts_with_state(groups), self._label_of, stepping=True, capturing=capturing)
        try:
            yield
        finally:
            written.note(self._parts_with_state(groups))

    def _look_for_bits(self) -> None:
        """Warn once about parameters on which ``weight_bits`` has no effect."""
        # This looks at all groups, whichever parameter takes its step first.
        groups = [group for group in self.param_groups if group.get("weight_bits")]
        given = [(p, group) for group in groups for p in group["params"]]
        if not given:
            return
        self._bits_are_known = True
        if not any(corrects(p, group) for p, group in given):
            found = sorted({f"{p.dtype}{_kind_of(p)}" for p, _ in given})
            warn(
                f"weight_bits={groups[0]['weight_bits']} has no effect: it is for bfloat16 and float16 parameters, and "
                f"those of {type(self).__name__} are {', '.join(found)}. Cast the model (sketch_plugins.cast_model), "
                "or load it in bfloat16; a framework may also keep float32 weights of its own (DeepSpeed, FSDP2's "
                "mixed precision), and weights that are quantized have no further bits"
            )
            return
        computed = [
            self._label(group, index).rstrip(",")
            for group in groups
            for index, p in enumerate(group["params"])
            if p.dtype in HALF and computes_its_numbers(p)
        ]
        if computed:
            more = f" and {len(computed) - 3} more" if len(computed) > 3 else ""
            warn(
                f"weight_bits={groups[0]['weight_bits']} has no effect on {'; '.join(computed[:3])}{more}: these are "
                "quantized weights or other subclasses of Tensor that compute their numbers, and further bits would "
                "belong to other numbers than theirs"
            )

    def _mark_weights(self) -> None:
        """Set the marks before a state dict is made. They tell later whether its weights are loaded with it."""
        groups = [group for group in self.param_groups if group.get("weight_bits")]
        if groups:
            self._check_weights().mark(self._parts_with_state(groups))

    def _check_weights(self, among: Sequence[Mapping[str, Any]] | None = None) -> Written:
        """Set void corrections to 0, for the weights in these groups or for all."""
        self._written = self._written or Written()
        groups = [group for group in (self.param_groups if among is None else among) if group.get("weight_bits")]
        self._written.check(self._parts_with_state(groups), self._label_of)
        return self._written

    def _label_of(self, part: Part) -> str:
        """The `_label` of a part in any group."""
        for group in self.param_groups:
            for index, owner in enumerate(group["params"]):
                if owner is part.owner:  # a step in backward has a group of one parameter, so its index differs
                    return self._label(group, replace(part, index=index))
        return f"a parameter of shape {part.whole}"

    def _parts_with_state(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Part, Mapping[str, Any] | None]]:
        for group in groups:
            for index, owner in enumerate(group["params"]):
                state = self.state.get(owner)
                if state:
                    yield from ((part, state) for part in self._parts.of(index, owner))

    def _find_unmeasured(self) -> None:
        """Find the parts of `_unmeasured`. State was just made or loaded; a step must not wait for the device."""
        groups = [group for group in self.param_groups if group.get("capturable") and group.get("lagged_rms")]
        states = [(part, self._state_of(part)) for part, _ in self._parts_with_state(groups)]
        self._unmeasured = frozenset(part.identity for part, state in states if state and not float(state["step"]))

    def held(self) -> Iterator[tuple[int, dict[str, Any], Part, dict[str, Any] | None]]:
        """``(number of the group, group, part, state)`` of everything that takes a step of its own on this rank.

        A parameter is one part, and so is the local shard of a DTensor. A flat partition (DeepSpeed's ZeRO) has a few
        parts for each of its parameters. The state is None before the first step.
        """
        seen = set()
        for number, group in enumerate(self.param_groups):
            for index, owner in enumerate(group["params"]):
                seen.add(id(owner))
                if is_lazy(owner):
                    raise ValueError(
                        f"{self._label(group, index)} has no shape yet, because its lazy module has not seen an input: "
                        "run a batch first"
                    )
                for part in self._parts.of(index, owner):
                    yield number, group, part, self._state_of(part)
        # Between steps ZeRO-3 leaves groups empty. For a step it puts in one flat partition after the other.
        for owner in [p for p in self.state if isinstance(p, Tensor) and id(p) not in seen]:
            for part in self._parts.of(0, owner):
                if part.piece is not None and part.key is not None:
                    number = min(self._parts.group_of(part.piece), len(self.param_groups) - 1)
                    yield number, self.param_groups[number], part, self._state_of(part)


def arithmetic(p: Shaped) -> torch.dtype:
    """The dtype of the arithmetic of a parameter's step: float64 for float64, else float32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def is_exact(p: Shaped, group: Mapping[str, Any]) -> bool:
    """Whether a parameter, or a part of one, is a vector or too small to be compressed."""
    whole = whole_shape(p)  # the parts' own shapes would be too small on most ranks
    return len(whole) < 2 or math.prod(whole) < group["min_compress_size"]


def _kind_of(p: Tensor) -> str:
    return f" ({type(p).__name__})" if computes_its_numbers(p) else ""

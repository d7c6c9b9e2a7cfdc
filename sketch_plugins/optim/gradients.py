"""Checks gradients before anything changes. Errors about a gradient name its parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.optim.fused import backend as fused_backend
from sketch_plugins.optim.fused import describe
from sketch_plugins.optim.groups import refuse_fsdp1
from sketch_plugins.optim.layout import arithmetic, is_exact
from sketch_plugins.optim.rule import Rule
from sketch_plugins.optim.state_dicts import StateDicts
from sketch_plugins.sharding.blocks import Matrix, Rows, matrix_shape
from sketch_plugins.sharding.parts import Part, Shaped
from sketch_plugins.sharding.tensors import check_writable, is_fake, is_freed
from sketch_plugins.stores import CountSketch, Gradient

# Elements of a tile: enough to hide the calls, and few enough for a CPU's cache (measured, docs/architecture.md).
CPU_CHUNK, COMPILED_CHUNK, ACCELERATOR_CHUNK = 1 << 20, 1 << 22, 1 << 24

# With "auto" a step is row-sparse if at most this fraction of the rows has a gradient.
AUTO_DENSITY = 0.5


class Gradients(StateDicts):
    """Turns the gradient of a part into the `Gradient` that stores and kernels read."""

    # Whether fake tensors are allowed, because `sketch_plugins.plan` answers for their numbers in its own steps.
    _numbers_are_answered = False

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        """The rule of a step. With ``capturable``, ``step`` is a tensor with the step numbers of several parameters."""
        raise NotImplementedError

    def _row_sparse(self, p: Shaped, group: Mapping[str, Any]) -> Any:
        """The option ``row_sparse`` as it applies to this parameter: False, True or ``"auto"``."""
        return group["row_sparse"]

    def _gradient(self, p: Part, g: Tensor | None, group: Mapping[str, Any]) -> Gradient:
        assert g is not None
        label = self._label(group, p)
        if is_freed(p.data) or is_freed(g):
            which = "the parameter" if is_freed(p.data) else "its gradient"
            raise ValueError(
                f"{label}: the memory of {which} has been freed (its storage has 0 bytes), as FSDP does between "
                "two uses of a parameter. Take the step while the parameter is materialized"
            )
        if not g.is_floating_point():
            kind = "complex" if g.is_complex() else "not of floating point numbers"
            raise ValueError(f"{label} has a gradient that is {kind} ({g.dtype}); it must have a floating point dtype")
        check_writable(p.data, label)
        refuse_fsdp1(p.owner, lambda: label, type(self).__name__)  # the model may be wrapped after the optimizer
        if not self._numbers_are_answered:
            _refuse_fake(p.data, g, label)
        rows, packed, values, batch = None, False, g, self._batch(p, group)
        if g.layout == torch.sparse_coo:
            if g.sparse_dim() != 1 or p.ndim < 1:
                raise ValueError(
                    f"{label} has a sparse gradient with {g.sparse_dim()} sparse dimensions; only row-sparse "
                    "gradients (1 sparse dimension, as from nn.Embedding(sparse=True)) are supported"
                )
            g = g.coalesce()
            rows, packed, values = g.indices()[0], True, g.values()
            if batch:  # all rows of a touched matrix are touched
                height = math.prod(p.shape[1 : batch + 1])
                rows = (rows.unsqueeze(-1) * height + torch.arange(height, device=rows.device)).flatten()
        elif g.layout != torch.strided:
            raise ValueError(f"{label} has a gradient of layout {g.layout}; allowed are strided and sparse_coo")
        shape, dtype = matrix_shape(p.shape, batch), arithmetic(p)
        state = self._state_of(p)
        if state:
            self._check_state(p, group, state, label, "present")
        chunk = group["chunk_size"] or (CPU_CHUNK if p.device.type == "cpu" else ACCELERATOR_CHUNK)
        l2 = (Matrix(p.data, batch), group["weight_decay"]) if self._couples(group) else None
        # The time of vectors and small tensors is that of calls, which compilation would make slower. Ragged blocks do
        # not fuse well.
        ragged = shape[1] > group.get("block_size", 1) and shape[1] % group.get("block_size", 1) != 0
        compile = group["compile"] and g.layout == torch.strided and not is_exact(p, group) and not ragged
        if compile and not group["chunk_size"]:
            chunk = COMPILED_CHUNK
        matrices = math.prod(p.shape[:batch])
        grad = Gradient(
            Matrix(values, batch), rows, dtype, chunk, shape, packed, group["maximize"], l2, compile, matrices,
            self._matrices(p, group) or 1,
        )  # fmt: skip
        row_sparse = False if rows is not None or p.ndim < 2 else self._row_sparse(p, group)
        if row_sparse is not False:
            touched = _touched_rows(grad)
            if row_sparse is True or len(touched) <= AUTO_DENSITY * shape[0]:
                grad.rows, grad.compile = touched, False
        first = self._stores(p, group)[0]
        if group["fused"] and not group["compile"]:
            fused_backend(p.device, True)  # a loaded group, or a moved model, may have no kernels here
        if isinstance(first, CountSketch) and grad.rows is None and not group["allow_dense_count_sketch"]:
            raise ValueError(
                f"{label} has a dense gradient, and first_moment='count_sketch' does not train with dense "
                "gradients: rows that share a bucket disturb each other as much as they contribute (measured: "
                "divergence at depth 1, a much higher loss at depth 3). Use first_moment='int8', 'bf16', 'fp32' "
                "or 'none' for this parameter, or row-sparse gradients (nn.Embedding(sparse=True), "
                "row_sparse='auto'). allow_dense_count_sketch=True overrides this check"
            )
        if group["capturable"]:
            self._check_capturable(p, group, grad, label)
        return grad

    def _couples(self, group: Mapping[str, Any]) -> bool:
        return group.get("decoupled_weight_decay", True) is False and group["weight_decay"] != 0

    def _check_capture(self) -> None:
        """Raise ValueError if a CUDA graph is being captured, unless every group is ``capturable``."""
        for number, group in enumerate(self.param_groups):
            if not group["capturable"]:
                raise ValueError(
                    f"step() of {type(self).__name__} is being captured in a CUDA graph, but group {number} has "
                    "capturable=False: replays would repeat the learning rate and bias correction of this step. "
                    "Build the optimizer with capturable=True, or take the step outside of the capture"
                )

    def _check_capturable(self, p: Part, group: Mapping[str, Any], grad: Gradient, label: str) -> None:
        if grad.rows is not None:
            raise ValueError(
                f"{label} has a row-sparse gradient, which cannot be captured in a CUDA graph because its rows "
                "differ from step to step"
            )
        first = not self._state_of(p) or p.identity in self._unmeasured
        if group.get("lagged_rms") and first and is_capturing(p.device):
            raise ValueError(
                f"{label} has taken no step yet. Its first step with lagged_rms=True differs from later ones (it "
                "measures before it steps), so a CUDA graph of it cannot be replayed. Take one step, or load the "
                "state of one, before the capture"
            )
        stores = self._stores(p, group)
        named: dict[str, Any] = {
            n: {} for n, s in zip(("first_moment", "second_moment"), stores, strict=True) if s is not None
        }
        task = describe(p.data, group, grad, self._rule(group, 1, False), stores, self._state_of(p) or named)
        backend = fused_backend(p.device, group["fused"])
        why = backend.unsupported(task) if backend and task else "no kernel supports its layout or dtype"
        if why is not None:
            raise ValueError(f"{label} cannot be captured in a CUDA graph: {why}")


def _refuse_fake(p: Tensor, g: Tensor, label: str) -> None:
    if is_fake(p) or is_fake(g):
        raise ValueError(
            f"{label} or its gradient is a fake tensor (FakeTensorMode) without values, and a step needs "
            "values. To find out how much memory a step takes, use sketch_plugins.plan (sketch-plugins plan)"
        )


def _touched_rows(grad: Gradient) -> Tensor:
    """The rows with an element that is not 0 (NaN is not 0), ascending."""
    touched = torch.zeros(grad.shape[0], 1, dtype=torch.bool, device=grad.device)
    l2, grad.l2 = grad.l2, None
    for at in grad.batches():
        assert not isinstance(at, Rows)
        at.get(touched, 0, 1).logical_or_((grad.get(at) != 0).any(-1, keepdim=True))
    grad.l2 = l2
    return touched.squeeze(-1).nonzero().squeeze(-1)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

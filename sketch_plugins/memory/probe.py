"""The error of a sketched second moment, measured on a few rows during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sketch_plugins.hashing import row_hashes
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.sharding.blocks import Matrix, Rows, matrix_shape
from sketch_plugins.sharding.state_names import nested


class SecondMomentProbe:
    """Compares the exact second moments of a few sampled rows with the store's estimates.

    Call `update` when the gradients are complete, just *before* ``optimizer.step()``, and `relative_error` after it.
    The same seed gives the same sample. The cost is ``rows * D`` numbers and a few small operations for each of
    ``params`` parameters.

    The exact average follows every row in every step (as in dense Adam or Adagrad). For row-sparse gradients, where
    rows without a gradient do not decay, only the touched rows of a sample change. Intended changes of the optimizer's
    own estimate count as error: cleaning, coupled weight decay, Adagrad's initial accumulator.

    Args:
        optimizer: a sketched optimizer, or a wrapper with an ``optimizer`` attribute.
        rows: number of rows sampled in each parameter.
        params: number of parameters sampled: the largest ones that are compressed.
        seed: seed of the sample.

    Raises:
        TypeError: ``optimizer`` is not a sketched optimizer.
    """

    def __init__(self, optimizer: Any, rows: int = 8, params: int = 4, seed: int = 0) -> None:
        while not isinstance(optimizer, SketchOptimizer):
            if not hasattr(optimizer, "optimizer"):
                raise TypeError(f"SecondMomentProbe takes a sketched optimizer, not {type(optimizer).__name__}")
            optimizer = optimizer.optimizer
        self.optimizer = optimizer
        self.rows, self.params, self.seed = rows, params, seed
        self._exact: dict[str, Tensor] = {}

    def update(self) -> None:
        """Add the present gradients to the exact averages."""
        for key, p, group, index in self._sample():
            if p.grad is None:
                continue
            batch = self.optimizer._batch(p, group)
            shape = matrix_shape(p.shape, batch)
            state = self.optimizer.state.get(p, {})  # it may have only keys of other code
            step = int(state["step"]) if "step" in state else 0
            ema = self.optimizer._rule(group, step + 1, False).second
            if ema is None:
                continue
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            if p.grad.is_sparse and batch:  # the gradient's rows are whole matrices
                matrices = index.div(shape[0] // p.shape[0], rounding_mode="floor").tolist()
                rows = (index % (shape[0] // p.shape[0])).tolist()
                g = torch.stack([p.grad[i].to_dense()[j].reshape(-1) for i, j in zip(matrices, rows, strict=True)]).to(
                    dtype
                )
            elif p.grad.is_sparse:
                g = torch.stack([p.grad[i].to_dense().reshape(-1) for i in index.tolist()]).to(dtype)
            else:
                g = Matrix(p.grad, batch).get(Rows(shape[0], index, 0, shape[1])).to(dtype)
            old = self._exact.get(key)
            if old is not None:
                old = old.to(g.device)  # the average comes from a checkpoint
            else:
                # A probe that starts late begins with the store's estimate.
                old = self._estimate(p, group, index) if step else torch.zeros_like(g)
            new = old * ema.decay + g * g * ema.gain
            lazy = p.grad.is_sparse or group["row_sparse"] is not False
            self._exact[key] = torch.where((g != 0).any(1, keepdim=True), new, old) if lazy else new

    def relative_error(self) -> float:
        """``||estimate - exact|| / ||exact||`` over all sampled rows; NaN before the first step."""
        difference, size = 0.0, 0.0
        for key, p, group, index in self._sample():
            if key in self._exact and p in self.optimizer.state:
                exact = self._exact[key].to(p.device)
                difference += float((self._estimate(p, group, index) - exact).square().sum())
                size += float(exact.square().sum())
        return (difference / size) ** 0.5 if size else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """The exact averages."""
        return {"exact": {key: value.clone() for key, value in self._exact.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._exact = {key: value.clone() for key, value in state["exact"].items()}

    def _estimate(self, p: Tensor, group: dict[str, Any], index: Tensor) -> Tensor:
        store = self.optimizer._stores(p, group)[1]
        assert store is not None
        shape = self.optimizer._matrix_shape(p, group)
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state = nested(self.optimizer.state[p])["second_moment"]
        return store.used(state, Rows(shape[0], index, 0, shape[1]), dtype).clone()

    def _sample(self) -> list[tuple[str, Tensor, dict[str, Any], Tensor]]:
        found = []
        for number, group in enumerate(self.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                store = self.optimizer._stores(p, group)[1]
                parts = self.optimizer._parts.of(i, p)
                # A probe samples rows of whole parameters, which parameters that are spread over ranks do not have
                # here.
                if store is not None and store.shared and p.numel() and len(parts) == 1 and parts[0].piece is None:
                    found.append((p.numel(), f"{number}.{i}", p, group))
        found.sort(key=lambda f: -f[0])
        out = []
        for _, key, p, group in found[: self.params]:
            total = self.optimizer._matrix_shape(p, group)[0]
            h = row_hashes(total, total, 1, "affine", self.seed)[0]
            picked = h.bucket(torch.arange(min(self.rows, total))).sort().values
            out.append((key, p, group, picked.to(p.device)))
        return out

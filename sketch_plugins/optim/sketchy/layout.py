"""What `Sketchy` keeps of a tensor: the covariances of some of its axes, and the moments of its graft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.rule import Further
from sketch_plugins.optim.sketchy import axes
from sketch_plugins.optim.sketchy.axes import AXES, axes_of, axes_with_covariances
from sketch_plugins.optim.sketchy.graft import GRAFTS
from sketch_plugins.sharding.blocks import matrix_shape
from sketch_plugins.sharding.parts import Shaped, whole_shape
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.stores import Store


class PreconditionedLayout(SketchOptimizer):
    """Which axes of a parameter have covariances, and which moments it has beside them."""

    def _stores(self, p: Shaped, group: Mapping[str, Any]) -> tuple[Store | None, Store | None]:
        return self._moments(p, group, group["momentum_of"] == "all" or self._whole(p, group))

    def _has_matrices(self, whole: tuple[int, ...], group: Mapping[str, Any]) -> bool:
        kinds = {"second_moment": GRAFTS[group["graft"]]}
        return group["precondition"] != "none" or super()._has_matrices(whole, {**group, **kinds})

    def _moments(self, p: Shaped, group: Mapping[str, Any], first: bool) -> tuple[Store | None, Store | None]:
        kinds = {"second_moment": GRAFTS[group["graft"]], "first_moment": group["first_moment"] if first else "none"}
        return super()._stores(p, {**group, **kinds})

    def _rate_factor(self, p: Shaped, group: Mapping[str, Any]) -> float:
        return 1.0  # `axes.factor_of`, when the step is taken

    def _whole(self, p: Shaped, group: Mapping[str, Any]) -> bool:
        """Whether every axis has a covariance."""
        preconditioner = self.preconditioner_of(p, group)
        return preconditioner is not None and all(preconditioner.ranks)

    def _further(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        preconditioner = self.preconditioner_of(p, group)
        return {} if preconditioner is None else {"preconditioner": preconditioner}

    def preconditioner_of(self, p: Shaped, group: Mapping[str, Any]) -> Kronecker | None:
        """The axes, blocks and ranks of a parameter's covariances; None if it has none."""
        shape, whole = tuple(p.shape), whole_shape(p)
        batch, matrices = 0, None
        if len(whole) > 2 and self.batch_axes(whole, group):  # each matrix has covariances of its own
            batch, whole = self._batch(p, group), whole[1:]
            if batch:  # otherwise the part is a piece of one matrix
                shape, matrices = shape[1:], shape[0]
                if not matrices:
                    return None
        dims, preconditioned = axes_of(shape, whole, *(group[name] for name in AXES))
        if not any(preconditioned):
            return None
        dtype, others = torch.float64 if p.dtype == torch.float64 else torch.float32, 0
        if group["budget"]:
            stores = self._moments(p, group, group["momentum_of"] == "all" or all(preconditioned))
            matrix = matrix_shape(p.shape, batch)
            others = sum(store.nbytes(matrix, dtype) for store in stores if store is not None)
        return axes.preconditioner_of(
            dims, preconditioned, group["rank"], group["budget"], others, group["max_block_dim"],
            group["statistics"] == "accumulate", dtype, matrices,
        )  # fmt: skip

    def _row_sparse(self, p: Shaped, group: Mapping[str, Any]) -> Any:
        # If rows are preconditioned along their axis, they are not the rows of an embedding.
        return False if self._whole(p, group) else super()._row_sparse(p, group)

    def _check_budget(self, group: Mapping[str, Any]) -> None:
        shaped = [p for p in group["params"] if not is_lazy(p) and p.numel()]
        axes = [group[name] for name in AXES]
        covered = {
            p: axes_with_covariances(tuple(p.shape)[self.batch_axes(tuple(p.shape), group) :], *axes)[1] for p in shaped
        }
        # The table of a vocabulary easily fits the budget, so tensors with all covariances decide, if there are any.
        eligible = [p for p in covered if covered[p] and all(covered[p])] or [p for p in covered if any(covered[p])]
        if eligible and all(self.preconditioner_of(p, group) is None for p in eligible):
            raise ValueError(
                f"budget={group['budget']:g} bytes a parameter is too small: after "
                f"first_moment={group['first_moment']!r} and graft={group['graft']!r}, nothing is left for a "
                "covariance of a tensor that is preconditioned along every axis. Use a larger budget, a smaller "
                "store, or rank= instead of budget="
            )

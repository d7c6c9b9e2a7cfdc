"""Products along one axis of tensors, c of them at once."""

from __future__ import annotations

import math

from torch import Tensor

from sketch_plugins.linalg import frequent_directions as fd


def sampled_along(x: Tensor, axis: int, vectors: Tensor) -> Tensor:
    """``L V`` for the covariances L of ``x``, ``(c, *)``, along one axis: ``(c, d, k)``."""
    count, d, k = vectors.shape
    before, behind = math.prod(x.shape[1 : axis + 1]), math.prod(x.shape[axis + 2 :])
    if behind == 1:
        return fd.sampled(x.reshape(count, -1, d).mT, vectors)
    if before == 1:
        return fd.sampled(x.reshape(count, d, behind), vectors)
    x = x.reshape(count, before, d, behind)
    # So many matrices are taken at a time that the products stay below the size of x.
    most, vectors = max(1, before * behind // k), vectors.unsqueeze(1)
    parts = [fd.sampled(x[:, first : first + most], vectors).sum(1) for first in range(0, before, most)]
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def stretch_along(x: Tensor, axis: int, vectors: Tensor, ratio: Tensor) -> None:
    """`frequent_directions.stretch` of contiguous ``x``, ``(c, *)``, along one axis."""
    count, d, k = vectors.shape
    before, behind = math.prod(x.shape[1 : axis + 1]), math.prod(x.shape[axis + 2 :])
    if behind == 1:
        fd.stretch_rows(x.view(count, -1, d), vectors, ratio)
    elif before == 1:
        fd.stretch(x.view(count, d, behind), vectors, ratio)
    else:
        x = x.view(count, before, d, behind)
        most = max(1, before * behind // k)
        for first in range(0, before, most):
            part = x[:, first : first + most]
            alone = part.is_contiguous()
            flat = part.reshape(-1, d, behind)
            times = part.shape[1]
            each = vectors.unsqueeze(1).expand(count, times, d, k).reshape(-1, d, k)
            fd.stretch(flat, each, ratio.unsqueeze(1).expand(count, times, k).reshape(-1, k))
            if not alone:
                part.copy_(flat.view(part.shape))

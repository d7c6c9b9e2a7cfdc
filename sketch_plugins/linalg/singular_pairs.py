"""The largest left singular pairs of A = [kept, new], in three ways.

Each function takes ``kept``, (*, d, k), ``new``, (*, d, n), and the present directions V, ``old``. It returns (*, d, k)
orthonormal columns and the squares of the first k + 1 singular values. Only the reference makes A, which may copy a
whole gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sketch_plugins.hashing import mix32
from sketch_plugins.linalg.decompositions import basis, eigenpairs, left_singular_pairs

# Columns that a block power step adds to its warm start. Through them new directions can enter, and they give the next
# eigenvalue, which "paper" subtracts.
OVERSAMPLING = 8
# Up to this number of rows or columns "power" would cost more than the exact "eigh", which is then used.
SMALL = 64
_SEED = 0x5EED


def by_svd(kept: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    k = old.shape[-1]
    s, u = left_singular_pairs(torch.cat([kept, new], -1))
    return u[..., :k], s[..., : k + 1].square()


def by_eigh(kept: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """From eigenvectors of the smaller of A A^T and A^T A."""
    d, k = old.shape[-2:]
    m = k + new.shape[-1]
    if m >= d:
        values, vectors = eigenpairs(kept @ kept.mT + new @ new.mT)
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        return vectors[..., :k], values[..., : k + 1]
    cross = kept.mT @ new
    upper, lower = torch.cat([kept.mT @ kept, cross], -1), torch.cat([cross.mT, new.mT @ new], -1)
    values, inner = eigenpairs(torch.cat([upper, lower], -2))
    values, inner = values.flip(-1)[..., : k + 1], inner.flip(-1)[..., :k]
    # Smaller values have lost all their digits in the product. (NaN is not smaller, so it does not pass for 0.)
    seen = ~(values <= values[..., :1] * (m * torch.finfo(new.dtype).eps))
    # The columns are descending, so badly known ones do not affect the others, and QR does not depend on their lengths.
    # Present directions take the place of those that were not seen; if they are in the span already, QR finds others.
    u = kept @ inner[..., :k, :] + new @ inner[..., k:, :]
    return basis(torch.where(seen[..., None, :k], u, old)), torch.where(seen, values, 0.0)


def by_power(kept: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """One step of block power iteration from V and a few more columns, then QR and Rayleigh-Ritz."""
    (d, k), n = old.shape[-2:], new.shape[-1]
    if min(d, k + n) <= SMALL:
        return by_eigh(kept, new, old)
    guess = old
    if extra := min(OVERSAMPLING, d - k, n):
        fresh = new @ noise(n, extra, new)
        # The new columns get the size of the others, because squares of squares are taken.
        top = torch.linalg.vector_norm(fresh, float("inf"), (-2, -1), keepdim=True)
        guess = torch.cat([old, fresh / torch.where(top > 0, top, 1.0)], -1)
    q = basis(kept @ (kept.mT @ guess) + new @ (new.mT @ guess))
    a, b = kept.mT @ q, new.mT @ q
    values, w = eigenpairs(a.mT @ a + b.mT @ b)
    values, w = values.flip(-1).clamp_min(0), w.flip(-1)
    return q @ w[..., :k], values[..., : k + 1]


def noise(d: int, k: int, like: Tensor) -> Tensor:
    """``(d, k)`` numbers to which gradients are hardly ever orthogonal. They are the same on every device.

    They are 1 and -1. But small matrices of signs are often singular, and then QR makes columns of rounding errors,
    which differ between processors. So for up to 16 rows the numbers are uniform in [-1, 1).
    """
    hashed = mix32(torch.arange(d * k, device=like.device), _SEED)
    if d <= 16:
        return ((hashed - 2**31).to(like.dtype) / 2**31).view(d, k)
    return (1 - 2 * (hashed & 1)).to(like.dtype).view(d, k)

r"""Frequent Directions: a sketch of rank k of a decayed covariance, for any number of equal shapes at once.

The covariance of a stream of matrices :math:`A_1, A_2, \ldots` of shape ``(d, n)`` is
:math:`L_t = \beta L_{t-1} + A_t A_t^\top`, a ``(d, d)`` matrix. Its sketch keeps k orthonormal directions V, the
eigenvalues of L in them, and two numbers for the rest. Everything here is a pure function of tensors with leading batch
dimensions ``*``. Only decompositions wait for a device: `torch.linalg` does so itself, and one flag is read beside it,
whether all numbers of the result are finite. `torch.autocast` has no effect on any of it.

Sources: Liberty 2013 (https://arxiv.org/abs/1206.0594); for the decay and the escaped mass, Feinberg et al. 2023,
"Sketchy" (https://arxiv.org/abs/2302.03764, Alg. 1 and section 5); for Nystrom's form of an accumulated product, Tropp
et al. 2017 (https://arxiv.org/abs/1706.05736).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from sketch_plugins.linalg.decompositions import eigenpairs as _eigenpairs
from sketch_plugins.linalg.singular_pairs import by_eigh, by_power, by_svd, noise

TAILS = ("trace", "paper", "sqrt")
SOLVERS = ("svd", "eigh", "power")


class Covariance(NamedTuple):
    r"""A sketch :math:`V \, \mathrm{diag}(values) \, V^\top` of a ``(d, d)`` covariance, and two numbers for the rest.

    Attributes:
        vectors: V, ``(*, d, k)``, with orthonormal columns.
        values: ``(*, k)``, descending, at least 0. They are 0 if the covariance has fewer than k directions.
        tail: ``(*)``: the eigenvalue that stands for all outside of V. See `fold`.
        trace: ``(*)``: the trace of the covariance itself.
    """

    vectors: Tensor
    values: Tensor
    tail: Tensor
    trace: Tensor


_F = TypeVar("_F", bound=Callable[..., Any])


def in_full_precision(function: _F) -> _F:
    """Exempt the products of a function from `torch.autocast`.

    Covariances of products in bfloat16 have three digits, and a decomposition would find directions in the rest.
    """

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = first.values if isinstance(first, Covariance) else first
        kind = tensor.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return cast(_F, run)


def start(batch: tuple[int, ...], d: int, k: int, dtype: torch.dtype, device: torch.device) -> Covariance:
    """The sketch of a covariance that is 0: directions of weight 0, which are the same on every machine."""
    none = torch.zeros(batch, dtype=dtype, device=device)
    # The vectors are contiguous: a checkpoint keeps no strides, and products of another layout have other bits.
    vectors = torch.linalg.qr(noise(d, k, none)).Q.expand(*batch, d, k).clone(memory_format=torch.contiguous_format)
    return Covariance(vectors, torch.zeros(*batch, k, dtype=dtype, device=device), none, none.clone())


@in_full_precision
def fold(
    old: Covariance,
    columns: Tensor,
    decay: float | Tensor,
    *,
    tail: str = "trace",
    solver: str = "eigh",
    mass: Tensor | None = None,
) -> Covariance:
    r"""The sketch after ``L <- decay * L + columns @ columns.T``.

    Let U, s be the left singular pairs of :math:`[\sqrt{decay} \, V \mathrm{diag}(\sqrt{values}), columns]`, in
    descending order, and :math:`c = s_{k+1}` (0 if it does not exist). Then:

    ======== =================================== ===============================================================
    ``tail`` values (V is U's first k columns)   tail
    ======== =================================== ===============================================================
    paper    :math:`s_i^2 - c^2`                 :math:`decay \cdot tail + c^2`: the escaped mass, an upper bound
                                                 of what the sketch misses in any direction:
                                                 :math:`0 \le L - V values V^\top \le tail \cdot I`
    sqrt     :math:`s_i^2 - c^2`                 :math:`\sqrt{decay} \cdot tail + c^2`, as in the authors' JAX
                                                 code. It ends near twice too large, and is kept for comparison
    trace    :math:`s_i^2`                       :math:`(trace - \sum values) / (d - k)`: the mean of the other
                                                 eigenvalues. It is not in the paper, and nearer to the
                                                 covariance's own inverse root
    ======== =================================== ===============================================================

    Args:
        old: the sketch so far.
        columns: ``(*, d, n)``.
        decay: :math:`\beta` in (0, 1], one number or one for each member of the batch.
        tail: see above.
        solver: how U and s are computed. ``"svd"`` is the reference. ``"eigh"`` takes eigenvectors of the smaller of
            A A^T and A^T A; relative to the largest, s is good to about the root of the dtype's precision. ``"power"``
            is one step of block power iteration from the present V and a few more columns, then QR and Rayleigh-Ritz.
            It is the cheapest if k is far below d and n, and close as long as the directions turn slowly. It may exceed
            L; the paper's bound holds for the other two. Matrices of few rows or columns (`singular_pairs.SMALL`) use
            ``"eigh"``.
        mass: ``(*)``, the trace that ``columns`` stand for, if they are an approximation themselves.

    Returns:
        The new sketch. If a member of the batch cannot be decomposed in any way, or its numbers overflow, that member
        is not finite (`finite`) and the others are not affected. The caller then keeps the old one.

    Raises:
        ValueError: ``tail`` or ``solver`` is unknown.
    """
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is not one of {', '.join(map(repr, TAILS))}")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(map(repr, SOLVERS))}")
    d, k = old.vectors.shape[-2:]
    # A number is filled in, because copying it would wait for the device.
    weight = decay.to(old.trace) if isinstance(decay, Tensor) else torch.full_like(old.trace, decay)
    kept = old.vectors * (old.values * weight.unsqueeze(-1)).clamp_min(0).sqrt().unsqueeze(-2)
    vectors, squares = {"svd": by_svd, "eigh": by_eigh, "power": by_power}[solver](kept, columns, old.vectors)
    values = squares[..., :k]
    trace = weight * old.trace + (_squares(columns) if mass is None else mass)
    if tail == "trace":
        # With k = d the difference is only the round-off of many steps.
        rest = (trace - values.sum(-1)).clamp_min(0) / (d - k) if k < d else torch.zeros_like(trace)
    else:
        escaped = squares[..., k] if squares.shape[-1] > k else torch.zeros_like(trace)
        values = (values - escaped.unsqueeze(-1)).clamp_min(0)
        rest = (weight.sqrt() if tail == "sqrt" else weight) * old.tail + escaped
    return Covariance(vectors, values, rest, trace)


@in_full_precision
def sampled(x: Tensor, vectors: Tensor) -> Tensor:
    r"""``x @ (x.T @ vectors)``: the product of the covariance of ``x``, ``(*, d, n)``, with directions ``(*, d, k)``.

    Between two calls of `fold` a sketch gathers the decayed sum :math:`\sum_s \beta^{t-s} A_s A_s^\top V`. It is linear
    in the covariance, and as large as V for any number of matrices. `drain` turns it into columns.
    """
    if x.ndim == 3:  # `matmul` would launch more operations
        return torch.bmm(x, torch.bmm(x.mT, vectors))
    return x @ (x.mT @ vectors)


@in_full_precision
def drain(buffer: Tensor, vectors: Tensor) -> Tensor:
    r"""Columns B, ``(*, d, k)``, with :math:`B B^\top = Y (V^\top Y + \nu)^{-1} Y^\top`: Nystrom's approximation.

    Y (``buffer``) is the product :math:`Y = L V` of a covariance L. B B^T never exceeds L, and equals L on the span of
    V. If L has rank k or less and V meets all its directions, B B^T is all of L. The trace tells what it misses.
    :math:`\nu`, two units in the last place of the norm of Y, is the round-off of :math:`V^\top Y`. Without it,
    directions that V only meets by round-off could get any size, even many times the covariance.
    """
    # Numbers are taken relative to the largest one: the squares of the norm would overflow long before the buffer does.
    top = torch.linalg.vector_norm(buffer, float("inf"), (-2, -1), keepdim=True)
    buffer = buffer / torch.where(top > 0, top, 1.0)
    core = vectors.mT @ buffer
    values, inner = _eigenpairs((core + core.mT) / 2)
    unsure = 2 * torch.finfo(values.dtype).eps * torch.linalg.matrix_norm(buffer).unsqueeze(-1)
    values = values + unsure
    inverse = torch.where(values > unsure / 2, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    return buffer @ (inner * (inverse.unsqueeze(-2) * top.sqrt()))


def spectrum(sketch: Covariance, tail: str) -> tuple[Tensor, Tensor]:
    """The eigenvalues that the preconditioner uses: ``(*, k)`` in the directions of V, and ``(*)`` everywhere else."""
    return _spectrum(sketch.values, sketch.tail, tail)


def inverse_root(
    sketch: Covariance,
    exponent: float,
    eps: float,
    tail: str,
    relative: bool = True,
    units: float | None = None,
    absolute: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""``(*, k)`` and ``(*)``: :math:`(\lambda + \epsilon \lambda_{max})^{exponent}` inside and outside of V.

    Without ``relative`` it is :math:`(\lambda + \epsilon)^{exponent}`. Without ``absolute`` it is divided by
    :math:`\lambda_{max}^{exponent}`, for directions that get their size elsewhere: then all numbers are moderate,
    whatever the size of the covariance.

    The eigenvalues are at least the round-off :math:`d \, u \, \lambda_{max}`, with u half a unit in the last place. A
    covariance of rank k or less leaves only round-off in the tail, and its inverse root would amplify directions that
    were never seen. If x itself is in the sketch before it is multiplied, a lower floor is enough: ``units`` in place
    of d. For a covariance of 0 (below the smallest normal number) both results are 1.
    """
    inside, outside = spectrum(sketch, tail)
    top, nothing = _top(inside)
    floor = floor_of(sketch.vectors.shape[-2] if units is None else units, inside.dtype)
    shift = eps if relative else eps / top.unsqueeze(-1)
    inner = ((inside / top.unsqueeze(-1)).clamp_min(floor) + shift).pow(exponent)
    outer = ((outside / top).clamp_min(floor) + (eps if relative else eps / top)).pow(exponent)
    if absolute:
        size = top.pow(exponent)
        inner, outer = inner * size.unsqueeze(-1), outer * size
    return torch.where(nothing.unsqueeze(-1), 1.0, inner), torch.where(nothing, 1.0, outer)


def relative_root(
    values: Tensor, tail: Tensor, exponent: Tensor | float, floor: Tensor | float, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    r"""`inverse_root` of many sketches at once, as the ratio of inside and outside, less 1, and the logarithm outside.

    Args:
        values: ``(n, k)``, see `Covariance`.
        tail: ``(n)``, see `Covariance`.
        exponent: at most 0; one number, or ``(n)``.
        floor: see `floor_of`; one number, or ``(n)``.
        eps: relative to the largest eigenvalue.
        kind: the ``tail`` of `fold`.

    Returns:
        ``(n, k)``: :math:`(in / out)^{exponent} - 1`, and ``(n)``: :math:`\ln out^{exponent}`. ``in`` and ``out`` are
        the eigenvalues inside and outside of V, floored and shifted as in `inverse_root`. For a covariance of 0 both
        results are 0.
    """
    inside, outside = _spectrum(values, tail, kind)
    top, nothing = _top(inside)
    column = [value.unsqueeze(-1) if isinstance(value, Tensor) else value for value in (floor, exponent)]
    out = (outside / top).clamp_min(floor) + eps
    ratio = (((inside / top.unsqueeze(-1)).clamp_min(column[0]) + eps) / out.unsqueeze(-1)).pow(column[1]) - 1.0
    log = (out.log() + top.log()) * exponent
    return ratio.masked_fill(nothing.unsqueeze(-1), 0.0), log.masked_fill(nothing, 0.0)


def floor_of(units: float, dtype: torch.dtype) -> float:
    """The fraction of the largest eigenvalue that the others are raised to if they are smaller, see `inverse_root`."""
    return units * torch.finfo(dtype).eps / 2


def _spectrum(values: Tensor, rest: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    if tail == "trace":
        # Repeated truncation has lost a little of V, so its directions weigh no less than the mean of the others.
        return torch.maximum(values, rest.unsqueeze(-1)), rest
    return values + rest.unsqueeze(-1), rest


def _top(inside: Tensor) -> tuple[Tensor, Tensor]:
    top = inside.amax(-1)
    nothing = top < torch.finfo(top.dtype).tiny
    return torch.where(nothing, 1.0, top), nothing


@in_full_precision
def multiply(x: Tensor, vectors: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    r"""``x <- V inside V^T x + outside (x - V V^T x)``, in place, for ``x`` of shape ``(d, n)`` or ``(m, d, n)``.

    There is one covariance for all of x. Beside x it only takes memory for ``(m, k, n)`` and ``(d, k)``.
    """
    projected = vectors.mT @ x
    scaled = vectors * (inside - outside)
    x.mul_(outside)
    if x.ndim == 2:
        return x.addmm_(scaled, projected)
    return x.baddbmm_(scaled.expand(len(x), *scaled.shape), projected)


@in_full_precision
def stretch(x: Tensor, vectors: Tensor, ratio: Tensor) -> None:
    r"""``x <- x + V ratio V^T x``, in place, for ``(c, d, n)``, each with its own directions ``(c, d, k)``."""
    x.baddbmm_(vectors * ratio.unsqueeze(-2), torch.bmm(vectors.mT, x))


@in_full_precision
def stretch_rows(x: Tensor, vectors: Tensor, ratio: Tensor) -> None:
    """`stretch` of the transposed matrices, ``(c, n, d)``."""
    x.baddbmm_(torch.bmm(x, vectors), (vectors * ratio.unsqueeze(-2)).mT)


def finite(sketch: Covariance, *doubts: Tensor) -> list[bool]:
    """Whether all numbers of a sketch are finite, for each member of a batch (one dimension or none: one flag).

    The device is waited for once. For meta tensors the answer is yes.

    Args:
        sketch: the sketch.
        doubts: the tensors that `decompositions.unchecked` yielded.
    """
    count = sketch.tail.numel()
    if sketch.tail.is_meta:
        return [True] * count
    # A number that is not finite makes the sum not finite. The values sum to the trace at most, so no sum overflows.
    total = torch.add(sketch.values.sum(-1), sketch.trace, alpha=-0.5).add_(sketch.tail, alpha=-0.25)
    total = total + sketch.vectors.sum((-2, -1))
    for doubt in doubts:
        total = total + doubt
    return total.isfinite().reshape(-1).tolist()


def _squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1)).square()  # takes no memory for the squares of all numbers

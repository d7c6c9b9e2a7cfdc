"""The graft of a preconditioned step: a diagonal method's update, which decides the size of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.optim.clipping import bounded, excess
from sketch_plugins.optim.declaring import option
from sketch_plugins.optim.eager import Factors
from sketch_plugins.optim.measuring import Sizes
from sketch_plugins.optim.pending import Pending
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.stores import Gradient

#: The grafts, and how the second moment of each is kept.
GRAFTS = {"cs": "count_min", "rmsprop": "dense", "adagrad": "dense", "sm3": "cover", "none": "none"}
INPUTS = ("update", "gradient")


class Graft(TypedDict, total=False):
    """What decides the size of the step, and what is preconditioned."""

    graft: Annotated[
        str | None,
        option(
            "cs",
            'the method whose update decides the size of the step. With ``"none"`` the step is x itself, whatever its '
            "size; update_clip and scale_parameter then apply to x, and are on unless they are set to 0 and False.",
            choices=tuple(GRAFTS),
            structural=True,
        ),
    ]
    input: Annotated[
        str | None,
        option(
            "update",
            "what is preconditioned, and what the covariances are made of: the graft's update, or the gradient (the "
            'step then still has the size of :math:`u_t`). With ``graft="none"`` both are the same.',
            choices=INPUTS,
        ),
    ]


def is_of_gradient(group: Mapping[str, Any]) -> bool:
    """Whether the gradient is preconditioned, not an update made of it. Without a graft the two are the same."""
    return group["input"] == "gradient" and group["graft"] != "none"


def write(one: Pending, whole: Matrix, of_update: bool) -> Tensor:
    """Write the second moment, and the update (or the gradient) to ``whole``.

    Returns the update's RMS, 0-d; of a batch of several matrices, the RMS of each, ``(matrices,)``.
    """
    grad, rule, state = one.grad, one.rule, one.state
    assert rule is not None
    second = one.named.get("second_moment")
    if second is None or rule.second is None:
        fill(grad, whole)
        return torch.zeros((), dtype=grad.dtype, device=grad.device)  # unused without a graft
    if second.write_first:
        second.write(state["second_moment"], grad, rule.second)
    working = dict(state)
    if not second.write_first:
        working["second_moment"] = second.begin(state["second_moment"], grad)
    period = second.period(grad.shape[0])
    factors, sizes = Factors(second, rule, working, period), Sizes(grad)
    for matrix, at in grad.of_matrices(period, second.align):
        g = grad.get(at)
        u = torch.mul(g, factors.get(at, g), **scratch.out("update", g))
        whole.put(at, u if of_update else g)
        sizes.add(matrix, u)  # which may change ``u``
    if not second.write_first:
        second.finish(state["second_moment"], working["second_moment"], grad)
    return sizes.all()


def fill(grad: Gradient, whole: Matrix) -> None:
    """Write the gradient to ``whole``."""
    for at in grad.batches():
        whole.put(at, grad.get(at))


def stacked(grads: Sequence[Gradient], x: Tensor) -> None:
    """Write gradients, unchanged, to ``x``, ``(c, R, D)``."""
    tensors = [grad.matrix.tensor for grad in grads]
    if all(tensor.dtype == x.dtype and tensor.is_contiguous() for tensor in tensors):
        torch.stack([tensor.view(x.shape[1:]) for tensor in tensors], out=x)
    else:
        torch._foreach_copy_([place.view(tensors[0].shape) for place in x], tensors)


def clipped(rms: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """``(c)``: the factors with which `update_clip` multiplies updates of this RMS; None if it is off."""
    found = excess(rms, group)
    return None if found is None else found.reciprocal_()


def sizes(parameters: Sequence[Tensor], dtype: torch.dtype, group: Mapping[str, Any], matrices: int = 1) -> Tensor:
    """``(c * matrices)``: the factors with which `scale_parameter` multiplies updates: RMS within the bounds.

    Args:
        parameters: c tensors of equal shape.
        dtype: dtype of the result.
        group: options.
        matrices: length of the parameters' first dimension, if they are batches of matrices: each has an RMS.
    """
    parameters = [p.to(dtype) if p.dtype.itemsize == 1 else p for p in parameters]  # torch has no norm of float8
    each = [one for p in parameters for one in p.unbind(0)] if matrices > 1 else list(parameters)
    if all(p.is_contiguous() for p in each):
        found = torch._foreach_norm(each, 2, dtype=dtype)
    else:  # copies, so that every layout gives the same bits
        found = tuple(torch.linalg.vector_norm(p.contiguous(), 2, dtype=dtype) for p in each)
    norms = torch.stack(found)
    # The squares of larger norms overflow float32, and the step would become NaN.
    largest = torch.finfo(dtype).max ** 0.5
    return bounded(norms.clamp_(max=largest).div_(each[0].numel() ** 0.5), group)

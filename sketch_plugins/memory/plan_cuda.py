"""CUDA's behaviour on fake tensors of the CPU, where it differs from the CPU's.

Fake tensors on a CUDA device abort the process in builds of torch without CUDA (autograd asks for a device guard). So
`plan` runs the model on fake CPU tensors. Operations that need other memory on CUDA are replaced here:

* attention: CUDA has flash kernels (float16 and bfloat16, no mask) and memory-efficient ones (float32, or a mask); a
  CPU with dropout would keep the whole matrix of scores;
* dropout: the mask has one byte for each element, not the size of the element;
* autocast: another list of operators runs in float32 (layer norms, powers, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: cuBLAS keeps one workspace for each thread that calls it (of Hopper's size; it is 8 MiB on other devices), and
#: autograd's backward runs in a thread of its own.
WORKSPACE = 2 * 32 * 2**20

# The list AT_FORALL_FP32 in ATen/autocast_mode.h, as far as Python has names for its operators.
_FLOAT32 = {
    *(getattr(torch, name) for name in ("exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "pow")),
    *(getattr(torch, name) for name in ("cosh", "sinh", "tan", "acos", "asin", "logsumexp", "softmax", "log_softmax")),
    *(getattr(Tensor, name) for name in ("exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt")),
    *(getattr(Tensor, name) for name in ("pow", "__pow__", "logsumexp", "softmax", "log_softmax", "cumsum", "cumprod")),
    *(torch.cumsum, torch.cumprod, torch.prod, Tensor.prod, torch.layer_norm, torch.group_norm),
    *(F.softmax, F.log_softmax, F.layer_norm, F.rms_norm, F.group_norm, F.softplus, F.cross_entropy, F.nll_loss),
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div, F.binary_cross_entropy_with_logits),
    *(F.cosine_similarity, F.cosine_embedding_loss, F.poisson_nll_loss, F.hinge_embedding_loss, F.soft_margin_loss),
}  # fmt: skip


class CudaLike(TorchFunctionMode):
    """Within this mode, the calls above behave as on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(func, *args, **kwargs)
        if func is F.dropout or func is torch.dropout:
            return _dropout(func, *args, **kwargs)
        if func in _FLOAT32 and torch.is_autocast_enabled("cpu"):
            args = [_float32(a) for a in args]
            kwargs = {key: _float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _dropout(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    defaults: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    given = {**defaults, **dict(zip(("p", "training", "inplace"), args, strict=False)), **kwargs}
    rate = kwargs.get("train", given["training"])
    if not rate or given["inplace"] or not 0 < given["p"] < 1:
        return func(input, *args, **kwargs)
    return torch.native_dropout(input, given["p"], True)[0]


def _attention(
    func: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) if t.is_floating_point() else t for t in (query, key, value))
    half = query.dtype in (torch.float16, torch.bfloat16)
    heads, width = query.shape[-3] if query.ndim == 4 else 1, query.shape[-1]
    if query.ndim != 4 or key.shape[-1] != value.shape[-1]:
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if half and attn_mask is None and width <= 256:
        if width % 8:
            query, key, value = (F.pad(t, (0, 8 - width % 8)) for t in (query, key, value))
            scale = 1 / math.sqrt(width) if scale is None else scale
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0][..., :width]
    if width % (8 if half else 4):
        return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa and key.shape[1] != heads:
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    bias = None
    if attn_mask is not None:
        bias = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        bias = bias.expand(query.shape[0], heads, query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]


def workspace(func: Any, args: Sequence[Any]) -> int:
    """Bytes that a CUDA kernel takes while it runs, beside its result."""
    if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
        # csrc/flash_attn, mha_bwd: the query's gradient is summed in float32, with one more number for each row.
        batch, heads, rows, width = args[1].shape
        rows, width = -(-rows // 128) * 128, -(-width // 32) * 32
        return batch * heads * rows * (width + 1) * 4
    return 0

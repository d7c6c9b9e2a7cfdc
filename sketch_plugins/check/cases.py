"""The cases on which kernels are compared: every store, every rule, and every option that selects other code.

The tests use these lists, too, with more shapes, widths and steps than a check has time for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sketch_plugins import registry
from sketch_plugins.optim import SM3, CSAdagrad, CSAdam, CSLion, CSMomentum, CSRMSprop, SketchOptimizer, Sketchy

#: Options of `CSAdam`.
ADAM: list[dict[str, Any]] = [
    {},
    {"preset": "lean"},
    {"update_clip": 0.3},
    {"scale_parameter": True},
    {"preset": "lean", "lagged_rms": True},
    {"preset": "lean", "lagged_rms": True, "width": 1},
    {"preset": "lean", "lagged_rms": True, "depth": 2, "table_dtype": "bf16"},
    {"update_clip": 0.3, "lagged_rms": True},
    {"first_moment": "fp32", "second_moment": "dense", "update_clip": 0.3, "lagged_rms": True},
    {"second_moment": "row_count_min", "compression": 0.2, "update_clip": 0.3, "lagged_rms": True},
    {"first_moment": "fp32", "second_moment": "dense", "update_clip": 0.3},
    {"first_moment": "bf16"},
    {"first_moment": "none"},
    {"block_size": 16},
    {"block_size": 200},
    {"preset": "exact"},
    {"second_moment": "cover"},
    {"second_moment": "cover", "update_clip": 0.3, "first_moment": "fp32"},
    {"compression": 1.0},
    {"width": 1},
    {"bucket": "sum"},
    {"eps": 0.0},
    {"maximize": True, "weight_decay": 0.3},
    {"hash": "affine"},
    {"depth": 3},
    {"depth": 2, "hash": "affine", "bucket": "sum", "first_moment": "none"},
    {"second_moment": "row_count_min", "compression": 0.2},
    {"first_moment": "count_sketch", "allow_dense_count_sketch": True, "depth": 3, "compression": 0.2},
    {"first_moment": "count_sketch", "allow_dense_count_sketch": True, "depth": 2, "second_moment": "dense"},
    {"second_moment": "log8"},
    {"second_moment": "log8", "first_moment": "none", "block_size": 64, "update_clip": 0.3},
    {"table_dtype": "bf16"},
    {"table_dtype": "bf16", "width": 1, "preset": "lean"},
    {"table_dtype": "bf16", "depth": 2, "hash": "affine", "bucket": "sum", "first_moment": "none"},
    {"table_dtype": "bf16", "second_moment": "row_count_min", "compression": 0.2},
]
#: (optimizer, options) of steps with dense gradients.
DENSE: list[tuple[type[SketchOptimizer], dict[str, Any]]] = [
    *((CSAdam, options) for options in ADAM),
    (CSRMSprop, {}),
    (CSAdagrad, {"weight_decay": 0.1, "initial_accumulator_value": 0.1}),
    (CSAdagrad, {"second_moment": "cover", "lr_decay": 0.1}),
    (CSMomentum, {"weight_decay": 0.1}),
    (CSMomentum, {"nesterov": True}),
    (CSMomentum, {"nesterov": True, "first_moment": "none"}),
    (CSLion, {"weight_decay": 0.1}),
    (CSLion, {"preset": "exact", "betas": (0.9, 0.9)}),
    (SM3, {}),
    (SM3, {"preset": "lean", "update_clip": 0.3}),
    (SM3, {"first_moment": "fp32", "update_clip": 0.3, "scale_parameter": True, "betas": (0.8, 0.9)}),
    (SM3, {"preset": "exact", "update_clip": 0.3}),
    (SM3, {"preset": "paper"}),
    (SM3, {"preset": "paper", "variant": "I"}),
    (SM3, {"variant": "I", "preset": "ema", "update_clip": 0.3}),
    (CSMomentum, {"first_moment": "count_sketch", "allow_dense_count_sketch": True, "table_dtype": "bf16"}),
    (CSAdagrad, {"preset": "lean", "weight_decay": 0.1, "lagged_rms": True}),
    (CSMomentum, {"nesterov": True, "update_clip": 0.3, "lagged_rms": True}),
    (SM3, {"preset": "ema", "lagged_rms": True}),
    (SM3, {"update_clip": 0.3, "scale_parameter": True, "lagged_rms": True}),
    (SM3, {"preset": "exact", "update_clip": 0.3, "lagged_rms": True}),
    (SM3, {"variant": "I", "preset": "ema", "lagged_rms": True}),
]
#: (optimizer, options) of steps with row-sparse gradients.
SPARSE: list[tuple[type[SketchOptimizer], dict[str, Any]]] = [
    (CSAdam, {}),
    (CSAdam, {"first_moment": "none", "bucket": "sum"}),
    (CSAdam, {"preset": "paper_cs_mv"}),
    (CSAdam, {"preset": "exact", "maximize": True}),
    (CSAdam, {"depth": 2, "hash": "affine", "first_moment": "bf16"}),
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"second_moment": "cover"}),
    (CSAdam, {"second_moment": "row_count_min", "depth": 2, "update_clip": 0.3}),
    (CSAdam, {"table_dtype": "bf16", "depth": 2, "first_moment": "count_sketch", "scale_parameter": True}),
    (CSAdam, {"table_dtype": "bf16", "second_moment": "row_count_min", "first_moment": "none"}),
    (CSAdagrad, {"second_moment": "row_count_min", "weight_decay": 0.1, "compression": 0.1}),
    (SM3, {"update_clip": 0.3, "scale_parameter": True}),
    (SM3, {"variant": "I", "preset": "ema"}),
    (CSAdam, {"preset": "lean", "lagged_rms": True}),
]
#: (optimizer, options) of steps in half precision.
HALF: list[tuple[type[SketchOptimizer], dict[str, Any]]] = [
    (CSAdam, {}),
    (CSAdam, {"preset": "lean"}),
    (SM3, {}),
    (CSMomentum, {}),
    (CSAdam, {"depth": 2}),
    (CSAdam, {"preset": "lean", "lagged_rms": True}),
    (CSAdam, {"weight_bits": 24}),
    (CSAdagrad, {"weight_bits": 32, "weight_decay": 0.1, "depth": 2}),
    (SM3, {"weight_bits": 24, "preset": "lean"}),
]
#: Error feedback in blocks: (block, dtype of the memory, with momentum).
MESSAGES: list[tuple[int, torch.dtype, bool]] = [
    (1024, torch.float32, False),
    (1024, torch.bfloat16, False),
    (1024, torch.float32, True),
    (256, torch.bfloat16, True),
    (4096, torch.bfloat16, True),
]

# A matrix of whole tiles, a ragged one, one of several tiles (with width 1 a bucket has more rows than a tile), a
# vector, one of three axes.
_SHAPES = ((24, 48), (37, 33), (80, 160), (5,), (6, 5, 7))
_EXPERTS = ((3, 18, 20), (2, 33, 260), (5, 16, 16))
_AXES = ((20, 7), (20, 5, 3), (20, 2, 3, 2), (20, 1, 3, 2, 2), (20, 2, 1, 3, 2, 2))


@dataclass(frozen=True)
class Case:
    """One comparison, a row of the table.

    Attributes:
        part: "kernels", "training" or "messages".
        name: unique; ``--only`` searches in it.
        optimizer: name in the registry.
        options: options of the optimizer.
        shapes: shapes of the parameters.
        dtype: dtype of the parameters.
        gradients: "dense", "packed" (sparse tensors), "rows" (only a few rows are not 0), "gaps" (views with gaps
            between rows, or not aligned).
        steps: number of steps.
        message: the entry of MESSAGES, for that part.
    """

    part: str
    name: str
    optimizer: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = _SHAPES
    dtype: torch.dtype = torch.float32
    gradients: str = "dense"
    steps: int = 2
    message: tuple[int, torch.dtype, bool] | None = None


def cases() -> list[Case]:
    """All cases."""
    out = [_case(cls, options) for cls, options in DENSE]
    out.append(_case(Sketchy, {"precondition": "none", "momentum_of": "all"}))
    # The kernels of preconditioned steps, but without the products, which would amplify differences of rounding.
    out.append(_case(Sketchy, {"precondition": "all", "start_preconditioning_step": 1000}))
    for dtype in (torch.bfloat16, torch.float16):
        out += [_case(cls, options, dtype=dtype, shapes=_SHAPES[:4]) for cls, options in HALF]
    out += [
        _case(CSAdam, {"stochastic_rounding": True, "first_moment_rounding": "stochastic"}, dtype=torch.bfloat16),
        _case(CSAdam, {}, gradients="gaps", shapes=_SHAPES[:3]),
        _case(CSAdam, {"preset": "exact"}, gradients="gaps", shapes=_SHAPES[:3]),
    ]
    out += [_case(SM3, {"variant": variant, "preset": "paper"}, shapes=_AXES) for variant in ("I", "II")]
    out.append(_case(SM3, {}, shapes=_AXES))
    out += [
        _case(cls, {**options, "capturable": True})
        for cls, options in [(CSAdam, {}), (CSAdam, {"preset": "lean", "lagged_rms": True}), (SM3, {})]
    ]
    # Batches of matrices, each of which is measured by itself.
    experts: list[tuple[type[SketchOptimizer], dict[str, Any]]] = [
        (CSAdam, {"update_clip": 0.3}),
        (CSAdam, {"preset": "lean"}),
        (CSAdam, {"preset": "lean", "lagged_rms": True}),
        (CSAdam, {"first_moment": "fp32", "second_moment": "dense", "update_clip": 0.3, "lagged_rms": True}),
        (SM3, {}),
    ]
    out += [_case(cls, options, shapes=_EXPERTS) for cls, options in experts]
    for cls, options in SPARSE:
        out.append(_case(cls, {**options, "row_sparse": "auto"}, gradients="packed", shapes=((50, 33), (50, 260))))
    for cls, options in SPARSE[:2]:
        out.append(_case(cls, {**options, "row_sparse": True}, gradients="rows", shapes=((50, 33), (50, 4, 3))))
    for name in registry.names():
        # Inverse roots of small eigenvalues amplify differences of rounding. With such an epsilon there are none.
        options = {"matrix_eps": 0.1} if name == "sketchy" else {}
        shapes = (64, 96), (300, 33), (96,), (8, 4, 3, 3)
        out.append(Case("training", f"{name}: 6 steps", name, options, shapes, steps=6))
    for block, dtype, momentum in MESSAGES:
        name = f"block_topk block={block} {_short(dtype)}{' momentum' if momentum else ''}"
        out.append(Case("messages", name, message=(block, dtype, momentum)))
    return out


def _case(cls: type[SketchOptimizer], options: dict[str, Any], **given: Any) -> Case:
    name = next(name for name in registry.names() if registry.get(name).cls is cls)
    words = [name, *(f"{key}={value}" for key, value in options.items())]
    if given.get("dtype", torch.float32) != torch.float32:
        words.append(_short(given["dtype"]))
    if "gradients" in given:
        words.append(f"gradients={given['gradients']}")
    if given.get("shapes") is _AXES:
        words.append("2 to 6 axes")
    if given.get("shapes") is _EXPERTS:
        words.append("experts")
    steps = 3 if options.get("lagged_rms") else 2
    return Case("kernels", " ".join(words), name, options, steps=steps, **given)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

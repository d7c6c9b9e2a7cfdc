"""torch.compile for the functions of a tile (``compile=True``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled by torch.compile, once for all shapes."""
    inner = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        for arg in args:
            for tensor in arg.values() if isinstance(arg, dict) else (arg,):
                if isinstance(tensor, Tensor) and tensor.ndim == 4:
                    # A tile as blocks: loops over a block of unknown size would not be vectorised.
                    torch._dynamo.mark_static(tensor, 3)
        return inner(*args)

    return run

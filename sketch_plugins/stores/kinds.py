"""The values of ``first_moment`` and ``second_moment``, and the store that each of them means.

A new store is a class in a file of its own and a line here. For fused steps it also needs a function of its name in
`kernels/gpu` (`Store.kernel`, Triton) or a loop (`Store.loop`, Numba). See docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from sketch_plugins.stores.base import Store
from sketch_plugins.stores.count_min import CountMin
from sketch_plugins.stores.count_sketch import CountSketch
from sketch_plugins.stores.cover import Cover
from sketch_plugins.stores.dense import Dense
from sketch_plugins.stores.log8 import Log8
from sketch_plugins.stores.quantized import Int8
from sketch_plugins.stores.row_count_min import RowCountMin


class StoreOptions(NamedTuple):
    """What a store needs to know of the options of a parameter group and of the shape of a parameter.

    Attributes:
        compression, width, depth, hash, bucket: for sketches.
        bf16: the tables of sketches are bfloat16.
        matrices: number of matrices that have buckets of their own.
        seed: seed of hashes and of noise.
        block_size: number of columns of a block.
        stochastic: int8 codes are rounded stochastically.
        dims: the shape that covers belong to.
        batch: number of matrices that have covers of their own; None: the parameter is no batch.
        variant: for covers.
        scaled: count-min keeps means of the rows.
    """

    compression: float = 1.0
    width: int = 0
    depth: int = 1
    hash: str = "strided"
    bucket: str = "mean"
    bf16: bool = False
    matrices: int = 1
    seed: int = 0
    block_size: int = 128
    stochastic: bool = False
    dims: tuple[int, ...] = ()
    batch: int | None = None
    variant: str = "II"
    scaled: bool = False

    @property
    def sketch(self) -> dict[str, object]:
        """The arguments that all sketches take."""
        names = ("compression", "width", "depth", "hash", "seed", "bf16", "matrices")
        return {name: getattr(self, name) for name in names}


Made = Callable[[StoreOptions], Store | None]

FIRST_MOMENTS: Mapping[str, Made] = {
    "int8": lambda o: Int8(block_size=o.block_size, stochastic=o.stochastic, seed=o.seed),
    "fp32": lambda o: Dense(order=1),
    "bf16": lambda o: Dense(order=1, bf16=True),
    "count_sketch": lambda o: CountSketch(**o.sketch),  # type: ignore[arg-type]
    "none": lambda o: None,
}
SECOND_MOMENTS: Mapping[str, Made] = {
    "count_min": lambda o: CountMin(bucket=o.bucket, scaled=o.scaled, **o.sketch),  # type: ignore[arg-type]
    "row_count_min": lambda o: RowCountMin(bucket=o.bucket, **o.sketch),  # type: ignore[arg-type]
    "cover": lambda o: Cover(dims=o.dims, variant=o.variant, matrices=o.batch),
    "log8": lambda o: Log8(block_size=o.block_size, seed=o.seed),
    "dense": lambda o: Dense(order=2),
    "none": lambda o: None,
}
#: Kinds whose store depends on the whole shape of the parameter, not only on its number of matrices.
SHAPED = frozenset({"cover"})


@lru_cache(maxsize=4096)
def store_of(order: int, kind: str, options: StoreOptions) -> Store | None:
    """The store of a kind, or None for "none". Equal options return the same object."""
    return (FIRST_MOMENTS if order == 1 else SECOND_MOMENTS)[kind](options)

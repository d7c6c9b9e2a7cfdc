"""The compressors by name."""

from __future__ import annotations

from sketch_plugins.comm.base import Compressor
from sketch_plugins.comm.block_topk import BlockTopK
from sketch_plugins.comm.count_sketch import CountSketchTopK
from sketch_plugins.comm.randk import RandK
from sketch_plugins.comm.topk import TopK

#: Name in options -> class.
COMPRESSORS: dict[str, type[Compressor]] = {cls.name: cls for cls in (TopK, BlockTopK, RandK, CountSketchTopK)}


def make_compressor(compressor: str | Compressor, seed: int = 0) -> Compressor:
    """A compressor by name.

    Raises:
        ValueError: there is no compressor of that name; lists the names.
    """
    if isinstance(compressor, Compressor):
        return compressor
    if not isinstance(compressor, str) or compressor not in COMPRESSORS:
        raise ValueError(f"compressor={compressor!r} is not one of {', '.join(map(repr, COMPRESSORS))}")
    cls = COMPRESSORS[compressor]
    return cls(seed=seed) if cls.shared else cls()  # type: ignore[call-arg]

"""How moments are kept. The stores here are the definition that the fused kernels are tested against."""

from sketch_plugins.stores.base import Ema, Gradient, Store
from sketch_plugins.stores.count_min import CountMin
from sketch_plugins.stores.count_sketch import CountSketch
from sketch_plugins.stores.cover import Cover
from sketch_plugins.stores.dense import Dense
from sketch_plugins.stores.log8 import Log8
from sketch_plugins.stores.quantized import Int8
from sketch_plugins.stores.row_count_min import RowCountMin

__all__ = ["CountMin", "CountSketch", "Cover", "Dense", "Ema", "Gradient", "Int8", "Log8", "RowCountMin", "Store"]

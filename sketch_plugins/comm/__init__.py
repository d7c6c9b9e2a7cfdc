"""Gradient compression with error feedback: compressors, and a communication hook for DistributedDataParallel."""

from sketch_plugins.comm.base import Compressor, Payload
from sketch_plugins.comm.block_topk import BlockTopK
from sketch_plugins.comm.compressors import COMPRESSORS
from sketch_plugins.comm.count_sketch import CountSketchTopK
from sketch_plugins.comm.hook import attach, memsgd_hook
from sketch_plugins.comm.randk import RandK
from sketch_plugins.comm.saved import redistribute
from sketch_plugins.comm.schedule import DensitySchedule
from sketch_plugins.comm.state import MemSGDState
from sketch_plugins.comm.topk import TopK

__all__ = [
    "COMPRESSORS",
    "BlockTopK",
    "Compressor",
    "CountSketchTopK",
    "DensitySchedule",
    "MemSGDState",
    "Payload",
    "RandK",
    "TopK",
    "attach",
    "memsgd_hook",
    "redistribute",
]

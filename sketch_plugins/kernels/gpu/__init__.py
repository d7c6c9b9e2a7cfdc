"""The fused steps as Triton kernels, for CUDA and ROCm, and for Triton's interpreter in tests.

One template (`step`) takes the stores' functions as compile-time arguments. Only `launch` knows grids.
"""

"""The stores and rules as Triton kernels: for CUDA and ROCm, and (for tests) Triton's interpreter.

One template (`step`) takes the stores' functions as compile-time arguments; `launch` is the only code that knows grids.
"""

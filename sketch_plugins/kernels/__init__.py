"""What a step computes: of a tile in torch, and whole in the fused kernels of Numba and Triton."""

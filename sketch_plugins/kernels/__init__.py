"""The fused steps of Numba and Triton, and the arithmetic of a tile that they share with the eager step."""

"""Differences that the generated comparison (tests/compare) has found between kernels and the definition."""

import warnings

import pytest
import torch

from sketch_plugins import SM3, CSAdam, CSMomentum


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CSMomentum, {"first_moment": "none"}),
        (CSMomentum, {"block_size": 16}),
        (CSAdam, {"first_moment": "none"}),
        (SM3, {"preset": "paper", "eps": 1.0}),
    ],
    ids=str,
)
def test_a_small_update_is_measured_where_its_squares_underflow(kernels, cls, options):
    """`lagged_rms` keeps the size of an update of 1e-20, whose squares underflow in float32; kernels once kept 0."""
    kept = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.ones(24, 40, device=kernels))
        optimizer = cls([p], fused=fused, lagged_rms=True, min_compress_size=0, **options)
        p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(kernels) * 1e-25
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, in the interpreter
            optimizer.step()
        kept.append(optimizer.state[p]["rms.last"])
    assert 0 < kept[1][0] < 1e-15
    # Sums of 960 squares in another order: 32 units in the last place.
    torch.testing.assert_close(kept[0], kept[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_infinite_gradient_that_is_clipped_leaves_the_other_numbers(kernels, momentum):
    """Without momentum the definition's lerp once made it NaN, and so the size of the update, and all numbers."""
    moved = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.ones(5, device=kernels))
        p.grad = torch.tensor([1.0, 2.0, float("inf"), -1.0, 0.5], device=kernels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, in the interpreter
            CSMomentum([p], 0.1, momentum=momentum, update_clip=0.3, fused=fused).step()
        moved.append(p.detach())
    for p in moved:
        # The size of the update is infinite, so numbers divided by it are 0.
        assert p.isfinite().tolist() == [True, True, False, True, True] and bool((p[p.isfinite()] == 1).all())

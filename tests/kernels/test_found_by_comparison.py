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
        (SM3, {"eps": 1.0}),
    ],
    ids=str,
)
def test_a_small_update_is_measured_where_its_squares_underflow(kernels, cls, options):
    """`lagged_rms` keeps the size of an update of 1e-20, whose squares float32 does not hold; kernels kept 0."""
    kept = []
    for fused in (True, False):
        p = torch.nn.Parameter(torch.ones(24, 40, device=kernels))
        optimizer = cls([p], fused=fused, lagged_rms=True, min_compress_size=0, **options)
        p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(kernels) * 1e-25
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, in the interpreter
            optimizer.step()
        kept.append(optimizer.state[p]["rms"]["last"])
    assert 0 < kept[1][0] < 1e-15
    # Sums of 960 squares in another order: 32 units in the last place.
    torch.testing.assert_close(kept[0], kept[1], rtol=4e-6, atol=0)

import pytest
import torch

from sketch_plugins.hashing import CLEANING, TABLE1, TABLE2, mix32, random32, row_hashes, uniform

ROWS = [1, 2, 3, 4, 5, 6, 7, 31, 33, 64, 1025]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hash", ["strided", "affine"])
def test_buckets_are_balanced_and_full_width_is_injective(rows, hash):
    index = torch.arange(rows)
    for width in {1, max(1, rows // 3), max(1, rows - 1), rows}:
        for h in row_hashes(rows, width, 4, hash, seed=7):
            counts = torch.bincount(h.bucket(index), minlength=width)
            assert counts.max() - counts.min() <= 1
            assert torch.equal(counts, h.load(torch.arange(width)))
            if width == rows:
                assert torch.equal(h.bucket(index).sort().values, index)


def test_first_hash_is_strided_by_default_and_the_others_differ():
    first, *others = row_hashes(100, 7, 3, "strided", 0)
    assert first.strided and torch.equal(first.bucket(torch.arange(100)), torch.arange(100) % 7)
    for h in others:
        assert torch.equal(h.row((h.a * torch.arange(100) + h.b) % 100), torch.arange(100))
    tables = [h.bucket(torch.arange(100)).tolist() for h in others]
    assert tables[0] != tables[1] and (torch.arange(100) % 7).tolist() not in tables
    assert not row_hashes(100, 7, 1, "affine", 0)[0].strided


def test_the_same_integer_gives_the_same_hashes_on_every_machine():
    # These values are fixed: a change breaks every saved checkpoint.
    h = row_hashes(1000, 50, 2, "affine", 42)[1]
    assert (h.a, h.b, h.sign_seed) == (337, 382, 153232595)
    assert mix32(torch.tensor([0, 1, 2**40]), 3).tolist() == [2247144487, 821347078, 3339656884]
    other = row_hashes(1000, 50, 2, "affine", 43)[1]
    assert (other.a, other.b) != (h.a, h.b)


def test_signs_are_balanced_and_differ_between_hashes():
    index = torch.arange(20000)
    a, b = (h.sign(index).double() for h in row_hashes(20000, 100, 2, "strided", 0))
    assert set(a.tolist()) == {-1.0, 1.0}
    # 20,000 fair signs: the mean has standard deviation 0.0071
    assert abs(a.mean()) < 0.03 and abs((a * b).mean()) < 0.03


def test_noise_is_uniform_and_a_function_of_seed_step_and_index():
    index = torch.arange(100_000)
    u = uniform(index, 1, 5, torch.float32)
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert torch.equal(u[100:200], uniform(index[100:200], 1, 5, torch.float32))
    for other in (uniform(index, 1, 6, torch.float32), uniform(index, 2, 5, torch.float32)):
        assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.02


# -- statistics of the rounding noise ---------------------------------------------------------------------------------

N = 1 << 20


def _along(function, steps):
    """Successive numbers are those of successive steps (or seeds), one element after the other."""
    index = torch.arange(N // steps) + 12345
    return torch.stack([function(index, i) for i in range(steps)], 1).flatten()


# The directions in which stochastic rounding counts: elements of a row, rows of a column, steps, seeds, and streams.
SEQUENCES = {
    "index": lambda: random32(torch.arange(N), 0, 1),
    "column": lambda: random32(torch.arange(N) * 4096, 1, 1000),
    "odd column": lambda: random32(torch.arange(N) * 769 + 5, -7, 3),
    "beyond 2**32": lambda: random32(torch.arange(N) + 2**33, 0, 1),
    "step": lambda: _along(lambda index, i: random32(index, 0, i + 1), 4096),
    "seed": lambda: _along(lambda index, i: random32(index, i, 1), 4096),
    "stream": lambda: _along(
        lambda index, i: random32(index, (0, TABLE1, TABLE2, TABLE2 ^ CLEANING)[i % 4], i // 4), 64
    ),
    "difference": lambda: (random32(torch.arange(N), 0, 2) - random32(torch.arange(N), 0, 1)) & 0xFFFFFFFF,
    "exclusive or": lambda: random32(torch.arange(N), 0, 1) ^ random32(torch.arange(N) + 1, 0, 1),
}


def _chi_square(cells, bins):
    """The deviation from the expectation, in standard deviations (normal for that many bins)."""
    counts = torch.bincount(cells, minlength=bins).double()
    assert len(counts) == bins
    expected = len(cells) / bins
    return ((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5).item()


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_noise_passes_for_random(sequence):
    """Uniformity, serial correlation and balance of bits; a fixed sample, each figure within 5 standard deviations."""
    x = SEQUENCES[sequence]()
    assert x.min() >= 0 and x.max() < 2**32
    low = x & 0xFFFF  # the bits that rounding to bfloat16 adds
    for name, cells, bins in (
        ("low 16", low, 1 << 16), ("high 16", x >> 16, 1 << 16), ("middle 12", (x >> 10) & 0xFFF, 1 << 12),
        ("pairs, low", (low >> 10).view(-1, 2) @ torch.tensor([64, 1]), 1 << 12),
        ("pairs, lowest", (x & 63).view(-1, 2) @ torch.tensor([64, 1]), 1 << 12),
        ("pairs, high", (x >> 26).view(-1, 2) @ torch.tensor([64, 1]), 1 << 12),
        ("fours", (low >> 13).view(-1, 4) @ torch.tensor([512, 64, 8, 1]), 1 << 12),
    ):  # fmt: skip
        assert abs(_chi_square(cells, bins)) < 5, name
    for numbers in (low, x):
        u = numbers.double() - numbers.double().mean()
        for lag in (1, 2, 3, 7, 64, 128, 768, 4096):
            r = (u[:-lag] * u[lag:]).mean() / u.square().mean()
            assert abs(r) < 5 / N**0.5, lag
    bits = torch.stack([(x >> b) & 1 for b in range(32)]).float() * 2 - 1
    assert bits.mean(1).abs().max() < 5 / N**0.5
    # Pairs of bits. The finaliser is not perfect: where the index runs in multiples of 4096, and so through all of its
    # 32 bits, a pair or two in 496 are correlated by up to 0.007 (12 seeds), 7 standard deviations of this sample. That
    # moves the probability of a rounding by less than 0.002, and only for such columns.
    assert (bits @ bits.t() / N - torch.eye(32)).abs().max() < (0.01 if sequence == "column" else 5 / N**0.5)


def test_one_bit_of_seed_step_or_index_turns_half_of_the_bits():
    index = torch.arange(2000) * 97 + 11
    here = random32(index, 3, 5)
    for change in range(32):
        for other in (random32(index ^ (1 << change), 3, 5), random32(index, 3 ^ (1 << change), 5),
                      random32(index, 3, 5 ^ (1 << change))):  # fmt: skip
            flipped = torch.stack([((here ^ other) >> b) & 1 for b in range(32)]).double().mean(1)
            # 2000 coins for each bit of the output: a standard deviation of 0.011; 3072 figures, so 5.5 of them
            assert (flipped - 0.5).abs().max() < 5.5 * 0.5 / 2000**0.5, change

import pytest
import torch

from sketch_plugins.hashing import mix32, row_hashes, uniform

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
    tables = [h.bucket(torch.arange(100)).tolist() for h in others]
    assert tables[0] != tables[1] and (torch.arange(100) % 7).tolist() not in tables
    assert not row_hashes(100, 7, 1, "affine", 0)[0].strided


def test_the_same_integer_gives_the_same_hashes_on_every_machine():
    # Written down once: a change here breaks every saved checkpoint.
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

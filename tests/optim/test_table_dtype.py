"""table_dtype="bf16" through the optimizers: bytes, dtypes, copies, dense and row-sparse training."""

import copy
import io

import pytest
import torch

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum, CSRMSprop, registry, state_report

from .conftest import parameters, train

SIGNED = {"first_moment": "count_sketch", "allow_dense_count_sketch": True}
CASES = [
    (CSAdam, {}),
    (CSAdam, {"depth": 3, "hash": "affine", "clean_every": 2, "clean_factor": 0.3, **SIGNED}),
    (CSAdam, {"second_moment": "row_count_min", "stochastic_rounding": True}),
    (CSRMSprop, {"preset": "lean"}),
    (CSAdagrad, {"initial_accumulator_value": 0.3}),
    (CSMomentum, {"depth": 2, **SIGNED}),
]
SHAPES = [(70, 33), (9,), (6, 4, 3, 3)]


def build(cls, params, options):
    return cls(params, table_dtype="bf16", min_compress_size=0, **{"compression": 0.2, **options})


def tables(optimizer):
    return {
        (index, name.removesuffix(".table")): tensor
        for index, state in enumerate(optimizer.state.values())
        for name, tensor in state.items()
        if name.endswith(".table")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("cls", "options"), CASES, ids=str)
def test_a_restored_run_continues_bit_for_bit(cls, options, dtype):
    params = parameters(SHAPES, dtype)
    optimizer = build(cls, params, options)
    train(optimizer, params, 3)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = build(cls, copies, options)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert tables(optimizer) and all(t.dtype == torch.bfloat16 for t in tables(other).values())
    for key, table in tables(optimizer).items():
        assert torch.equal(table, tables(other)[key])
    train(optimizer, params, 3, first=3)
    train(other, copies, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
    twin = [torch.nn.Parameter(p.detach().clone()) for p in parameters(SHAPES, dtype)]
    train(build(cls, twin, options), twin, 6)
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_the_option_is_structural_and_checked(name):
    entry = registry.get(name)
    if "table_dtype" not in entry.options:
        assert name in ("sm3", "cs_lion")  # covers are vectors, and Lion has no second moment
        return
    p = torch.nn.Parameter(torch.randn(64, 70))
    for options in ({"table_dtype": "fp16"}, {"table_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"table_dtype=.*'fp32', 'bf16'"):
            entry.cls([p], **options)
    optimizer = entry.cls([p], min_compress_size=0)
    train(optimizer, [p], 1)
    other = entry.cls([torch.nn.Parameter(p.detach().clone())], min_compress_size=0, table_dtype="bf16")
    with pytest.raises(ValueError, match=r"table_dtype='fp32'.*table_dtype='bf16'"):
        other.load_state_dict(optimizer.state_dict())
    # A checkpoint that is older than the option has float32 tables.
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["table_dtype"]
    if name != "cs_momentum":  # which keeps no table by default
        with pytest.raises(ValueError, match="table_dtype='bf16', but its state was written with table_dtype='fp32'"):
            other.load_state_dict(saved)
    entry.cls([torch.nn.Parameter(p.detach().clone())], min_compress_size=0).load_state_dict(saved)


def test_half_the_bytes_of_a_sketch():
    p = torch.nn.Parameter(torch.randn(1000, 768))
    p.grad = torch.randn_like(p)
    for options, expected in (
        ({"preset": "lean"}, 0.1 + 4 / 768),
        ({"preset": "paper_cs_mv", "allow_dense_count_sketch": True}, 0.8),
        ({"second_moment": "row_count_min", "first_moment": "none"}, 0.1 + 4 / 768),
        ({"preset": "exact"}, 8.0),
    ):
        optimizer = CSAdam([p], table_dtype="bf16", **options)
        planned = state_report(optimizer).state_bytes
        optimizer.step()
        held = sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")
        assert held == planned == state_report(optimizer).state_bytes
        assert held / p.numel() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("second_moment", ["count_min", "row_count_min"])
def test_the_mean_over_seeds_is_the_float32_run(second_moment, sparse):
    """Twenty steps of a decaying gradient: 64 seeds of noise around float32's table, which no seed is far from."""

    def run(seed, table_dtype):
        p = torch.nn.Parameter(torch.zeros(40, 32))
        options = {"second_moment": second_moment, "width": 8, "min_compress_size": 0, "row_sparse": sparse}
        optimizer = CSRMSprop([p], betas=(0.0, 0.99), seed=seed, table_dtype=table_dtype, **options)
        g = torch.Generator().manual_seed(1)
        for step in range(20):
            p.grad = torch.randn(40, 32, generator=g) * 0.7**step
            if sparse:
                p.grad[step % 3 :: 3] = 0
            optimizer.step()
        return optimizer.state[p]["second_moment.table"].double()

    exact = run(0, "fp32")
    runs = torch.stack([run(seed, "bf16") for seed in range(64)])
    error = (runs.mean(0) - exact) / (runs.std(0) / 8)
    # 256 cells, each a mean of 64 runs in units of its standard error: their squares' mean is 1 up to 1/11 and the t
    # distribution's 63/61; 5 standard errors.
    assert abs(error.square().mean().item() - 63 / 61) < 5 * (2 / 256) ** 0.5
    assert ((runs - exact).abs() / exact).max() < 0.1


@pytest.mark.parametrize("chunk", [1, 70, 700])
def test_the_chunk_size_changes_roundings_only_where_sums_differ(chunk):
    """The noise has nothing to do with it; another order of additions may put a number on a rounding's other side."""
    for options in ({}, {"depth": 2, "hash": "affine"}, {"second_moment": "row_count_min"}):
        found = []
        for size in (chunk, 10**6):
            params = parameters([(64, 33)], torch.float32)
            optimizer = build(CSAdam, params, {"chunk_size": size, **options})
            train(optimizer, params, 4)
            found.append(tables(optimizer)[0, "second_moment"])
        assert (found[0] != found[1]).float().mean() < 0.01
        torch.testing.assert_close(*found, rtol=2**-7, atol=0)

"""The first step on a device compares its kernels with the definition, and uses the result."""

import json
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sketch_plugins import SM3, CSAdam, CSMomentum, Sketchy
from sketch_plugins.check.cases import DENSE, SPARSE
from sketch_plugins.optim import self_check, verdicts


@pytest.fixture
def asked(monkeypatch):
    """Interpreted kernels are checked, too."""
    monkeypatch.setenv(self_check.SWITCH, "1")


@pytest.fixture
def tries(monkeypatch):
    """The specialisations that were compared."""
    seen, real = [], self_check._try_out

    def counted(optimizer, one, text, number):
        seen.append(text)
        return real(optimizer, one, text, number)

    monkeypatch.setattr(self_check, "_try_out", counted)
    return seen


def train(fused=True, steps=2, cls=CSAdam, shape=(24, 48), **options):
    """The parameter after some steps, and the warnings."""
    p = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimizer = cls([p], fused=fused, min_compress_size=0, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(1 + step))
            optimizer.step()
    return p.detach(), [str(one.message) for one in said]


@pytest.mark.parametrize("what", ["arithmetic", "compiler"])
def test_a_wrong_kernel_takes_no_step(broken, asked, tries, what):
    """One warning names kernel, device and what to do; the numbers are the eager path's, bit for bit."""
    expected, _ = train(fused=False)
    broken(what)
    ours, said = train()
    assert torch.equal(ours, expected)
    assert len(said) == 1 and len(tries) == 1
    for words in ("step.buckets", "takes eager steps on cpu", "sketch-plugins check", "SKETCH_PLUGINS_CHECK=0"):
        assert words in said[0]
    assert ("no compiler takes this kernel" if what == "compiler" else "the parameter") in said[0]
    again, said = train(steps=3)
    assert said == [] and len(tries) == 1
    assert torch.equal(again, train(fused=False, steps=3)[0])


def test_only_the_tensors_of_a_wrong_kernel_step_eagerly(broken, asked, monkeypatch):
    from sketch_plugins.kernels.gpu import launch

    broken("compiler")  # of sketches, not of vectors
    launched, kernel = [], launch.step.tiles

    class Counted:
        fn = kernel.fn

        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    params = [torch.nn.Parameter(torch.ones(24, 48)), torch.nn.Parameter(torch.ones(48))]
    optimizer = CSAdam(params, fused=True, min_compress_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match=r"step\.buckets"):
        optimizer.step()
    monkeypatch.setattr(launch.step, "tiles", Counted())
    optimizer.step()
    assert launched


def test_a_wrong_kernel_of_a_graph_is_an_error_before_anything_changes(broken, asked):
    broken("arithmetic")
    p = torch.nn.Parameter(torch.ones(24, 48))
    p.grad = torch.ones_like(p)
    optimizer = CSAdam([p], fused=True, capturable=True, min_compress_size=0)
    with pytest.raises(
        ValueError, match=r"capturable=True needs correct kernels, and on .*cpu.* these are not.*step\.buckets"
    ):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p)) and not optimizer.state[p]


def test_a_verdict_is_for_one_combination_of_versions(interpreted, asked, tries, monkeypatch):
    """It is valid for other processes (here: one that has forgotten it), but for no other version."""
    train()
    (file,) = interpreted.glob("*.json")
    found = json.loads(file.read_text())
    assert found["combination"]["torch"] == torch.__version__ and found["combination"]["sources"]
    assert list(found["kernels"].values()) == [None] and list(found["kernels"]) == tries
    self_check.forget()
    train()
    assert len(tries) == 1
    for name, value in (("version_of", lambda compiler: "99"), ("sources", lambda: "others")):
        self_check.forget()
        verdicts.combination.cache_clear()
        with monkeypatch.context() as other:
            other.setattr(verdicts, name, value)
            before = len(tries)
            train()
            assert len(tries) == before + 1, name
    assert len([*interpreted.glob("*.json")]) == 3


def test_a_found_fault_lasts_too(broken, asked, tries):
    broken("arithmetic")
    train()
    self_check.forget()
    _, said = train()
    assert len(tries) == 1 and len(said) == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"combination": {}, "kernels": {}}', '{"kernels": 3}'])
def test_a_damaged_file_is_none(interpreted, asked, tries, damage):
    train()
    (file,) = interpreted.glob("*.json")
    file.write_text(damage)
    self_check.forget()
    train()
    assert len(tries) == 2
    assert json.loads(file.read_text())["kernels"]


def test_a_folder_that_cannot_be_written(interpreted, asked, tries):
    interpreted.write_text("a file")
    expected, _ = train(fused=False)
    ours, said = train()
    assert said == [] and len(tries) == 1
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def test_what_is_no_fault_of_the_kernel_is_not_remembered(interpreted, asked, monkeypatch):
    """If the disk is full when Triton writes a kernel, this process steps eagerly, and the next one checks again."""
    from sketch_plugins.kernels.gpu import launch

    class Full:
        fn = launch.step.buckets.fn

        def __getitem__(self, grid):
            def launched(*args, **kwargs):
                raise OSError(28, "No space left on device")

            return launched

    with monkeypatch.context() as full:
        full.setattr(launch.step, "buckets", Full())
        ours, said = train()
    assert torch.equal(ours, train(fused=False)[0]) and "No space left" in said[0]
    self_check.forget()
    assert train()[1] == [] and [*interpreted.glob("*.json")]


def test_kernels_that_are_compiled_apart_have_verdicts_of_their_own(interpreted, asked, tries):
    """Nesterov's momentum is another kernel, and its parameter is filled in after the check."""
    for nesterov in (False, True):
        train(cls=CSMomentum, nesterov=nesterov)
    assert len(tries) == len(set(tries)) == 2


def test_the_switch(broken, tries, monkeypatch):
    """0: the kernel is used. Not set: interpreted kernels are not checked."""
    expected, _ = train(fused=False)
    broken("arithmetic")
    for value in ("0", None):
        if value is None:
            monkeypatch.delenv(self_check.SWITCH, raising=False)
        else:
            monkeypatch.setenv(self_check.SWITCH, value)
        ours, said = train()
        assert said == [] and tries == [] and not torch.allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_numba_is_checked_where_it_is_asked_for(asked, tries, tmp_path, monkeypatch):
    pytest.importorskip("numba", reason="Numba is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    self_check.forget()
    assert train(cls=SM3)[1] == []
    assert tries == ["sweeps.cover float32 float32 float32 float32 moment=2 after=True measure=True once=False"]
    monkeypatch.delenv(self_check.SWITCH)
    self_check.forget()
    train(cls=SM3)
    assert len(tries) == 1


def test_nobody_else_notices(interpreted, asked, tries):
    """Generators of random numbers, and hooks on the steps of all optimizers, are not affected."""
    seen = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    before = torch.get_rng_state()
    try:
        with torch.inference_mode():
            train(steps=1, preset="lean", lagged_rms=True)
    finally:
        handle.remove()
    assert len(seen) == 1 and len(tries) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_a_remembered_step_is_not_looked_at(interpreted, asked, monkeypatch):
    from sketch_plugins.optim import taking

    calls, confirm = [], taking.confirm
    monkeypatch.setattr(taking, "confirm", lambda *args: calls.append(args) or confirm(*args))
    train(steps=1)
    calls.clear()
    train(steps=4)
    assert len(calls) == 1


class _Enough(BaseException):
    pass


LARGE = [(1000, 768), (1000, 767), (2, 768), (64, 32, 3, 3), (768,), (7, 96, 128), (64, 8, 4, 2, 3, 3), (3,)]


@pytest.mark.parametrize(
    ("cls", "options", "sparse", "dtype"),
    [
        *((cls, options, False, torch.float32) for cls, options in DENSE[::4]),
        *((cls, options, True, torch.float32) for cls, options in SPARSE[::3]),
        (CSAdam, {"stochastic_rounding": True}, False, torch.bfloat16),
        (CSAdam, {"weight_bits": 24}, False, torch.bfloat16),
        (CSAdam, {"compression": 0.005}, False, torch.float16),
        (CSAdam, {"min_compress_size": 10**9}, False, torch.float32),
        (CSMomentum, {"row_sparse": True}, False, torch.float32),
        (Sketchy, {}, False, torch.float32),
    ],
    ids=str,
)
def test_small_tensors_are_compiled_for_what_large_ones_are(
    interpreted, asked, monkeypatch, cls, options, sparse, dtype
):
    """For each tensor of a model there is a small one whose kernels are compiled in the same way."""
    found = []

    def look(optimizer, unknown):
        for one, _, (_, text) in unknown:
            found.append((tuple(one.p.shape), self_check.like(optimizer, one, text)))
        raise _Enough

    monkeypatch.setattr(self_check, "_find_out", look)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in LARGE]
    for p in params:
        p.grad = torch.zeros_like(p)
        if sparse:
            rows = torch.arange(0, len(p), 7)
            values = torch.ones(len(rows), *p.shape[1:], dtype=dtype)
            p.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, p.shape, check_invariants=True)
    with pytest.raises(_Enough):
        cls(params, fused=True, **options).step()
    assert found
    for shape, kind in found:
        assert kind is not None, shape
        assert torch.Size(kind[0]).numel() < 200_000


@pytest.mark.gpu
def test_a_capture_checks_nothing(tries, monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    self_check.forget()
    p = torch.nn.Parameter(torch.ones(64, 128, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = CSAdam([p], fused=True, capturable=True, min_compress_size=0)
    monkeypatch.setenv(self_check.SWITCH, "0")
    optimizer.step()
    monkeypatch.delenv(self_check.SWITCH)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert tries == []
    optimizer.step()
    assert tries

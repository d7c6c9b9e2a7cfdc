"""The generated comparison, with its fixed seed, finds faults that are planted in the kernels.

A fault is an edit of a source file, which is loaded from a copy instead of the module itself. Most faults for Numba are
in the Python code that describes a step to the loops, because they need no compilation.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import comparison
from run import generated, seed_of

from sketch_plugins import kernels
from sketch_plugins.optim import fused

# Number of cases after which a fault counts as missed; `make compare` has ten times as many.
CASES = {"numba": 150, "triton": 60}


def load(module, folder, before, after):
    """The module with ``before`` replaced, as a module of its own."""
    source = Path(module.__file__).read_text()
    assert source.count(before) == 1, f"{before!r} is {source.count(before)} times in {module.__file__}"
    path = folder / f"faulty_{Path(module.__file__).name}"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    faulty = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = faulty  # dataclasses and Triton look a module up by its name
    try:
        with comparison.using("triton"):
            spec.loader.exec_module(faulty)
    finally:
        del sys.modules[path.stem]
    return faulty


def found(name, backend):
    """The message of the comparison about a fault."""
    with pytest.raises(comparison.Different) as different:
        generated(name, backend, CASES[backend], seed_of(name, backend), Counter(), quick=True, shrink=False)
        # Few of so few cases have weights of 24 bits in a tensor that is large enough to tell one noise from another.
        comparison.run(ROUNDED, backend)
    return str(different.value)


ROUNDED = {
    "optimizer": "cs_adam",
    "options": {"weight_bits": 24},
    "groups": [{}],
    "tensors": [{"shape": (24, 48), "dtype": "bfloat16", "layout": "contiguous", "group": 0}],
    "seed": 0,
    "steps": [{"grads": [{"kind": "normal"}], "then": "fused"}] * 2,
}


# The fault, the optimizer, the file, and the edit.
NUMBA = {
    "ignored flag: coupled weight decay": (
        "cs_momentum", "cpu", "if w.flags & (1 << L2):", "if False:",
    ),
    "wrong decay: of the parameter": (
        "cs_rmsprop", "sweeps", "store(p, o, shrink * load(p, o, n) - u, n)", "store(p, o, load(p, o, n) - u, n)",
    ),
    "lost clip: nothing is measured": (
        "sketchy", "cpu", "        ),\n        w.measure,\n", "        ),\n        False,\n",
    ),
    "missed tail: the numbers of the last row beyond a vector": (
        "cs_momentum", "cpu", "SIZE=size,", "SIZE=size - size % 16,",
    ),
    "stale table: it is read before the gradient is in it": (
        "cs_adam", "cpu", "apply = APPLY if fold_first else FOLD | APPLY", "apply = APPLY",
    ),
    "another noise: 24 bits are rounded to the other neighbour": (
        "cs_adam", "sweeps", "    z = z ^ (z >> U(31))\n", "    z = z ^ (z >> U(30))\n",
    ),
}  # fmt: skip
TRITON = {
    "ignored flag: momentum after the denominator": (
        "sm3", "step", "x = x * factor(v, s, _rate(s, INNER, PHASE))", "f = factor(v, s, f)",
    ),
    "wrong decay: of the parameter": (
        "cs_rmsprop", "step", "new = tl.load(s + SHRINK) * p - update", "new = p - update",
    ),
    "lost clip: what was measured is not looked at": (
        "sketchy", "norms", "    if clip != 0:", "    if clip < 0:",
    ),
    "missed tail: the last column of a row": (
        "sm3", "step", "(inside < BLOCK) & (cols < extent(t, COLUMNS, ALIGN))",
        "(inside < BLOCK) & (cols + 1 < extent(t, COLUMNS, ALIGN))",
    ),
    "stale table: the step reads what was there before": (
        "cs_adam", "step", "        v = kept.to(tl.float32)\n", "        v = v + 0.0 * kept.to(tl.float32)\n",
    ),
    "another noise: 24 bits are rounded to the other neighbour": (
        "cs_adam", "step", "                random = noise(t, s, index, PLAIN)\n", "                random = index\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", NUMBA)
def test_a_fault_in_the_loops_for_a_cpu_is_found(fault, monkeypatch, tmp_path):
    pytest.importorskip("numba")
    from sketch_plugins.kernels import cpu

    name, file, before, after = NUMBA[fault]
    if file == "cpu":
        faulty = load(cpu, tmp_path, before, after)
        monkeypatch.setattr(kernels, "cpu", faulty)
        monkeypatch.setitem(sys.modules, "sketch_plugins.kernels.cpu", faulty)
    else:
        monkeypatch.setattr(cpu, "sweeps", load(cpu.sweeps, tmp_path, before, after))
    fused._numba.cache_clear()
    try:
        assert "numba, step" in found(name, "numba")
    finally:
        fused._numba.cache_clear()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: it meets NaN and infinities
@pytest.mark.parametrize("fault", TRITON)
def test_a_fault_in_the_kernels_for_a_gpu_is_found(fault, monkeypatch, tmp_path):
    if not comparison.HAS_TRITON:
        pytest.skip("Triton's interpreter needs Triton, and a process without a CUDA device")
    from sketch_plugins.kernels.gpu import launch

    name, file, before, after = TRITON[fault]
    monkeypatch.setattr(launch, file, load(getattr(launch, file), tmp_path, before, after))
    assert "triton, step" in found(name, "triton")

"""300 generated cases: every backend has to compute what the eager definition computes; `make compare` has more.

A case that differs is printed as a dict: ``comparison.run(case, backend)`` repeats it.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import strategies
from run import generated, seed_of
from test_mutations import NUMBA, TRITON

from sketch_plugins import kernels, registry
from sketch_plugins.optim.mem_sgd import MemSGD
from sketch_plugins.optim.options import Option
from sketch_plugins.optim.sadagrad import SAdagrad

# Triton's interpreter takes ten times as long for a case.
CASES = {"numba": 43, "triton": 7}
KERNELS = Path(kernels.__file__).parent


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: it meets NaN and infinities
@pytest.mark.parametrize("backend", CASES)
def test_every_backend_computes_what_the_definition_computes(name, backend):
    if backend == "triton" and not comparison.HAS_TRITON:
        pytest.skip("Triton's interpreter needs Triton, and a process without a CUDA device")
    if backend == "numba":
        pytest.importorskip("numba")
    counts = Counter()
    generated(name, backend, CASES[backend], seed_of(name, backend), counts, quick=True)
    assert counts["cases"] >= CASES[backend]
    # The comparison must not be empty: kernels take a good part of the steps, and few cases are refused.
    assert counts["kernel"] >= CASES[backend] // 3, counts
    assert counts["refused"] <= counts["steps"] // 3, counts


def test_there_are_300_cases():
    assert sum(CASES.values()) * len(registry.names()) >= 300


def test_every_option_is_drawn_or_said_to_be_drawn_elsewhere(name):
    entry = registry.get(name)
    drawn = strategies.table(name)
    assert set(drawn) | set(strategies.ELSEWHERE) >= set(entry.options)
    for key, values in drawn.items():
        assert len(values) >= 2 or not entry.options[key].choices[1:], f"{key} has nothing to be drawn from: {values}"
        for value in values:
            value = value[1] if isinstance(value, tuple) and value[0] == "tensor" else value
            entry.options[key].validate(value)


def test_a_new_option_is_drawn_or_is_an_error(monkeypatch):
    entry = registry.get("cs_adam")
    options = dict(entry.cls.OPTIONS)
    monkeypatch.setattr(entry.cls, "OPTIONS", options)
    options["fast"] = Option("fast", bool, "a bool has both values")
    options["way"] = Option("way", str, "choices are values", choices=("up", "down"))
    drawn = strategies.table("cs_adam")
    assert drawn["fast"] == [False, True] and drawn["way"] == ["up", "down"]
    options["strength"] = Option("strength", float, "nobody knows which numbers")
    with pytest.raises(LookupError, match="'strength' has neither choices nor values"):
        strategies.table("cs_adam")


@pytest.mark.parametrize("cls", [MemSGD, SAdagrad])
def test_optimizers_without_kernels_are_not_compared(cls):
    """They are their own definition; an optimizer that gets the option ``fused`` has to be compared."""
    assert "fused" not in getattr(cls, "OPTIONS", {})
    with pytest.raises(ValueError, match="does not support fused=True, because it has no kernels"):
        cls([torch.nn.Parameter(torch.zeros(3))], fused=True)


def case(options=None, kinds=("normal", "normal"), **tensor):
    tensor = {"shape": (24, 48), "dtype": "float32", "group": 0, **tensor}
    return {
        "optimizer": "cs_adam",
        "options": {"min_compress_size": 0, **(options or {})},
        "groups": [{}],
        "tensors": [tensor],
        "seed": 0,
        "steps": [{"grads": [{"kind": kind}], "then": "fused"} for kind in kinds],
    }


def spoil(monkeypatch, what):
    """Change the fused optimizer by ``what(run)`` before its first gradient is read."""
    step = comparison.Run.step

    def spoilt(self, taken=None):
        out = step(self, taken)
        if self.own["fused"] is not False:
            what(self)
        return out

    monkeypatch.setattr(comparison.Run, "step", spoilt)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda run: run.params[0].data[3, 5].mul_(1 + 2**-12), r"1 of 1152 numbers differ, the first at \(3, 5\)"),
        (lambda run: run.optimizer.state[run.params[0]]["first_moment.codes"][1, 1].add_(2), "first_moment.codes"),
        (lambda run: run.optimizer.state[run.params[0]]["second_moment.table"].mul_(1.001), "second_moment.table"),
        (lambda run: run.params[0].data[0, 0].fill_(float("nan")), "nan, by the definition"),
        (lambda run: run.optimizer.state[run.params[0]].pop("second_moment.table"), "only on one side"),
    ],
)
def test_a_small_difference_is_found(monkeypatch, what, message):
    """An error of 2**-12 in one number of a parameter, or of two in a code, makes the comparison fail."""
    pytest.importorskip("numba")
    comparison.run(case(), "numba")
    spoil(monkeypatch, what)
    with pytest.raises(comparison.Different, match=message):
        comparison.run(case(), "numba")


def test_bits_that_do_not_repeat_are_found(monkeypatch):
    """A unit in the last place, within every tolerance, in the optimizer but not in its twin."""
    pytest.importorskip("numba")
    runs = []

    def sometimes(run):
        runs.append(run)
        if len(runs) % 2:
            run.params[0].data.copy_(torch.nextafter(run.params[0].data, torch.tensor(9.0)))

    spoil(monkeypatch, sometimes)
    with pytest.raises(comparison.Different, match="other bits when it is repeated"):
        comparison.run(case(), "numba")


@pytest.mark.parametrize("fault", NUMBA)
def test_a_fault_in_the_loops_has_its_place(fault):
    """`make slow` plants them; it does not run with every change of a kernel."""
    _, file, before, _ = NUMBA[fault]
    assert (KERNELS / f"{file}.py").read_text().count(before) == 1


@pytest.mark.parametrize("fault", TRITON)
def test_a_fault_in_triton_s_kernels_has_its_place(fault):
    _, file, before, _ = TRITON[fault]
    assert (KERNELS / "gpu" / f"{file}.py").read_text().count(before) == 1

"""Memory is the product: bytes of state, and temporary bytes of a step."""

import gc
import json
import math
import subprocess
import sys
import tracemalloc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sketch_plugins import CSAdam, registry, state_report
from sketch_plugins.memory.probe import SecondMomentProbe


def bert_base_shapes():
    d, vocab = 768, 30522
    shapes = [(vocab, d), (512, d), (2, d), (d,), (d,)]
    for _ in range(12):
        shapes += [(d, d), (d,)] * 4 + [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,)]
    return [*shapes, (d, d), (d,)]


def held(optimizer):
    return sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for name, t in state.items()
        if name != "step"
    )


@pytest.mark.parametrize(
    ("preset", "most"),
    [("default", 1.5), ("lean", 0.3), ("paper_cs_mv", 1.65), ("paper_cs_v", 4.85), ("exact", 8.0)],
)
def test_bytes_a_parameter_on_bert_base(preset, most):
    with torch.device("meta"):
        params = [torch.nn.Parameter(torch.empty(s)) for s in bert_base_shapes()]
    report = state_report(CSAdam(params, preset=preset))
    assert report.planned and report.params == 109_482_240
    assert report.bytes_per_param <= most
    assert report.adamw_bytes == 8 * report.params


EXPECTED = {  # bytes a parameter of a 1000 x 768 matrix
    "cs_adam": 1 + 4 / 128 + 0.2 + 4 / 768,  # a number for each row (row_scales)
    "cs_rmsprop": 0.2 + 4 / 768,
    "cs_adagrad": 0.2,
    "cs_momentum": 1 + 4 / 128,
    "cs_lion": 1 + 4 / 128,
    "sm3": 1 + 4 / 128 + 4 * (1000 + 768) / (1000 * 768),
    # + vectors and a buffer of rank 32, eigenvalues, and four numbers, for each axis
    "sketchy": 1 + 4 / 128 + 0.2 + 4 * (2 * 32 * (1000 + 768) + 2 * (32 + 4)) / (1000 * 768),
}


def test_measured_state_bytes(name):
    p = torch.nn.Parameter(torch.randn(1000, 768))
    bias = torch.nn.Parameter(torch.randn(768))
    optimizer = registry.get(name).cls([p, bias])
    planned = state_report(optimizer)
    for q in (p, bias):
        q.grad = torch.randn_like(q)
    optimizer.step()
    report = state_report(optimizer)
    assert report.state_bytes == planned.state_bytes == held(optimizer) and not report.planned
    assert report.parameters[0].state_bytes / p.numel() == pytest.approx(EXPECTED[name])
    # a vector is exact: 4 bytes for each moment
    assert report.parameters[1].state_bytes == 768 * 4 * len(report.parameters[1].stores)


class Live(TorchDispatchMode):
    """Bytes of storages made since entering, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.seen = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _strided(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if _strided(t):
                storage = t.untyped_storage()
                if storage._cdata in known or storage._cdata in self.seen:
                    continue
                size = storage.nbytes()
                self.seen[storage._cdata] = t
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
                weakref.finalize(t, self.free, size)
        return out

    def free(self, size):
        self.now -= size


def _strided(t):
    # A step is rehearsed with tensors of no memory.
    return isinstance(t, torch.Tensor) and t.layout == torch.strided and t.device.type != "meta"


def temporaries(optimizer):
    gc.collect()
    with Live() as live:
        optimizer.step()
    return live


OPTIONS = [
    {},
    {"hash": "affine", "depth": 3},
    {"row_sparse": "auto"},
    {"scale_parameter": True, "update_clip": 1.0},
    {"scale_parameter": True, "update_clip": 1.0, "lagged_rms": True},
    {"maximize": True},
    {"table_dtype": "bf16", "compression": 1.0},
]


SHAPES = [(2048, 128), (3, 87_500), (32, 32, 16, 16)]


def distinct(name, options):
    """The values of each of these options that an optimizer has, without those that give the same step."""
    kept = []
    for one in options:
        one = {key: value for key, value in one.items() if key in registry.get(name).options}
        if one not in kept:
            kept.append(one)
    return kept


def eager_cases():
    """Default options at every shape in both precisions; every other option of an optimizer at one shape, in bf16.

    The cut of a step into chunks depends on the shape, and the buffers of a chunk on the options, so not all pairs are
    needed. A parameter in bf16 uses every buffer that one in float32 uses, and those of the conversion.
    """
    for name in registry.names():
        for shape in SHAPES:
            yield from ((name, shape, {}, dtype) for dtype in (torch.float32, torch.bfloat16))
        yield from ((name, SHAPES[0], options, torch.bfloat16) for options in distinct(name, OPTIONS) if options)


@pytest.mark.parametrize(("name", "shape", "options", "dtype"), [*eager_cases()], ids=str)
def test_a_step_s_temporaries_are_chunks_not_parameters(name, shape, options, dtype):
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    chunk = 1 << 12
    optimizer = registry.get(name).cls([p], chunk_size=chunk, fused=False, **options)
    # The covers of a step are collected beside the old ones: vectors, but for (3, 87500) a third of the matrix.
    further = 4 * sum(shape) if name == "sm3" else 0
    if name == "sketchy":  # the one preconditioned tensor, what its axes are projected to, and scaled vectors
        optimizer.param_groups[0]["rank"] = 2
        further = 4 * (p.numel() + 6 * 2 * (max(shape) + p.numel() // min(shape)))
    for _ in range(2):  # the first step allocates the state
        p.grad = torch.randn_like(p)
        live = temporaries(optimizer) if optimizer.state else optimizer.step()
    assert live.largest > 0
    # At most a dozen chunk-sized float32 buffers, against 1 MB for a copy of the parameter in float32.
    assert live.peak <= 12 * 4 * chunk + further
    assert 12 * 4 * chunk < 0.2 * 4 * p.numel()


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in registry.names() for options in distinct(name, [OPTIONS[0], *OPTIONS[3:5]])],
    ids=str,
)
def test_a_fused_step_on_a_cpu_takes_next_to_nothing(name, options):
    """Under 1 % of the parameter: buffers of one span of columns, and sums for the rows."""
    pytest.importorskip("numba", reason="Numba is not installed")
    # The buffers are 140 KB for any size; twice that is allowed, for the bookkeeping of the measurement.
    p = torch.nn.Parameter(torch.randn(8192, 1024))
    optimizer = registry.get(name).cls([p], fused=True, **options)
    if name == "sketchy":  # fused where it does not precondition
        optimizer.param_groups[0]["precondition"] = "none"
    for _ in range(2):  # the first step allocates the state and compiles
        p.grad = torch.randn_like(p)
        tracemalloc.start()
        live = temporaries(optimizer)
        _, peak = tracemalloc.get_traced_memory()  # numpy's arrays among it
        tracemalloc.stop()
    assert live.peak + peak < 0.01 * 4 * p.numel()


@pytest.mark.parametrize("options", [{}, {"depth": 3}, {"second_moment": "row_count_min"}], ids=str)
def test_sparse_work_is_proportional_to_the_touched_rows(options):
    peaks = []
    for rows in (2_000, 200_000):
        p = torch.nn.Parameter(torch.randn(rows, 16))
        optimizer = CSAdam([p], **options)
        for step in range(2):
            index = torch.arange(0, 2000, 10) + step
            p.grad = torch.sparse_coo_tensor(index.unsqueeze(0), torch.randn(200, 16), (rows, 16), is_coalesced=True)
            live = temporaries(optimizer) if optimizer.state else optimizer.step()
        peaks.append(live.peak)
    assert peaks[1] <= 1.2 * peaks[0]
    assert peaks[1] < 40 * 200 * 16 * 4


SCRIPT = """
import json, resource, sys, torch
from sketch_plugins import registry
torch.set_num_threads(1)
name, options = sys.argv[1], json.loads(sys.argv[2])
p = torch.nn.Parameter(torch.empty(10000, 1000).normal_())
p.grad = torch.empty_like(p).normal_()
optimizer = registry.get(name).cls([p], **options)
most = []
for _ in range(3):
    most.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if len(most) < 3:
        optimizer.step()
print(json.dumps(most))
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [("cs_adam", {}), ("cs_adagrad", {"hash": "affine"})],
)
def test_resident_memory_of_a_process(name, options):
    """40 MB of parameters: memory that the operating system sees, with temporaries inside torch's own operators."""
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, json.dumps(options)], capture_output=True, text=True, check=True
    )
    start, first, second = json.loads(out.stdout)  # KB
    # In the second step the state exists already. 3.4 MB were measured, about one 4 MB buffer at a new address (not
    # traced); a copy of the parameter would be 40 MB.
    assert second - first < 10_000
    with torch.device("meta"):
        planned = state_report(registry.get(name).cls([torch.nn.Parameter(torch.empty(10000, 1000))], **options))
    # state, a handful of 2 MB buffers, and the code that torch loads on first use
    assert (first - start) * 1024 < planned.state_bytes + 30e6


def test_report_compares_stores_parameters_and_groups():
    model = torch.nn.Sequential(torch.nn.Linear(80, 70), torch.nn.LayerNorm(70)).to(torch.bfloat16)
    optimizer = CSAdam(
        [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[1].parameters()], "preset": "exact"}]
    )
    report = state_report(optimizer)
    assert report.by_group().keys() == {0, 1} and sum(report.by_group().values()) == report.state_bytes
    assert sum(report.by_store().values()) == report.state_bytes
    assert report.adamw_bytes == 2 * 2 * report.params  # AdamW keeps bf16 moments of bf16 parameters
    assert json.loads(json.dumps(report.to_dict()))["saved_bytes"] == report.saved_bytes
    text = str(report)
    assert "first moment" in text and "total" in text and "70x80" in text
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    adamw.step()
    assert state_report(adamw).state_bytes == report.adamw_bytes
    with pytest.raises(TypeError, match="int"):
        state_report(3)


def test_probe_measures_the_sketch_s_error():
    torch.manual_seed(0)
    scale = torch.logspace(-2, 2, 200).unsqueeze(1)
    errors = {}
    for compression in (1.0, 0.5, 0.05):
        p = torch.nn.Parameter(torch.zeros(200, 32))
        optimizer = CSAdam([p], compression=compression, min_compress_size=0)
        probe = SecondMomentProbe(optimizer, rows=50)
        assert math.isnan(probe.relative_error())
        for _ in range(5):
            p.grad = torch.randn(200, 32) * scale
            probe.update()
            optimizer.step()
        errors[compression] = probe.relative_error()
        other = SecondMomentProbe(optimizer, rows=50)
        other.load_state_dict(probe.state_dict())
        assert other.relative_error() == probe.relative_error()
    assert errors[1.0] < 1e-6 < 0.1 < errors[0.5] < errors[0.05]
    with pytest.raises(TypeError, match="AdamW"):
        SecondMomentProbe(torch.optim.AdamW([p]))


def test_frozen_parameters_are_not_counted():
    frozen, trained = (
        torch.nn.Parameter(torch.randn(1000, 100), requires_grad=False),
        torch.nn.Parameter(torch.randn(100, 100)),
    )
    optimizer = CSAdam([frozen, trained])
    planned = state_report(optimizer)
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    report = state_report(optimizer)
    assert report.state_bytes == planned.state_bytes == held(optimizer) and not report.planned
    assert report.params == trained.numel()

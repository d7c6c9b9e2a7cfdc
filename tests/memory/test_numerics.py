"""`NumericsProbe`: the share of weights that a step does not move, against a comparison of all weights."""

import copy
import math
import warnings

import pytest
import torch

from sketch_plugins import (
    CSAdam,
    InBackward,
    MemSGD,
    NumericsProbe,
    full_precision_state_dict,
    load_full_precision_state_dict,
    registry,
)
from sketch_plugins.memory.numerics import check_setting
from sketch_plugins.memory.numerics_report import NumericsReport, Unmoved
from sketch_plugins.memory.weight_sample import places_of

WARNING = "check_numerics"


def norm(size=64):
    """A norm's weight at 1.0 in bfloat16."""
    return torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))


def first_steps(optimizer, params, steps=6):
    """Constant gradients, with which each of Adam's updates is the learning rate."""
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "eager"])
@pytest.mark.parametrize("shape", [(64,), (256, 256)], ids=str)
def test_a_norm_s_weight_in_bfloat16_does_not_move(shape, fused):
    """Half a unit below 1.0 is 2**-9, so 1e-4 is lost unless the state keeps more bits."""
    shares = {}
    for bits in (None, 24, 32):
        p = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = CSAdam([p], lr=1e-4, weight_decay=0.0, weight_bits=bits, fused=fused)
        with warnings.catch_warnings(record=True) as said, NumericsProbe(optimizer, every=1) as probe:
            warnings.simplefilter("always")
            first_steps(optimizer, [p], 24)  # 24e-4 in all, more than half a unit
        shares[bits] = probe.share
        found = [str(one.message) for one in said if WARNING in str(one.message)]
        assert len(found) == (bits is None)
        if found:
            assert "100% in step 3" in found[0] and f"of shape {shape}" in found[0] and "weight_bits=24" in found[0]
        assert bool((p == 1).all()) == (bits is None)
    assert shares == {None: 1.0, 24: 0.0, 32: 0.0}


@pytest.mark.filterwarnings("ignore:.*usual learning rate")
@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("bits", [None, 24, 32])
def test_the_share_is_that_of_all_weights(name, bits):
    """With all weights in the sample, compared with `full_precision_state_dict` before and after each step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)).to(torch.bfloat16)
    optimizer = registry.get(name).cls(model.parameters(), lr=3e-4, weight_bits=bits, min_compress_size=256)
    probe = NumericsProbe(optimizer, every=1, bound=1.0)

    def weights():
        now = model.state_dict() if bits is None else full_precision_state_dict(model, optimizer)
        return {key: value.clone() for key, value in now.items()}

    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * (torch.rand(p.shape) < 0.7)  # some have no gradient
        before = weights()
        optimizer.step()
        counted = unmoved = 0
        for (key, after), p in zip(weights().items(), model.parameters(), strict=True):
            counted += int((p.grad != 0).sum())
            unmoved += int(((p.grad != 0) & (before[key] == after)).sum())
        assert probe.last.step == step + 1
        assert (probe.last.total.sampled, probe.last.total.unmoved) == (counted, unmoved)
        assert probe.share == unmoved / counted


def test_a_sample_stands_for_all():
    """Strata of unequal tensors, the smaller of which does not move: the share is by numbers of weights."""
    large = torch.nn.Parameter(torch.zeros(1000, 100, dtype=torch.bfloat16))
    small = torch.nn.Parameter(torch.ones(20000, dtype=torch.bfloat16))
    optimizer = CSAdam([large, small], lr=1e-4, weight_decay=0.0)
    probe = NumericsProbe(optimizer, every=1, elements=2000, bound=1.0)
    first_steps(optimizer, [large, small], 1)
    total = probe.last.total
    assert total.sampled == 2000 and total.weights == pytest.approx(120000)
    assert probe.share == pytest.approx(20000 / 120000)


@pytest.mark.parametrize(("n", "k"), [(10, 20), (10, 10), (1000, 7), ((1 << 33) + 5, 100)])
def testplaces_of(n, k):
    found = places_of(n, k, 3, torch.device("cpu"))
    assert len(found) == min(n, k) and bool((found[1:] > found[:-1]).all()) and 0 <= found[0] and found[-1] < n
    assert torch.equal(found, places_of(n, k, 3, torch.device("cpu")))
    # One in each of equal stretches.
    assert (
        k >= n
        or torch.equal(found * k // n, torch.arange(k))
        or bool(((found * k // n - torch.arange(k)).abs() < 2).all())
    )


@pytest.mark.parametrize("bits", [None, 24])
@pytest.mark.parametrize("back", [False, True], ids=["step", "in backward"])
def test_the_training_computes_the_same_bits(bits, back):
    def run(probed):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).to(torch.bfloat16)
        optimizer = CSAdam(model.parameters(), lr=1e-3, weight_bits=bits, min_compress_size=256)
        if back:
            InBackward(optimizer)
        probe = NumericsProbe(optimizer, every=2, elements=100, bound=1.0) if probed else None
        for step in range(6):
            if step in (2, 3):  # other code writes a weight, whose correction is void from then on
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
            model(torch.randn(4, 64, dtype=torch.bfloat16)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return probe, [*model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]

    (probe, with_it), (_, without) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert probe.last.step == 5 and 0 <= probe.share <= 1


@pytest.mark.filterwarnings("ignore:.*usual learning rate")
@pytest.mark.parametrize("name", registry.names())
def test_steps_in_backward_are_seen_as_others(name):
    def run(back):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).to(torch.bfloat16)
        own = {"stack_bytes": 0} if name == "sketchy" else {}
        optimizer = registry.get(name).cls(model.parameters(), lr=1e-4, weight_bits=24, min_compress_size=256, **own)
        if back:
            InBackward(optimizer)
        with NumericsProbe(optimizer, every=1, bound=1.0) as probe:
            for _ in range(3):
                model(torch.randn(4, 64, dtype=torch.bfloat16)).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return probe.last

    assert run(True) == run(False) and run(True).total.sampled > 1000


def test_a_closure():
    p = norm()
    optimizer = CSAdam([p], lr=1e-4, weight_decay=0.0)
    probe = NumericsProbe(optimizer, every=1)

    def closure():
        optimizer.zero_grad()
        loss = p.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 64.0
    assert probe.share == 1.0 and probe.last.total.sampled == 64
    optimizer.step(closure=closure)
    assert probe.last.step == 2 and probe.last.total.sampled == 64


def test_a_closure_that_is_evaluated_several_times():
    """The step is compared with the weights of the first evaluation, not with those after its last move."""

    class TwoMoves(torch.optim.Optimizer):
        def step(self, closure):
            for _ in range(2):
                closure()
                for p in self.param_groups[0]["params"]:
                    p.data.sub_(self.param_groups[0]["lr"])
            return closure()

    p = norm()
    optimizer = TwoMoves([p], {"lr": 0.125})
    probe = NumericsProbe(optimizer, every=1)

    def closure():
        p.grad = torch.ones_like(p)

    optimizer.step(closure)
    assert probe.share == 0.0 and bool((p == 0.75).all())


class Wrapping(torch.optim.SGD):
    """A step that calls its base's. torch runs the hooks for both."""

    fails = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.fails:
            raise RuntimeError("the step failed")
        for p in self.param_groups[0]["params"]:
            p.data.add_(self.param_groups[0].get("more", 0.0))
        return loss


@pytest.mark.parametrize("with_closure", [False, True], ids=["gradients", "closure"])
def test_a_step_that_calls_the_step_of_its_base_counts_once(with_closure):
    p = norm()
    torch.optim.SGD([norm()], lr=0.1)  # torch adds the hooks to a class when its first object is made
    optimizer = Wrapping([p], lr=1e-6)
    assert Wrapping.step.hooked and torch.optim.SGD.step.hooked
    probe = NumericsProbe(optimizer, every=2, bound=1.0)

    def closure():
        p.grad = torch.ones_like(p)

    def step():
        optimizer.step(closure) if with_closure else (closure(), optimizer.step())

    seen = []
    for _ in range(4):
        step()
        seen.append((probe.last.step, probe.share, probe.last.total.sampled))
    assert seen == [(1, 1.0, 64), (1, 1.0, 64), (3, 1.0, 64), (3, 1.0, 64)]
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="failed"):
        step()
    optimizer.fails, optimizer.param_groups[0]["more"] = False, 1.0  # the outer step moves what the inner one leaves
    step()
    assert probe.last.step == 5 and probe.share == 0.0


def test_looks_are_every_so_many_steps_and_none_after_it_was_removed():
    p = norm()
    optimizer = CSAdam([p], lr=1e-4)
    probe = NumericsProbe(optimizer, every=3, bound=1.0)
    assert math.isnan(probe.share) and probe.figures() == {}
    seen = []
    for _ in range(8):
        first_steps(optimizer, [p], 1)
        seen.append(probe.last.step)
    assert seen == [1, 1, 1, 4, 4, 4, 7, 7]
    with pytest.raises(ValueError, match="has a NumericsProbe already"):
        NumericsProbe(optimizer)
    probe.remove()
    first_steps(optimizer, [p], 4)
    assert probe.last.step == 7 and not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    NumericsProbe(optimizer).remove()
    copy.deepcopy(optimizer).step()  # it has no probe


def test_groups_and_figures():
    moving, still = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16)), norm()
    optimizer = CSAdam([{"params": [moving]}, {"params": [still]}], lr=1e-4, weight_decay=0.0)
    probe = NumericsProbe(optimizer, every=1)
    with pytest.warns(UserWarning, match="of parameter group 1 with a gradient did not move"):
        first_steps(optimizer, [moving, still], 3)
    assert probe.figures() == {
        "numerics/unmoved": 0.5, "numerics/unmoved_group_0": 0.0, "numerics/unmoved_group_1": 1.0,
    }  # fmt: skip
    assert str(probe.last) == (
        "step 3: 50.0% of the weights with a gradient did not move (group 0: 0.0%, group 1: 100.0%)"
    )


def test_a_report_of_a_step_without_weights():
    p = norm()
    optimizer = CSAdam([p], lr=1e-4)
    probe = NumericsProbe(optimizer, every=1)
    optimizer.step()
    assert str(probe.last) == "step 1: no weight with a gradient took a step"
    groups = {0: Unmoved(4, 4.0, 1.0), 1: Unmoved()}
    assert str(NumericsReport(2, groups, groups)).endswith("(group 0: 25.0%, group 1: no steps)")


def test_a_warning_needs_looks_in_a_row():
    p = norm()
    optimizer = CSAdam([p], lr=1e-4, weight_decay=0.0)
    NumericsProbe(optimizer, every=1, looks=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_steps(optimizer, [p], 2)
        optimizer.param_groups[0]["lr"] = 0.1
        first_steps(optimizer, [p], 1)  # everything moves
        with torch.no_grad():
            p.fill_(1)
        optimizer.param_groups[0]["lr"] = 1e-4
        first_steps(optimizer, [p], 2)
    with pytest.warns(UserWarning, match=WARNING):
        first_steps(optimizer, [p], 1)


def test_what_is_rounded_by_chance_is_counted_and_not_warned_of():
    """With an update of 2**-12 at 1.0, about one weight in 16 is rounded to the next number below."""
    p = norm(4096)
    optimizer = CSAdam([p], lr=2**-12, weight_decay=0.0, stochastic_rounding=True, fused=False)
    probe = NumericsProbe(optimizer, every=1, looks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_steps(optimizer, [p], 1)
    assert probe.share == pytest.approx(15 / 16, abs=0.02)
    assert probe.last.lasting == {}
    # Weights of 24 bits are 2**-15 apart there.
    p = norm(4096)
    optimizer = CSAdam([p], lr=1e-5, weight_decay=0.0, weight_bits=24, maximize=True)
    probe = NumericsProbe(optimizer, every=1, looks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_steps(optimizer, [p], 1)
    assert probe.share == pytest.approx(1 - 1e-5 * 2**15, abs=0.03)


def test_nothing_is_counted_where_no_step_is_meant():
    p, frozen = norm(), norm()
    optimizer = CSAdam([{"params": [p], "lr": 0.0}, {"params": [frozen]}], lr=1e-4)
    probe = NumericsProbe(optimizer, every=1, looks=1)
    first_steps(optimizer, [p], 1)  # the learning rate of a warm-up's first step; no gradient
    assert math.isnan(probe.share) and probe.figures() == {}
    # A step that is skipped as a whole.
    matrix = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    skipping = registry.get("sketchy").cls([matrix], lr=1e-4, nonfinite="skip")
    probe = NumericsProbe(skipping, every=1, looks=1)
    matrix.grad = torch.ones_like(matrix)
    matrix.grad[0, 0] = math.inf
    skipping.step()
    assert bool((matrix == 1).all()) and math.isnan(probe.share)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD], ids=lambda cls: cls.__name__)
def test_torch_s_optimizers(cls):
    p = norm()
    optimizer = cls([("scale", p)], lr=1e-4, weight_decay=0.0)
    probe = NumericsProbe(optimizer, every=1)
    with pytest.warns(UserWarning, match=r"parameter 0 \(scale\) of group 0.*weight_bits=24 of an optimizer of"):
        first_steps(optimizer, [p], 3)
    assert probe.share == 1.0


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, None), (torch.bfloat16, 32), (torch.float16, 32)], ids=str)
def test_float32_weights_can_be_stuck_too(dtype, bits):
    """Those of 32 bits, too, whose updates are rounded to float32."""
    p = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = CSAdam([p], lr=1e-9, weight_decay=0.0, weight_bits=bits)
    probe = NumericsProbe(optimizer, every=1)
    with pytest.warns(UserWarning, match=WARNING) as said:
        first_steps(optimizer, [p], 3)
    assert probe.share == 1.0
    (message,) = [str(one.message) for one in said if WARNING in str(one.message)]
    assert message.startswith(
        "check_numerics: in each of the last 3 checks, more than 50% of the weights with a gradient"
    )
    assert "in the last place of torch.float32. " in message and "bfloat16" not in message
    assert message.endswith("Use a larger learning rate, or float64 parameters")


def test_the_learning_rate_of_a_group_is_read_once_in_a_check():
    """If it is a tensor on a GPU, each read waits for the device."""
    reads = []

    class Rate(torch.Tensor):
        def __float__(self):
            reads.append(1)
            return self.item()

    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(5)]
    optimizer = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.1).as_subclass(Rate)
    probe = NumericsProbe(optimizer, every=1)
    for p in params:
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        probe._look(optimizer, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
    assert len(probe._before) == 5 and len(reads) == 2


def test_row_sparse_gradients():
    """The sample is taken among the rows that have a gradient."""
    table = torch.nn.Embedding(10000, 32, sparse=True, dtype=torch.bfloat16)
    with torch.no_grad():
        table.weight.fill_(1).index_fill_(0, torch.tensor([7, 9]), 0)
    optimizer = CSAdam(table.parameters(), lr=1e-4, weight_decay=0.0)
    probe = NumericsProbe(optimizer, every=1, elements=64)
    table(torch.tensor([7, 7, 9, 5000, 9999])).float().sum().backward()
    optimizer.step()
    total = probe.last.total
    assert total.sampled == 64 and total.weights == 4 * 32 and probe.share == 0.5


def test_tensors_of_any_layout():
    turned = torch.nn.Parameter(torch.ones(50, 30, dtype=torch.bfloat16).t())
    scalar = torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    empty = torch.nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
    optimizer = CSAdam([turned, scalar, empty], lr=1e-4, weight_decay=0.0, weight_bits=32)
    probe = NumericsProbe(optimizer, every=1, elements=300)
    first_steps(optimizer, [turned, scalar, empty], 2)
    assert probe.last.total.sampled == 101 and probe.share == 0.0


def test_weights_that_were_loaded_are_compared_as_they_are(tmp_path):
    """Existing corrections are part of the weight before the first step of a probe."""
    model = torch.nn.Linear(64, 64).to(torch.bfloat16)
    optimizer = CSAdam(model.parameters(), lr=1e-4, weight_bits=32, weight_decay=0.0)
    wanted = {key: torch.full_like(value, 1.001, dtype=torch.float32) for key, value in model.state_dict().items()}
    load_full_precision_state_dict(model, optimizer, wanted)
    probe = NumericsProbe(optimizer, every=1)
    first_steps(optimizer, model.parameters(), 1)
    assert probe.share == 0.0 and probe.last.total.sampled == 64 * 65
    moved = full_precision_state_dict(model, optimizer)["weight"]
    assert torch.allclose(moved, torch.full_like(moved, 1.0009), rtol=0, atol=1e-6)


def test_a_step_that_fails_is_not_counted():
    p = norm()
    optimizer = CSAdam([p], lr=1e-4)
    probe = NumericsProbe(optimizer, every=1)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="lr"):
        optimizer.param_groups[0]["lr"] = math.nan
        optimizer.step()
    assert probe.last is None
    optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.step()
    assert probe.last.step == 1 and probe.share == 1.0


def test_what_is_refused():
    p = norm()
    with pytest.raises(TypeError, match="takes an optimizer, not Linear"):
        NumericsProbe(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not support MemSGD"):
        NumericsProbe(MemSGD([p], lr=1e-3))
    with pytest.raises(ValueError, match=r"does not support LBFGS: its line search moves the weights back and forth"):
        NumericsProbe(torch.optim.LBFGS([p]))
    for name, value in (
        ("every", 0), ("elements", -1), ("looks", True), ("bound", 1.5), ("bound", "half"), ("seed", "x"),
        ("seed", None), ("seed", 1.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed"):
            NumericsProbe(CSAdam([p]), **{name: value})
    NumericsProbe(CSAdam([p]), seed=-1).remove()
    assert [check_setting(value) for value in (False, True, 0, 7)] == [0, 100, 0, 7]
    for value in (-1, 1.0, "yes", None):
        with pytest.raises(ValueError, match=r"check_numerics=.* is not allowed"):
            check_setting(value)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_shards_of_a_dtensor(one_rank):
    """This rank's shard, with its corrections, and without communication."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).to(torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = CSAdam(model.parameters(), lr=1e-3, weight_bits=32, weight_decay=0.0, min_compress_size=256)
    probe = NumericsProbe(optimizer, every=1)
    for _ in range(2):
        model(torch.randn(4, 64, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe.last.total.sampled > 4000 and probe.share < 0.01

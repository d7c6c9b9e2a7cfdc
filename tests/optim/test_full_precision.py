"""Float32 weights of a run with ``weight_bits``, the way back, and `cast_model`."""

import copy

import pytest
import torch

from sketch_plugins import CSAdam, cast_model, full_precision_state_dict, load_full_precision_state_dict
from sketch_plugins.kernels.weight_code import decode
from sketch_plugins.memory.meter import AllocatorMeter


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 24)
        self.norm = torch.nn.BatchNorm1d(24)
        self.inner = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.LayerNorm(24))
        self.head = torch.nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("frequencies", torch.rand(3), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        h = self.inner(self.norm(self.embed(x)))
        return self.head(h)


def built(bits=24, seed=0, dtype=torch.bfloat16, steps=0):
    torch.manual_seed(seed)
    model = cast_model(Net(), dtype)
    optimizer = CSAdam(model.parameters(), lr=1e-3, weight_bits=bits, fused=False)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        x = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(step))
        torch.nn.functional.cross_entropy(model(x).float(), x).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bits", [24, 32])
def test_all_bits_of_every_weight(bits):
    model, optimizer = built(bits, steps=3)
    out = full_precision_state_dict(model, optimizer)
    assert list(out) == list(model.state_dict())
    assert out["head.weight"] is out["embed.weight"]
    for name, p in model.named_parameters():
        if p.dtype == torch.bfloat16:
            wanted = decode(p.detach(), optimizer.state[p]["weight_correction.codes"].view(p.shape))
            assert torch.equal(out[name], wanted) and not torch.equal(out[name], p.float())
        assert out[name].dtype == torch.float32
    assert out["count"].dtype == torch.int64 and out["scale"].dtype == torch.float32
    # They load into a float32 model like any state dict.
    Net().load_state_dict(out)
    assert all(
        value.device.type == "cpu" for value in full_precision_state_dict(model, optimizer, device="cpu").values()
    )


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("bits", [24, 32])
def test_the_way_back(bits, started):
    """Weights and corrections are equal to the run's own, in an optimizer with or without steps."""
    model, optimizer = built(bits, steps=3)
    out = {name: value.clone() for name, value in full_precision_state_dict(model, optimizer).items()}
    other, fresh = built(bits, seed=1, steps=2 * started)
    load_full_precision_state_dict(other, fresh, out)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        if p.dtype == torch.bfloat16:
            kept = (optimizer.state[p], fresh.state[q])
            assert torch.equal(*(state["weight_correction.codes"] for state in kept)), name
            assert float(fresh.state[q]["step"]) == 2 * started
    again = full_precision_state_dict(other, fresh)
    assert all(torch.equal(out[name], again[name]) for name in out)
    train(other, fresh, range(3, 5))  # and it continues from there
    assert all(float(fresh.state[p]["step"]) == 2 + 2 * started for p in other.parameters())
    # A state dict of it, too.
    third, last = built(bits, seed=2)
    third.load_state_dict(other.state_dict())
    last.load_state_dict(fresh.state_dict())
    train(other, fresh, [7])
    train(third, last, [7])
    assert all(map(torch.equal, other.parameters(), third.parameters()))


def test_a_float32_checkpoint_begins_a_run_in_bfloat16():
    torch.manual_seed(0)
    weights = Net().state_dict()
    model, optimizer = built(32, seed=1)
    load_full_precision_state_dict(model, optimizer, weights)
    assert all(torch.equal(value, weights[name]) for name, value in full_precision_state_dict(model, optimizer).items())


def test_what_does_not_fit_is_named_and_changes_nothing():
    model, optimizer = built(steps=1)
    before = {name: value.clone() for name, value in full_precision_state_dict(model, optimizer).items()}
    for change, said in (
        (
            {"inner.0.weight": torch.zeros(3, 3)},
            r"'inner.0.weight' has shape \(3, 3\) in the state dict and \(24, 24\)",
        ),
        ({"elsewhere": torch.zeros(1)}, "not of the model 'elsewhere'"),
    ):
        with pytest.raises(ValueError, match=said):
            load_full_precision_state_dict(model, optimizer, {**before, **change})
    with pytest.raises(ValueError, match=r"missing 'embed\.weight'"):
        load_full_precision_state_dict(model, optimizer, {k: v for k, v in before.items() if k != "embed.weight"})
    after = full_precision_state_dict(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="AdamW is no optimizer of sketch-plugins"):
        full_precision_state_dict(model, torch.optim.AdamW(model.parameters()))


def test_what_a_framework_wraps_around_an_optimizer():
    model, optimizer = built(steps=1)

    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

    one, two = (full_precision_state_dict(model, each) for each in (optimizer, Wrapper(Wrapper(optimizer))))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_cast_model_leaves_statistics_constants_and_what_is_named():
    model = cast_model(Net(), torch.bfloat16, keep=["inner.1", torch.nn.Embedding])
    kinds = {name: value.dtype for name, value in [*model.named_parameters(), *model.named_buffers()]}
    half = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert half == {"inner.0.weight", "inner.0.bias", "scale"}
    # Tied to a parameter that is not cast.
    assert model.head.weight is model.embed.weight and model.embed.weight.dtype == torch.float32
    assert cast_model(model, torch.float32).inner[0].weight.dtype == torch.float32
    assert cast_model(Net(), keep="inner.0.*").inner[0].bias.dtype == torch.float32
    for keep, said in (("iner", "keep='iner' is no module"), (torch.nn.LSTM, "keep=LSTM is no module")):
        model = Net()
        with pytest.raises(ValueError, match=said):
            cast_model(model, keep=[keep])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ValueError, match=r"dtype=torch.float64 is not one of"):
        cast_model(Net(), torch.float64)


def test_several_optimizers():
    """Each corrects the weights that it steps, and none of these is written without its additional bits."""

    def pair(seed=0, steps=0):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({"one": torch.nn.Linear(24, 24), "two": torch.nn.Linear(24, 24)}).bfloat16()
        optimizers = [CSAdam(part.parameters(), lr=1e-3, weight_bits=24, fused=False) for part in model.values()]
        for step in range(steps):
            x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step)).bfloat16()
            model["two"](model["one"](x)).float().square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return model, optimizers

    model, optimizers = pair(steps=3)
    out = full_precision_state_dict(model, optimizers)
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            (name,) = (name for name, q in model.named_parameters() if q is p)
            wanted = decode(p.detach(), optimizer.state[p]["weight_correction.codes"].view(p.shape))
            assert torch.equal(out[name], wanted) and not torch.equal(out[name], p.float())
    for steps in (0, 2):
        other, fresh = pair(1, steps)
        load_full_precision_state_dict(other, tuple(fresh), out)
        again = full_precision_state_dict(other, fresh)
        assert all(torch.equal(out[name], again[name]) for name in out)
    with pytest.raises(ValueError, match=r"AdamW is no optimizer"):
        full_precision_state_dict(model, [optimizers[0], torch.optim.AdamW(model["two"].parameters())])


def test_a_model_that_is_not_the_optimizers_is_refused():
    model, optimizer = built(steps=1)
    average = copy.deepcopy(model)
    weights = full_precision_state_dict(model, optimizer)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    said = r"parameter 0 of group 0, of shape \(50, 24\); .* and 2 more of CSAdam: not among the tensors of this Net"
    with pytest.raises(ValueError, match=said):
        full_precision_state_dict(average, optimizer)
    with pytest.raises(ValueError, match=said):
        load_full_precision_state_dict(average, optimizer, weights)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    model, optimizer = built(None, steps=1)
    for call in (full_precision_state_dict, lambda *given: load_full_precision_state_dict(*given, weights)):
        with pytest.raises(ValueError, match="weight_bits is None in every parameter group of CSAdam"):
            call(model, optimizer)


@pytest.mark.parametrize("steps", [0, 1])
def test_nothing_is_loaded_by_halves(steps):
    """Every error is found before the first write: types, options, state that cannot be made."""
    model, optimizer = built(steps=steps)
    before = {name: value.clone() for name, value in full_precision_state_dict(model, optimizer).items()}
    good = {name: value + 1 if value.is_floating_point() else value for name, value in before.items()}
    group = optimizer.param_groups[0]

    def unchanged():
        after = full_precision_state_dict(model, optimizer)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert bool(optimizer.state) is bool(steps)

    for change, said in (
        ({"head.weight": None}, "'head.weight' is of type NoneType"),
        ({"inner.0.bias": torch.zeros(24, dtype=torch.int64)}, "'inner.0.bias' is a tensor of torch.int64"),
        ({"inner.0.bias": torch.zeros(24, device="meta")}, "'inner.0.bias' is a tensor of torch.float32 without"),
        ({"inner.0.bias": torch.zeros(24, dtype=torch.complex64)}, "'inner.0.bias' is a tensor of torch.complex64"),
        ({"count": torch.zeros(())}, "'count' is a tensor of torch.float32 in the state dict and of torch.int64"),
    ):
        with pytest.raises(ValueError, match=said):
            load_full_precision_state_dict(model, optimizer, {**good, **change})
        unchanged()
    options = {"second_moment": "nonsense"} if not steps else {"weight_bits": 32}
    kept = {name: group[name] for name in options}
    group.update(options)
    with pytest.raises(ValueError, match=next(iter(options))):
        load_full_precision_state_dict(model, optimizer, good)
    group.update(kept)
    unchanged()
    if not steps:
        last = [p for p in group["params"] if p.dtype == torch.bfloat16][-1]
        allocate = optimizer._allocate

        def fails(part, *rest):
            if part.owner is last:
                raise RuntimeError("no memory")
            return allocate(part, *rest)

        optimizer._allocate = fails
        with pytest.raises(RuntimeError, match="no memory"):
            load_full_precision_state_dict(model, optimizer, good)
        del optimizer._allocate
        unchanged()
    load_full_precision_state_dict(model, optimizer, good)


def test_one_tensor_at_a_time():
    """The device has room for one float32 tensor, not for all; a rank that keeps nothing allocates nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 512, bias=False) for _ in range(8))).bfloat16()
    optimizer = CSAdam(model.parameters(), preset="lean", weight_bits=24, fused=False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    one, peaks = 1024 * 512 * 4, []
    # The meter does not count this device, so tensors that are moved there take no memory.
    for options in ({"device": "meta"}, {"device": "meta", "whole": True, "keep": False}, {}):
        meter = AllocatorMeter()
        meter.start()
        out = full_precision_state_dict(model, optimizer, **options)
        peaks.append((meter.read() - meter.live) / one)
        assert len(out) == 8 * options.get("keep", True)
        del out
    assert peaks[0] < 1.5 and peaks[1] < 0.1 and peaks[2] > 7.9, peaks


def test_tied_weights_are_one_tensor_wherever_they_are_put():
    model, optimizer = built(steps=1)
    for device in (None, "cpu", "meta"):
        out = full_precision_state_dict(model, optimizer, device=device, whole=True)
        assert out["head.weight"] is out["embed.weight"]

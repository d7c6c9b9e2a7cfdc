"""``weight_bits``: a correction is void if other code has written the weight, and right if it has not."""

import copy
import io

import pytest
import torch

from sketch_plugins import SM3, CSAdam, InBackward, Sketchy
from sketch_plugins.kernels.weight_code import UNKNOWN, decode
from sketch_plugins.sharding.blocks import Matrix

CODES, MARK = "weight_correction.codes", "weight_correction.mark"
SHAPES = [(40, 24), (5,), ()]


def made(bits=24, shapes=SHAPES, cls=CSAdam, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    return params, cls(params, lr=1e-3, weight_bits=bits, fused=False, **options)


def train(params, optimizer, *steps):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def whole(optimizer, p):
    return decode(p.detach(), optimizer.state[p][CODES].view(p.shape))


def effective(params, optimizer):
    """The weights that the next step reads: the rate is 0, and 32 bits are exact."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(params, optimizer, 99)
    return [whole(optimizer, p).clone() for p in params]


def other(p):
    return (torch.arange(p.numel()).view(p.shape) * 0.37 - 3).to(p)


def data_(p):
    p.data = other(p)


WAYS = {
    "copy_": lambda p: p.copy_(other(p)),
    "a model's load_state_dict": lambda p: _Holder(p).load_state_dict({"p": other(p)}),
    "mul_": lambda p: p.mul_(1.25),
    "a slice": lambda p: p.view(-1)[:1].zero_(),
    "data as a whole": data_,
    "set_": lambda p: p.set_(other(p)),
    "torch.nn.init": lambda p: torch.nn.init.normal_(p),
    "_foreach": lambda p: torch._foreach_mul_([p], 0.5),
}


class _Holder(torch.nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_somebody_else_has_written_is_what_it_is(way, bits):
    params, optimizer = made(bits)
    train(params, optimizer, 0, 1)
    assert all(bool(optimizer.state[p][CODES].any()) for p in params)
    kept = whole(optimizer, params[1]).clone()
    with torch.no_grad():
        WAYS[way](params[0])
        WAYS[way](params[2])
    wanted = [params[0].detach().float().clone(), kept, params[2].detach().float().clone()]
    for got, expected in zip(effective(params, optimizer), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("cls", [CSAdam, SM3, Sketchy])
def test_steps_with_one_parameter_idle_keep_its_correction(cls):
    """Parameters without a gradient, row-sparse steps, state dicts: nothing of this writes a weight."""
    params, optimizer = made(32, [(40, 24), (40, 24)], cls)
    train(params, optimizer, 0, 1)
    kept = whole(optimizer, params[1]).clone()
    params[1].grad = None
    params[0].grad = torch.randn(40, 24).bfloat16()
    optimizer.step()
    optimizer.state_dict()
    optimizer.step()
    assert torch.equal(whole(optimizer, params[1]), kept)
    assert all(int(optimizer.state[p][MARK]) == UNKNOWN for p in params)


def test_a_swap_by_data_that_is_undone_is_none():
    """For example, averages of weights for an evaluation: before the next step the weights have the old bits again."""
    params, optimizer = made(32)
    train(params, optimizer, 0, 1)
    kept = [whole(optimizer, p).clone() for p in params]
    for p in params:
        own = p.data.clone()
        p.data.copy_(other(p))
        p.data.copy_(own)
    assert all(map(torch.equal, effective(params, optimizer), kept))


def saved(params, optimizer):
    file = io.BytesIO()
    torch.save({"model": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("bits", [24, 32])
def test_a_resumed_run_is_the_uninterrupted_one(bits, first):
    params, optimizer = made(bits)
    train(params, optimizer, 0, 1)
    checkpoint = saved(params, optimizer)
    train(params, optimizer, 2, 3)
    again, fresh = made(bits, seed=1)
    train(again, fresh, 7)  # the cache of these weights has to be dropped

    def load_model():
        with torch.no_grad():
            for p, value in zip(again, checkpoint["model"], strict=True):
                p.copy_(value)

    actions = [load_model, lambda: fresh.load_state_dict(checkpoint["optimizer"])]
    for action in actions if first == "model" else reversed(actions):
        action()
    train(again, fresh, 2, 3)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p][CODES], fresh.state[q][CODES])


def test_a_state_dict_is_loaded_with_other_weights():
    """Their fingerprints differ, so the state continues without corrections. One parameter has the saved weights."""
    params, optimizer = made(32)
    train(params, optimizer, 0, 1)
    kept = whole(optimizer, params[1]).clone()
    checkpoint = saved(params, optimizer)
    again, fresh = made(32, seed=1)
    fresh.load_state_dict(checkpoint["optimizer"])
    again[1].data.copy_(checkpoint["model"][1])
    wanted = [again[0].detach().float().clone(), kept, again[2].detach().float().clone()]
    assert all(map(torch.equal, effective(again, fresh), wanted))


def test_a_state_dict_that_is_loaded_twice_and_saved_at_once():
    params, optimizer = made(32)
    train(params, optimizer, 0, 1)
    checkpoint = saved(params, optimizer)
    again, fresh = made(32, seed=1)
    with torch.no_grad():
        for p, value in zip(again, checkpoint["model"], strict=True):
            p.copy_(value)
    fresh.load_state_dict(checkpoint["optimizer"])
    second = saved(again, fresh)
    for key, state in checkpoint["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second["optimizer"]["state"][key][name])


def test_a_copy_of_model_and_optimizer_goes_on_alike():
    params, optimizer = made(24)
    train(params, optimizer, 0, 1)
    again, fresh = copy.deepcopy((params, optimizer))
    train(params, optimizer, 2)
    train(again, fresh, 2)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p][CODES], fresh.state[q][CODES])


@pytest.mark.parametrize("cls", [CSAdam, Sketchy])
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_goes_on_with_more_bits(bits, cls, old):
    """A checkpoint without corrections, also one that is older than the option: corrections start at 0."""
    params, optimizer = made(None, cls=cls)
    train(params, optimizer, 0, 1)
    checkpoint = saved(params, optimizer)
    if old:
        del checkpoint["optimizer"]["param_groups"][0]["weight_bits"]
    again, fresh = made(bits, seed=1, cls=cls)
    with torch.no_grad():
        for p, value in zip(again, checkpoint["model"], strict=True):
            p.copy_(value)
    fresh.load_state_dict(checkpoint["optimizer"])
    assert fresh.param_groups[0]["weight_bits"] == bits
    for p, q in zip(params, again, strict=True):
        assert not bool(fresh.state[q][CODES].any()) and fresh.state[q][CODES].element_size() == bits // 8 - 2
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][name])
    train(again, fresh, 2)
    fresh.load_state_dict(fresh.state_dict())  # its mark says the new value
    train(again, fresh, 3)
    assert all(bool(fresh.state[q][CODES].any()) for q in again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_24_bits_to_32_no_weight_changes(dtype):
    params = [torch.nn.Parameter(torch.randn(40, 24).mul(2.0**-12).to(dtype))]  # half of float16's are subnormal
    optimizer = CSAdam(params, lr=1e-5, weight_bits=24, fused=False)
    train(params, optimizer, 0, 1)
    again = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = CSAdam(again, lr=1e-5, weight_bits=32, fused=False)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bool(fresh.state[again[0]][CODES].any())
    assert torch.equal(whole(fresh, again[0]), whole(optimizer, params[0]))
    kept = whole(fresh, again[0]).clone()
    if dtype == torch.bfloat16:  # of float16, 32 bits are more than a step's float32
        assert torch.equal(effective(again, fresh)[0], kept)


def test_further_bits_are_dropped_with_a_warning():
    params, optimizer = made(24)
    train(params, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    again, fresh = made(None)
    with pytest.warns(UserWarning, match=r"weight_bits=24, and group 0 .* weight_bits=None: what 3 parameters have"):
        fresh.load_state_dict(state)
    assert not any(name.startswith("weight_correction") for p in again for name in fresh.state[p])
    train(again, fresh, 1)
    assert all("weight_correction.codes" in one for one in state["state"].values())  # the caller's stays


def test_a_checkpoint_of_more_bits_is_refused():
    params, optimizer = made(32)
    train(params, optimizer, 0)
    with pytest.raises(ValueError, match="weight_bits=32, but group 0 of this CSAdam has weight_bits=24"):
        made(24)[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="weight_bits=16 is not one of None, 24, 32"):
        made(16)
    # One that says so of its group, and lacks them.
    state = optimizer.state_dict()
    for one in state["state"].values():
        del one[CODES], one[MARK]
    with pytest.raises(ValueError, match=r"expected .*weight_correction"):
        made(32)[1].load_state_dict(state)


def test_float32_parameters_are_left_alone():
    norm = torch.nn.Parameter(torch.ones(8))
    weight = torch.nn.Parameter(torch.randn(40, 24).bfloat16())
    optimizer = CSAdam([norm, weight], weight_bits=24, fused=False)
    train([norm, weight], optimizer, 0)
    assert CODES not in optimizer.state[norm] and CODES in optimizer.state[weight]


def test_an_optimizer_without_half_precision_says_so_once(recwarn):
    params = [torch.nn.Parameter(torch.ones(8))]
    optimizer = CSAdam(params, weight_bits=24, fused=False)
    optimizer.state_dict()  # which looks at the corrections, too
    train(params, optimizer, 0, 1)
    (warning,) = recwarn
    assert "weight_bits=24 has no effect" in str(warning.message) and "torch.float32" in str(warning.message)


def test_steps_in_backward_look_at_all_parameters(recwarn):
    """The first parameter that takes its step is in float32, and the other is not."""
    norm = torch.nn.Parameter(torch.ones(24))
    weight = torch.nn.Parameter(torch.randn(40, 24).bfloat16())
    optimizer = CSAdam([{"params": []}, {"params": [norm]}, {"params": [weight]}], weight_bits=24, fused=False)
    InBackward(optimizer)
    for _ in range(2):
        (weight.float().sum() + norm.sum()).backward()
        optimizer.step()
    assert CODES in optimizer.state[weight] and not recwarn.list
    # Groups without parameters say nothing, of whatever dtype those will be that come later.
    empty = CSAdam([{"params": []}], weight_bits=24, fused=False)
    empty.step()
    assert not recwarn.list


class Quantized(torch.Tensor):
    """A weight that keeps 8 bits and a scale, and says that it is bfloat16."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def numbers(self):
        return (self.codes * self.scale).bfloat16()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func is torch.ops.aten.clone.default:
            return cls(args[0].codes.clone(), args[0].scale)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].codes.copy_((args[1].float() / args[0].scale).round().clamp(-127, 127))
            return args[0]
        plain = [a.numbers() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_weights_that_compute_their_numbers_have_no_corrections(recwarn):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-100, 100, (40, 24), dtype=torch.int8, generator=generator)
    quantized = torch.nn.Parameter(Quantized(codes, 0.01))
    weight = torch.nn.Parameter(torch.randn(40, 24, generator=generator).bfloat16())
    optimizer = CSAdam([("packed", quantized), ("plain", weight)], lr=0.1, weight_bits=24, fused=False)
    before = codes.clone()
    for _ in range(2):
        for p in (quantized, weight):
            p.grad = torch.randn(40, 24, generator=generator).bfloat16()
        optimizer.step()
    assert not torch.equal(before, quantized.codes)
    assert CODES not in optimizer.state[quantized] and CODES in optimizer.state[weight]
    said = [str(warning.message) for warning in recwarn if "weight_bits" in str(warning.message)]
    assert len(said) == 1 and "weight_bits=24 has no effect on parameter 'packed'" in said[0]


def test_a_state_dict_keeps_its_fingerprints_until_a_step():
    """It has the optimizer's own tensors, and other code that reads the corrections must not change them."""
    params, optimizer = made(32)
    train(params, optimizer, 0, 1)
    state = optimizer.state_dict()
    marks = [int(one[MARK]) for one in state["state"].values()]
    assert UNKNOWN not in marks
    for _ in range(2):
        optimizer._check_weights()
        optimizer.state_dict()
    assert marks == [int(one[MARK]) for one in state["state"].values()]
    # Loaded, too: looking at the corrections is no step.
    fresh = made(32)[1]
    fresh.load_state_dict(state)
    fresh._check_weights()
    train(params, optimizer, 2)  # the state dict's tensors are those of the next step now, for good
    assert all(int(one[MARK]) == UNKNOWN for one in state["state"].values())
    loaded = [int(fresh.state[p][MARK]) for p in fresh.param_groups[0]["params"]]
    assert loaded == [UNKNOWN] * 3  # its weights are others, and the corrections 0


@pytest.mark.parametrize("model_first", [False, True])
def test_a_checkpoint_that_is_read_into_the_tensors_of_a_state_dict(model_first):
    """torch.distributed.checkpoint does this, and takes a state dict once more before it is loaded."""
    params, optimizer = made(24)
    train(params, optimizer, 0, 1)
    checkpoint = saved(params, optimizer)
    again, fresh = made(24, seed=1)
    train(again, fresh, 7)
    state = fresh.state_dict()

    def read_weights():
        with torch.no_grad():
            for p, value in zip(again, checkpoint["model"], strict=True):
                p.copy_(value)

    def read_state():
        for key, one in checkpoint["optimizer"]["state"].items():
            for name, value in one.items():
                state["state"][key][name].copy_(value)

    for read in (read_weights, read_state) if model_first else (read_state, read_weights):
        read()
    fresh.state_dict()
    fresh.load_state_dict(state)
    train(params, optimizer, 2)
    train(again, fresh, 2)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q) and torch.equal(optimizer.state[p][CODES], fresh.state[q][CODES])
    # The state alone, whose weights are others than those that were there: void, though no weight was written.
    again, fresh = made(24, seed=1)
    train(again, fresh, 7)
    state = fresh.state_dict()
    read_state()
    train(again, fresh, 8)
    assert all(torch.equal(whole(fresh, p).bfloat16(), p) for p in again)


def test_who_writes_weights_in_each_step_is_told_by_steps_in_backward_too(recwarn):
    weights = [torch.nn.Parameter(torch.randn(40, 24).bfloat16()) for _ in range(3)]
    optimizer = CSAdam([(f"layer{i}", p) for i, p in enumerate(weights)], lr=1e-3, weight_bits=24, fused=False)
    InBackward(optimizer)
    for _ in range(6):
        sum(p.float().square().sum() for p in weights).backward()
        optimizer.step()
        with torch.no_grad():
            weights[1].clamp_(-2, 2)
        optimizer.state_dict()  # a reader in between does not count as a step
    (warning,) = recwarn
    assert "'layer1'" in str(warning.message) and "nn.Embedding(max_norm=...)" in str(warning.message)


def test_who_writes_weights_in_each_step_is_told_once(recwarn, caplog):
    torch.manual_seed(0)
    embed = torch.nn.Embedding(50, 24, max_norm=1.0).bfloat16()
    clamped = torch.nn.Parameter(torch.randn(40, 24).bfloat16())
    left = torch.nn.Parameter(torch.randn(24).bfloat16())
    named = [("embed.weight", embed.weight), ("clamped", clamped), ("left", left)]
    optimizer = CSAdam(named, lr=1e-3, weight_bits=24, fused=False)
    with caplog.at_level("INFO", logger="sketch_plugins"):
        for step in range(8):
            (embed(torch.arange(50)).float() @ left.float()).sum().backward()
            clamped.grad = torch.randn_like(clamped)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                clamped.clamp_(-2, 2)
            assert len(recwarn.list) == (step >= 3)
    said = str(recwarn.list[0].message)
    assert "'embed.weight'" in said and "'clamped'" in said and "'left'" not in said and "max_norm" in said
    logged = [record.getMessage() for record in caplog.records if "something wrote the weights" in record.getMessage()]
    assert len(logged) == 14 and not any("'left'" in line for line in logged)


def test_one_who_writes_weights_now_and_then_is_not_told(recwarn):
    params, optimizer = made(24)
    for step in range(8):
        train(params, optimizer, step)
        if step % 3:
            with torch.no_grad():
                params[0].clamp_(-2, 2)
    assert not recwarn.list


def test_nothing_that_a_graph_would_repeat_is_captured():
    """The conditions for a capture; whether replays agree can only be tested on a GPU."""
    params, optimizer = made(24)
    train(params, optimizer, 0, 1)
    written, parts = optimizer._written, lambda: optimizer._parts_with_state(optimizer.param_groups)
    optimizer.state_dict()
    written.check(parts(), optimizer._label_of, stepping=True, capturing=True)
    assert all(int(optimizer.state[p][MARK]) == UNKNOWN for p in params)  # as each replay leaves them
    kept = optimizer.state[params[1]][CODES].clone()
    with torch.no_grad():
        params[1].mul_(2)
    with pytest.raises(ValueError, match=r"captured in a CUDA graph, but the weights of parameter 1 of group 0"):
        written.check(parts(), optimizer._label_of, stepping=True, capturing=True)
    assert torch.equal(kept, optimizer.state[params[1]][CODES])
    train(params, optimizer, 2)
    written.check(parts(), optimizer._label_of, stepping=True, capturing=True)


def test_a_step_that_fails_leaves_the_corrections():
    params, optimizer = made(32)
    train(params, optimizer, 0, 1)
    kept = [whole(optimizer, p).clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    assert all(map(torch.equal, effective(params, optimizer), kept))


def test_a_step_that_fails_half_way_leaves_no_correction_of_another_weight(monkeypatch):
    """Small parameters are unchanged, those that have stepped have new values; a large one keeps its stored bits."""
    shapes = [(40, 24), (200, 90), (30,)]
    params, optimizer = made(32, shapes, chunk_size=4096)
    train(params, optimizer, 0, 1)
    others, reference = made(32, shapes, chunk_size=4096)
    train(others, reference, 0, 1, 2)
    kept, put, calls = whole(optimizer, params[2]).clone(), Matrix.put, []

    def fails(self, at, value):
        if self.tensor.shape == (200, 90):
            calls.append(at)
            if len(calls) == 3:
                raise RuntimeError("a device that is gone")
        put(self, at, value)

    monkeypatch.setattr(Matrix, "put", fails)
    with pytest.raises(RuntimeError, match="a device that is gone"):
        train(params, optimizer, 2)
    monkeypatch.undo()
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 2, 2]
    wanted = [whole(reference, others[0]).clone(), params[1].detach().float().clone(), kept]
    assert all(map(torch.equal, effective(params, optimizer), wanted))

"""``weight_bits``: a correction is void where somebody else has written the weight, and right where nobody has."""

import copy
import io

import pytest
import torch

from sketch_plugins import SM3, CSAdam, Sketchy
from sketch_plugins.kernels.weight_code import UNKNOWN, decode

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
    """What the next step reads: the rate is 0, and 32 bits are exact."""
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
    """Parameters without a gradient, row-sparse steps, state dicts that are taken: nobody has written a weight."""
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
    """As averages of weights are put in for an evaluation: the same bits are there again before the next step."""
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
    train(again, fresh, 7)  # what is remembered of it has to be forgotten

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
    """Their fingerprints differ: the state goes on, without corrections. One parameter's weights are the saved ones."""
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


def test_a_checkpoint_of_other_bits_is_refused():
    params, optimizer = made(24)
    train(params, optimizer, 0)
    state = optimizer.state_dict()
    for bits in (None, 32):
        _, fresh = made(bits)
        with pytest.raises(ValueError, match=f"weight_bits=24, but group 0 of this CSAdam has weight_bits={bits}"):
            fresh.load_state_dict(state)
    # One that is older than the option.
    _, before = made(None)
    train(before.param_groups[0]["params"], before, 0)
    state = before.state_dict()
    del state["param_groups"][0]["weight_bits"]
    with pytest.raises(ValueError, match="weight_bits=None, but group 0 of this CSAdam has weight_bits=24"):
        made(24)[1].load_state_dict(state)
    made(None)[1].load_state_dict(state)
    with pytest.raises(ValueError, match="weight_bits=16 is not one of None, 24, 32"):
        made(16)


def test_float32_parameters_are_left_alone():
    norm = torch.nn.Parameter(torch.ones(8))
    weight = torch.nn.Parameter(torch.randn(40, 24).bfloat16())
    optimizer = CSAdam([norm, weight], weight_bits=24, fused=False)
    train([norm, weight], optimizer, 0)
    assert CODES not in optimizer.state[norm] and CODES in optimizer.state[weight]


def test_an_optimizer_without_half_precision_says_so_once(recwarn):
    params = [torch.nn.Parameter(torch.ones(8))]
    optimizer = CSAdam(params, weight_bits=24, fused=False)
    train(params, optimizer, 0, 1)
    (warning,) = recwarn
    assert "weight_bits=24 has no effect" in str(warning.message) and "torch.float32" in str(warning.message)


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

"""The line of an optimizer's first step: its text, its logger, how often it comes, and its cost if it is not shown."""

import copy
import logging
import re

import pytest
import torch

from sketch_plugins import CSAdam, InBackward, plan, registry, state_report
from sketch_plugins.optim import introduction
from sketch_plugins.sharding.names import NAMES, name_parameters

NAME = "sketch_plugins.optim.introduction"


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(70, 300), torch.nn.Tanh(), torch.nn.Linear(300, 20))


def train(net, optimizer, steps=3):
    for _ in range(steps):
        net(torch.randn(4, 70)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, NAME)
    return lambda: [record.getMessage() for record in caplog.records if record.name == NAME]


def test_once_and_the_figures_are_those_of_the_report(name, lines):
    net = network()
    optimizer = registry.get(name).cls(net.parameters())
    train(net, optimizer, 3)
    (said,) = lines()
    report = state_report(optimizer)
    assert said.startswith(f"{type(optimizer).__name__}: {report.bytes_per_param:.3g} bytes of state a parameter")
    assert f"for {report.params:,} parameters)" in said and "on this rank" not in said
    (saved,) = re.findall(r"([\d.]+) % saved against AdamW", said)
    assert float(saved) == pytest.approx(100 * report.saved_bytes / report.adamw_bytes, abs=0.051)
    assert said.endswith(f"; learning rate {optimizer.defaults['lr']:g}")
    train(net, copy.deepcopy(optimizer), 1)  # its parameters have no gradient: nothing changes, but it has state
    assert len(lines()) == 2


def test_small_tensors_save_nothing_and_say_why(lines):
    net = network()
    train(net, CSAdam(net.parameters(), min_compress_size=10**6))
    (said,) = lines()
    assert "8 bytes of state a parameter" in said and "0 % saved against AdamW (100 % of them are in vectors" in said
    assert "fewer than min_compress_size=1000000 elements, which are kept exactly)" in said


def test_more_than_adamw_is_said(lines):
    net = network().bfloat16()
    optimizer = CSAdam(net.parameters(), preset="exact")
    net(torch.randn(4, 70, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    (said,) = lines()
    assert said.startswith("CSAdam (preset exact): 8 bytes") and "100 % more than AdamW" in said


def test_rates_of_groups_and_schedules(lines):
    net = network()
    groups = [{"params": net[0].parameters(), "lr": 1e-3}, {"params": net[2].parameters(), "lr": 5e-3}]
    optimizer = CSAdam(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    train(net, optimizer)
    assert lines()[0].endswith("learning rate 0 (0.001 to 0.005 before its schedule)")


def test_nothing_is_computed_where_nobody_listens(caplog, monkeypatch):
    """Neither at the first step nor later, when INFO is turned on."""
    caplog.set_level(logging.WARNING, NAME)
    asked = []
    held = CSAdam.held
    monkeypatch.setattr(CSAdam, "held", lambda self: asked.append(self) or held(self))
    net = network()
    optimizer = CSAdam(net.parameters())
    train(net, optimizer, 1)
    caplog.set_level(logging.INFO, NAME)
    train(net, optimizer, 2)
    assert asked == [] and not [r for r in caplog.records if r.name == NAME]


def test_later_steps_do_not_ask(lines, monkeypatch):
    net = network()
    optimizer = CSAdam(net.parameters())
    asked = []
    monkeypatch.setattr("sketch_plugins.optim.base.introduce", lambda o: asked.append(o) or introduction.introduce(o))
    optimizer.step()  # no gradients, no state
    train(net, optimizer, 4)
    assert len(asked) == 2 and len(lines()) == 1


def test_steps_in_backward(lines):
    net = network()
    optimizer = CSAdam(net.parameters())
    InBackward(optimizer)
    train(net, optimizer)
    (said,) = lines()
    report = state_report(optimizer)
    assert not report.planned and f"for {report.params:,} parameters" in said


def test_a_plan_says_nothing(lines):
    net = network()
    sample, loss = (lambda size: torch.zeros(size, 70)), (lambda model, batch: model(batch).sum())
    plan(net, sample=sample, loss=loss, batch_size=2, optimizers="cs_adam", device="cpu", precision="fp32")
    assert lines() == []


def test_a_rank_other_than_the_first_is_silent(lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    net = network()
    train(net, CSAdam(net.parameters()))
    assert lines() == []


@pytest.mark.parametrize("value", ["auto", True])
def test_skipped_rows_are_said_once(value, lines):
    net = network()
    optimizer = CSAdam(net.parameters(), row_sparse=value)
    train(net, optimizer)
    (_, said) = lines()
    assert said.startswith(f"CSAdam: row_sparse={value!r}: ") and "learning is much slower" in said
    assert "1.90" in said and "0.12" in said


def test_a_framework_says_it_elsewhere(lines):
    net, other = network(), logging.getLogger("tests.of.a.framework")
    optimizer = CSAdam(net.parameters())
    found = logging.Handler()
    records = []
    found.emit = records.append
    other.addHandler(found)
    other.setLevel(logging.INFO)
    try:
        introduction.hand_over(optimizer, lambda: other)
        train(net, optimizer)
    finally:
        other.removeHandler(found)
    assert len(records) == 1 and lines() == []
    introduction.hand_over(torch.optim.SGD(net.parameters()), lambda: other)  # not ours: nothing happens


def test_names_of_a_model(tmp_path):
    net = network()
    optimizer = CSAdam([{"params": [net[0].weight, net[2].weight]}, {"params": [net[0].bias, net[2].bias]}])
    assert [p.name for p in state_report(optimizer).parameters] == ["0.0", "0.1", "1.0", "1.1"]
    names = ["0.weight", "2.weight", "0.bias", "2.bias"]
    assert [p.name for p in state_report(optimizer, net).parameters] == names
    adamw = torch.optim.AdamW(optimizer.param_groups[0]["params"])
    assert [p.name for p in state_report(adamw, net).parameters] == names[:2]
    name_parameters(optimizer, net)
    assert [p.name for p in state_report(optimizer).parameters] == names
    assert [one.name for one in optimizer._parts.originals] == names
    net[2].weight.grad = torch.zeros_like(net[2].weight).to_sparse()
    with pytest.raises(ValueError, match=re.escape("parameter '2.weight' of shape (20, 300)")):
        optimizer.step()
    # They are part of state dicts, demand nothing, and are ignored if there are more parameters than names.
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    saved = torch.load(tmp_path / "o.pt", weights_only=True)
    assert saved["param_groups"][1][NAMES] == names[2:]
    for group in saved["param_groups"]:
        del group[NAMES]
    optimizer.load_state_dict(saved)  # a state dict from before names existed
    assert optimizer.param_groups[1][NAMES] == names[2:]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    optimizer.param_groups[1]["params"].append(torch.nn.Parameter(torch.zeros(3)))
    assert [p.name for p in state_report(optimizer).parameters][2:] == ["1.0", "1.1", "1.2", "2.0"]
    named = CSAdam(net.named_parameters())
    name_parameters(named, net)
    assert NAMES not in named.param_groups[0]


def test_a_model_that_is_none():
    with pytest.raises(
        TypeError, match=r"state_report needs a torch\.nn\.Module as model, to take names from it, not list"
    ):
        state_report(CSAdam(network().parameters()), [])


def test_no_state_before_a_first_step_of_another_optimizer():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    said = str(state_report(optimizer))
    assert "AdamW: there is no state before its first step" in said and "100.0%" not in said
    train(net, optimizer, 1)
    assert "no state" not in str(state_report(optimizer)) and "0.0%" in str(state_report(optimizer))
    assert "state to be allocated" in str(state_report(CSAdam(net.parameters())))

"""Warnings name the line of the program, with any number of our frames and of torch's in between."""

import inspect
import warnings

import pytest
import torch

from sketch_plugins import CSAdam, InBackward
from sketch_plugins.notices import warn


def odd(**options):
    """An optimizer with a parameter that no kernel supports; it warns of this in each step."""
    pytest.importorskip("numba", reason="Numba is not installed")
    p = torch.nn.Parameter(torch.zeros(300, 300, dtype=torch.float64))
    p.grad = torch.ones_like(p)
    return p, CSAdam([p], fused=True, **options)


def by_step(p, optimizer):
    optimizer.step()


def by_a_scheduler(p, optimizer):
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step()


def by_a_hook(p, optimizer):
    optimizer.register_step_pre_hook(lambda *_: None)
    optimizer.step(lambda: 1.0)


def by_backward(p, optimizer):
    p.grad = None
    InBackward(optimizer)
    p.sum().backward()


@pytest.mark.parametrize("way", [by_step, by_a_scheduler, by_a_hook, by_backward])
def test_the_line_is_the_programs(way):
    p, optimizer = odd()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        way(p, optimizer)
    (one,) = [w for w in found if "takes eager steps" in str(w.message)]
    lines, first = inspect.getsourcelines(way)
    assert one.filename == __file__ and first < one.lineno < first + len(lines)
    assert (p != 0).all()


def test_once_for_a_line():
    """Like `warnings.warn`, under Python's default filter."""
    p, optimizer = odd()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        optimizer.step()
    assert len([w for w in found if "takes eager steps" in str(w.message)]) == 2


def test_the_category():
    with pytest.warns(RuntimeWarning, match="^said$") as found:
        warn("said", RuntimeWarning)
    assert found[0].filename == __file__

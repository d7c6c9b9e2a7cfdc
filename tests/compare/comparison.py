"""One generated case: the same training on a fused backend and by the eager definition, compared after every step.

The definition is ``fused=False``. Before each step both optimizers hold the same bits (parameters and state), so that
one step is compared, not the growth of rounding differences over many. Beside the two there are

* a *twin* of the fused optimizer, which has to give its bits exactly, and
* two *probes*: the definition with inputs that differ by a few units in the last place. Their differences are the
  conditioning of the step, element by element, and determine the tolerance: two correct implementations round their
  intermediate results differently, which is equivalent to a few units in the last place of the inputs.

If no kernel took part in a step (the kernels refused it, and the eager path ran), the bits have to be the same.
"""

import contextlib
import copy
import importlib
import math
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from interpreter import patch_once

from sketch_plugins import registry
from sketch_plugins.kernels.weight_code import decode
from sketch_plugins.optim import resolved
from sketch_plugins.optim.sketchy.stack import Stack
from sketch_plugins.optim.step_cache import StepCache
from sketch_plugins.sharding.state_names import kind_of
from sketch_plugins.stores.log8 import CUT, INFINITE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Relative change of a probe's inputs, in units in the last place of the arithmetic dtype. 8 of them are clearly larger
# than the rounding of the probe itself.
PROBE = 8
# The tolerance is this many times the largest change of a probe ...
CONDITION = 6
# ... and so many units in the last place of the result. Sums of squares of some thousand float32 numbers, added in
# another order, differ by about 20 of them.
UNITS = 48
# Below this, numbers are subnormal or become so in a product, and a kernel may round them to anything.
TINY = 1e-36
# Allowed share of the numbers of a tensor that are rounded to the other neighbour (codes, bfloat16, stochastic
# rounding): those whose unrounded values lie within the tolerance of a boundary. Unrounded values differ by a few units
# of 2**-24, and there is a boundary every 2**-8, so this is less than one in a thousand. Small tensors may have a few.
FLIPS, FEW_FLIPS = 0.01, 3
# The same for weights of 24 bits, whose neighbours differ by 2**-15 of the number: 20 units of 2**-23 lead to another
# one in 8 % of the cases, and other noise leads to another one in a third.
OTHER_NOISE = 0.2


class Different(AssertionError):
    """A backend computes something different from the definition."""


# -- backends ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def using(backend):
    """``fused=True`` on a CPU means this backend's kernels: "numba" or "triton" (interpreted)."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if backend == "triton" else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


# Triton decides when it is imported whether its kernels are interpreted; there may be none on this platform.
HAS_TRITON = not torch.cuda.is_available()
if HAS_TRITON:
    try:
        with using("triton"):
            importlib.import_module("sketch_plugins.kernels.gpu.launch")
            patch_once(importlib.import_module("triton.runtime.interpreter"))
    except ImportError:
        HAS_TRITON = False


@contextlib.contextmanager
def counted(taken):
    """Count the steps of single parameters that kernels take, in ``taken``."""
    choose, recall, recall_group = resolved.choose, StepCache.recall, StepCache.recall_group
    prepare = Stack.prepare

    def choosing(*args, **kwargs):
        out = choose(*args, **kwargs)
        taken["kernel" if out[0] is not None else "eager"] += 1
        return out

    def recalling(self, *args, **kwargs):
        out = recall(self, *args, **kwargs)
        taken["kernel"] += out
        return out

    def recalling_group(self, again, given, *args, **kwargs):
        out = recall_group(self, again, given, *args, **kwargs)
        taken["kernel"] += len(given) * out
        return out

    def preparing(self):
        prepare(self)
        taken["kernel" if self.taken else "eager"] += len(self.members)

    resolved.choose, StepCache.recall, StepCache.recall_group = choosing, recalling, recalling_group
    Stack.prepare = preparing
    try:
        yield
    finally:
        resolved.choose, StepCache.recall, StepCache.recall_group = choose, recall, recall_group
        Stack.prepare = prepare


# -- tensors ----------------------------------------------------------------------------------------------------------


def generator(*numbers):
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def laid_out(x, layout):
    """The same numbers in another layout; ``contiguous`` if the tensor has no such layout."""
    if layout == "transposed" and x.ndim == 2:
        return x.t().contiguous().t()
    if layout == "reversed" and x.ndim > 1:  # all axes in memory in the other order
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "gaps" and x.ndim > 0:  # between rows
        room = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=x.dtype)
        out = room[..., 2 : 2 + x.shape[-1]]
        out.copy_(x)
        return out
    if layout == "every_other" and x.ndim > 0:  # between the numbers of a row
        room = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
        out = room[..., ::2]
        out.copy_(x)
        return out
    if layout == "offset":
        room = torch.full((x.numel() + 3,), 7.0, dtype=x.dtype)
        out = room[1 : 1 + x.numel()].view(x.shape)
        out.copy_(x)
        return out
    return x.contiguous().clone()


def values(kind, shape, generator, dtype):
    """Numbers of a gradient, in float32 (float64 parameters: float64)."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    half = dtype == torch.float16  # ends at 65504
    if kind == "zero":
        x = torch.zeros_like(x)
    elif kind == "small":
        x = x * 1e-3
    elif kind == "large":
        x = x * 100
    elif kind == "huge":
        x = x * (1e4 if half else 1e18)
    elif kind == "tiny":
        x = x * (1e-6 if half else 1e-25)
    elif kind == "integers":
        x = (2 * x).round()
    elif kind == "signs":
        x = x.sign()
    elif kind == "scales":  # each row has a scale of its own
        shape = (x.shape[0], *[1] * (x.ndim - 1)) if x.ndim else ()
        x = x * 10.0 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 5 - 4)
    elif kind == "rows" and x.ndim:
        keep = torch.rand(x.shape[0], generator=generator) < 0.3
        x = x * keep.view(-1, *[1] * (x.ndim - 1))
    elif kind == "single" and x.numel():
        flat = torch.zeros_like(x).view(-1)
        flat[int(torch.randint(x.numel(), (), generator=generator))] = 1.0
        x = flat.view(x.shape)
    elif kind in ("nan", "inf", "-inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=generator))] = float(kind)
    return x


def gradient(spec, p, generator):
    """The gradient that a step's ``spec`` describes; None if there is none."""
    kind, layout = spec["kind"], spec.get("layout", "contiguous")
    if kind == "none":
        return None
    dtype = DTYPES[spec["dtype"]] if spec.get("dtype") else p.dtype
    x = values(kind, tuple(p.shape), generator, dtype).to(dtype)
    if layout.startswith("sparse"):
        if p.ndim == 0:
            return x
        rows = torch.randperm(p.shape[0], generator=generator)[: -(-p.shape[0] // 3)]
        if layout == "sparse_empty":
            rows = rows[:0]
        if layout == "sparse_repeated":
            rows = torch.cat([rows, rows[:2], rows[:1]])
        return torch.sparse_coo_tensor(rows.unsqueeze(0), x[rows], x.shape, check_invariants=True)
    if layout == "negative":
        return torch._neg_view(x)
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.ndim and len(x) else x
    return laid_out(x, layout)


def nudged(x, units, generator, sign=None):
    """Each number changed by ``units`` in the last place of its arithmetic dtype, up or down at random."""
    step = units * 2.0 ** (-52 if x.dtype == torch.float64 else -23)
    way = torch.randint(2, x.shape, generator=generator, dtype=torch.int8).to(x.dtype) * 2 - 1
    return x * (1 + step * way * (1 if sign is None else sign))


# -- optimizers -------------------------------------------------------------------------------------------------------


def plain(value):
    """Options as the optimizer takes them: ``("tensor", 0.1)`` is a learning rate that is a tensor."""
    return torch.tensor(value[1], dtype=torch.float32) if isinstance(value, tuple) and value[0] == "tensor" else value


class Run:
    """One optimizer with parameters of its own."""

    def __init__(self, case, backend, fused, capturable=False, like=None):
        self.case, self.backend = case, backend
        self.own = {"fused": fused, **({"capturable": True} if capturable else {})}
        self.params = []
        if like is None:
            for number, spec in enumerate(case["tensors"]):
                dtype = DTYPES[spec["dtype"]]
                x = torch.randn(spec["shape"], generator=generator(case["seed"], number), dtype=torch.float64)
                p = torch.nn.Parameter(laid_out(x.to(dtype), spec.get("layout", "contiguous")))
                self.params.append(p)
        else:
            self.params = like.params
        for p in self.params:
            if hasattr(p, "grad_dtype"):  # torch 2.9: a gradient may have another dtype
                p.grad_dtype = None
        self.optimizer = self.made()
        for group, options in zip(self.optimizer.param_groups, case["groups"], strict=True):
            assert all(name in group for name in options)

    def made(self):
        groups = []
        for number, options in enumerate(self.case["groups"]):
            members = [p for p, s in zip(self.params, self.case["tensors"], strict=True) if s["group"] == number]
            groups.append({"params": members, **{name: plain(value) for name, value in options.items()}})
        options = {name: plain(value) for name, value in self.case["options"].items()}
        with using(self.backend):
            own = {**self.own}
            return registry.get(self.case["optimizer"]).cls(groups, **{**options, **own})

    def change(self, number, options):
        self.optimizer.param_groups[number].update({name: plain(value) for name, value in options.items()})

    def step(self, taken=None):
        """The error of the step, if there was one."""
        with using(self.backend), warnings.catch_warnings(), counted(Counter() if taken is None else taken):
            warnings.simplefilter("ignore")
            try:
                self.optimizer.step()
            except ValueError as error:
                return str(error)
        return None

    def tensors(self):
        """Name -> tensor of all parameters and their state."""
        out = {}
        for number, p in enumerate(self.params):
            out[number, "parameter"] = p.data
            state = self.optimizer.state.get(p, {})
            # The mark is made for state dicts only.
            out.update({(number, name): tensor for name, tensor in state.items() if name != MARK})
        return out

    def snapshot(self):
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def take(self, tensors, what):
        """Copy in place, as a training run leaves its tensors where they are."""
        mine = self.tensors()
        if set(mine) != set(tensors):
            raise Different(f"{what}: state {sorted(set(mine) ^ set(tensors))} is only on one side")
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
        for p in self.params:
            if MARK in self.optimizer.state.get(p, {}):  # it belongs to the weights that these have replaced
                self.optimizer.state[p][MARK].zero_()

    def reload(self, saved):
        """A new optimizer for the same parameters, from a state dict of another one."""
        groups = [dict(group) for group in self.optimizer.param_groups]
        fresh = self.made()
        with using(self.backend):
            fresh.load_state_dict(copy.deepcopy(saved))
        for group, before in zip(fresh.param_groups, groups, strict=True):
            group.update({name: before[name] for name in ("fused", "capturable", "compile") if name in before})
        self.optimizer = fresh


# -- what is compared -------------------------------------------------------------------------------------------------


def bits(tensor):
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def spacing(x, dtype):
    """Distance to the next number of a dtype."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().clamp(min=info.smallest_normal))[1]
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


CODES, MARK = "weight_correction.codes", "weight_correction.mark"


def corrected(tensors, index):
    """The weights of a parameter with the bits beyond its dtype."""
    p = tensors[index, "parameter"]
    return decode(p, tensors[index, CODES].view(p.shape))


def check(name, ours, definition, probes, before, arithmetic, flips, where, corrected=None, mixes=False):
    """Raise `Different` unless a tensor equals the definition's up to rounding (see the top of this file).

    ``corrected``: dtype and bits of weights that are compared by the numbers that they represent, and whether
    numbers that are rounded to the other neighbour are counted. ``mixes``: products with eigenvectors mix the rounding
    of all numbers, and two probes may miss how much of it reaches one of them.
    """
    if ours.shape != definition.shape or ours.dtype != definition.dtype:
        raise Different(f"{where}: {tuple(ours.shape)} {ours.dtype} and {tuple(definition.shape)} {definition.dtype}")
    if same_bits(ours, definition):
        return
    a, b = ours.double(), definition.double()
    inputs = [probe.double() for probe in probes]
    condition = torch.zeros_like(b)
    steady = torch.ones_like(b, dtype=torch.bool)  # whether probes agree with the definition on what is finite
    for x in inputs:
        steady &= x.isfinite() == b.isfinite()
        condition = torch.maximum(condition, (x - b).abs().nan_to_num(0.0, 0.0))
    if ours.dtype == torch.int8:
        # If the number lies half-way between two codes, either is right: they differ by one scale.
        moved = (a - b).abs()
        wrong = steady & (moved > 1 + condition)
        flipped = (moved > 0) & (condition == 0)
    else:
        # Infinity and NaN count as equal: torch's lerp makes NaN of an infinite average, where ``decay * m + gain * g``
        # stays infinite. But both tensors have to be finite at the same places.
        odd = a.isfinite() != b.isfinite()
        if ours.dtype == torch.float16:  # the two sides of the largest number
            odd &= ~((a.abs() > 65000) & (b.abs() > 65000))
        a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        condition = condition.nan_to_num(math.inf)
        unit = 2.0**-52 if arithmetic == torch.float64 else 2.0**-23
        mixed = torch.maximum(condition, condition.square().mean().sqrt()) if mixes else condition
        tolerance = CONDITION * mixed + UNITS * unit * (b.abs() + before) + TINY
        difference = (a - b).abs()
        flipped = torch.zeros_like(odd)
        if corrected is not None:
            dtype, bits, counted = corrected
            large = torch.maximum(a.abs(), b.abs()) > torch.finfo(dtype).max
            odd &= ~large  # the two sides of the largest number, as below
            if dtype == torch.float16:
                odd &= ~((a.abs() > 65000) & (b.abs() > 65000))
                tolerance = tolerance + 2.0 ** (-32 if bits == 24 else -40)
            if bits == 24:  # the noise decides between neighbours, 8 bits beyond the dtype's own
                tolerance = tolerance + spacing(torch.maximum(a.abs(), b.abs()), dtype) / 2**8
                other = int(((difference > 0) & (condition == 0)).sum())
                if counted and other > FEW_FLIPS + OTHER_NOISE * odd.numel():
                    raise Different(f"{where}: {other} of {odd.numel()} numbers are rounded as by another noise")
        if ours.dtype in (torch.bfloat16, torch.float16):
            step = spacing(torch.maximum(a.abs(), b.abs()), ours.dtype)
            flipped = (difference > 0) & (condition == 0) & (tolerance < step / 16)
            tolerance = tolerance + step
        wrong = steady & (odd | (difference > tolerance))
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise Different(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {place}: "
            f"{ours[place].item()!r}, by the definition {definition[place].item()!r} (probes "
            f"{[probe[place].item() for probe in probes]})"
        )
    if flips and int(flipped.sum()) > FEW_FLIPS + FLIPS * flipped.numel():
        raise Different(
            f"{where}: {int(flipped.sum())} of {flipped.numel()} numbers are rounded to the other neighbour than by "
            "the definition"
        )


def check_covariance(name, ours, definition, probes, tensors, wanted, where):
    """A tensor of a preconditioner has to be as good as the definition's, relative to the covariance's weights.

    Kernels compute the inputs. The decomposition itself is torch's on both sides. It returns any eigenvectors for
    eigenvalues that are close together, so these are only compared as orthonormal.
    """
    index, what = name
    if same_bits(ours, definition):
        return
    a, b = ours.double(), definition.double()
    if not bool(b.isfinite().all()) or not all(bool(probe.isfinite().all()) for probe in probes):
        return
    condition = max((float((probe.double() - b).abs().max()) for probe in probes), default=0.0)
    if ".vectors_" in what:
        found, right = ((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).abs().max() for x in (a, b))
        if found > 1e-3 + 2 * right:
            raise Different(f"{where}: not orthonormal by {float(found)}, of the definition by {float(right)}")
        own, other = (mine[index, what.replace("vectors", "values")].double() for mine in (tensors, wanted))
        apart = ((a * own.unsqueeze(-2)) @ a.mT - (b * other.unsqueeze(-2)) @ b.mT).abs().amax((-2, -1))
        # If two directions have nearly the same weight, rounding decides which one is kept last.
        if not bool((apart <= 2.5 * other.amin(-1) + 1e-3 * other.amax(-1) + TINY).all()):
            raise Different(f"{where}: the covariance is {apart.tolist()} from the definition's")
        return
    trace = what.replace(what.split(".")[1].split("_")[0], "trace", 1)
    size = max(float(b.abs().max()), float(wanted[index, trace].abs().max()) if ".buffer" not in what else 0.0)
    difference = float((a - b).abs().max())
    if not difference <= CONDITION * condition + 1e-4 * size + TINY:
        raise Different(f"{where}: {difference} from the definition's, whose largest number is {size}")


def run(case, backend, counts=None):
    """Run a case; raises `Different` if the backend and the definition differ.

    ``counts`` collects numbers of comparisons.
    """
    counts = Counter() if counts is None else counts
    counts["cases"] += 1
    made, errors = {}, {}
    for name, fused in (("fused", case.get("fused", True)), ("definition", False)):
        try:
            made[name] = Run(case, backend, fused)
        except ValueError as error:
            errors[name] = str(error)
    if errors:
        if len(set(errors.values())) != 1 or len(errors) != 2:
            raise Different(f"constructors disagree: {errors}")
        counts["refused"] += 1
        return
    if case.get("capturable"):
        try:
            made["fused"] = Run(case, backend, True, capturable=True)
        except ValueError:  # a layout, a dtype or an option that cannot be captured; the definition has no such limit
            counts["refused"] += 1
            return
    ours, definition = made["fused"], made["definition"]
    twin = Run(case, backend, ours.own["fused"], capturable="capturable" in ours.own)
    probes = [Run(case, backend, False), Run(case, backend, False)]
    everyone = [ours, definition, twin, *probes]
    for number, step in enumerate(case["steps"]):
        for group, options in step.get("change", {}).items():
            for one in everyone:
                one.change(group, options)
        _one(case, backend, number, step, ours, definition, twin, probes, counts)
        counts["steps"] += 1


def _one(case, backend, number, step, ours, definition, twin, probes, counts):
    before = definition.snapshot()
    grads = []
    for index, spec in enumerate(step["grads"]):
        p = definition.params[index]
        grads.append(gradient(spec, p, generator(case["seed"], 1000 + number, index)))
    kept = [g if g is None else g.clone() for g in grads]
    # With nonfinite="deferred" a step may multiply its gradients by 0, in place.
    deferred = any(str(group.get("nonfinite")).startswith("deferred") for group in ours.optimizer.param_groups)
    for one in (ours, definition, twin):
        for p, g in zip(one.params, grads, strict=True):
            p.grad = g.clone() if deferred and g is not None else g
    for way, probe in zip((1, -1), probes, strict=True):
        _nudge(case, number, probe, grads, way)
    taken = Counter()
    error, expected = ours.step(taken), definition.step()
    where = f"{backend}, step {number}"
    if error != expected:
        if error is not None and "captured" in error:  # whatever else may be wrong with the step
            raise_unless_unchanged(ours, before, where)
            counts["refused"] += 1
            for one in (definition, *probes):
                _restore(one, before)
            return
        raise Different(f"{where}: raises {error!r}, the definition {expected!r}")
    if error is not None:
        counts["refused"] += 1
        for one in (ours, definition):
            raise_unless_unchanged(one, before, where)
        twin.step()
        for probe in probes:
            _restore(probe, before)
        return
    if twin.step() is not None:
        raise Different(f"{where}: raises only when it is repeated")
    for probe in probes:
        probe.step()  # any error is fine, because tensors are compared
    counts["kernel"] += taken["kernel"]
    counts["eager"] += taken["eager"]
    for g, old in zip(grads, kept, strict=True):
        if g is not None and not same_bits(_dense(g), _dense(old)):
            raise Different(f"{where}: the gradient was changed")
    _compare(case, where, taken, ours, definition, twin, probes, before, step)
    _go_on(step, where, ours, definition, twin, probes)


def _dense(g):
    return (g.to_dense() if g.layout == torch.sparse_coo else g).resolve_neg()


def _restore(one, before):
    for p, tensor in zip(one.params, (before[i, "parameter"] for i in range(len(one.params))), strict=True):
        p.data.copy_(tensor)
    for name, tensor in one.tensors().items():
        if name in before:
            tensor.copy_(before[name])
    for p in [p for number, p in enumerate(one.params) if (number, "step") not in before]:
        one.optimizer.state.pop(p, None)


def raise_unless_unchanged(one, before, where):
    after = one.tensors()
    if set(after) != set(before) or not all(same_bits(after[name], before[name]) for name in before):
        changed = [n for n in after if n not in before or not same_bits(after[n], before[n])]
        raise Different(f"{where}: the step was refused, and yet {changed} changed")


def _nudge(case, number, probe, grads, way):
    for index, (p, g) in enumerate(zip(probe.params, grads, strict=True)):
        chance = generator(case["seed"], 2000 + number, index)
        if g is not None and g.layout == torch.sparse_coo:
            g = g.coalesce()
            wide = g.values().double() if p.dtype == torch.float64 else g.values().float()
            wide = nudged(wide, PROBE, chance)
            g = torch.sparse_coo_tensor(g.indices(), wide, g.shape, is_coalesced=True, check_invariants=False)
        elif g is not None:
            wide = g.double() if p.dtype == torch.float64 else g.float()
            g = nudged(wide.resolve_neg(), PROBE, chance)
        if g is not None and not hasattr(p, "grad_dtype"):
            g = g.to(p.dtype)
        p.grad = g
        if p.dtype in (torch.float32, torch.float64):
            p.data.copy_(nudged(p.data, PROBE, chance, way))
        for name, tensor in probe.optimizer.state.get(p, {}).items():
            # Kernels do not use a preconditioner, and a changed one would not have orthonormal columns.
            if kind_of(name) in ("first_moment", "second_moment", "rms"):
                if tensor.dtype in (torch.float32, torch.float64):
                    tensor.copy_(nudged(tensor, PROBE, chance, way if kind_of(name) == "first_moment" else 1))


def _compare(case, where, taken, ours, definition, twin, probes, before, step):
    mine, wanted, again = ours.tensors(), definition.tensors(), twin.tensors()
    if set(mine) != set(wanted):
        raise Different(f"{where}: state {sorted(set(mine) ^ set(wanted))} is only on one side")
    others = [probe.tensors() for probe in probes]
    for name, tensor in mine.items():
        index, what = name
        spec = case["tensors"][index]
        said = f"{where}, tensor {index} {tuple(spec['shape'])} {spec['dtype']}, {what}"
        if not same_bits(tensor, again[name]):
            raise Different(f"{said}: other bits when it is repeated")
        if what == "step":
            if int(tensor) != int(wanted[name]):
                raise Different(f"{said}: {int(tensor)}, by the definition {int(wanted[name])}")
            continue
        if not taken["kernel"]:
            if not same_bits(tensor, wanted[name]):
                raise Different(f"{said}: no kernel took part, and yet the bits differ")
            continue
        if what == "weight_correction.codes":
            continue  # compared together with the weight
        old = before.get(name)
        arithmetic = torch.float64 if spec["dtype"] == "float64" else torch.float32
        size = old.double().abs().nan_to_num(0.0, 0.0, 0.0) if what == "parameter" else 0.0
        if what.endswith("codes"):
            scales, tops = (mine.get((index, what.replace("codes", shared))) for shared in ("scales", "tops"))
            if scales is not None and not bool(torch.isfinite(scales).all()):
                continue  # the codes of a block whose scale is NaN or infinite have no meaning
            if tops is not None and bool((tops >= INFINITE >> CUT).any()):
                continue
        # Integers and signs have many ties; in Triton's interpreter a cast to bfloat16 may truncate.
        kinds = {one["kind"] for one in step["grads"]}
        flips = not kinds & {"integers", "signs", "single"} and (
            "triton" not in where or tensor.dtype not in (torch.bfloat16, torch.float16)
        )
        near = [other[name] for other in others if name in other]
        mixes = what == "parameter" and any(i == index and kind_of(other) == "preconditioner" for i, other in mine)
        if what == "parameter" and (index, CODES) in mine:
            # The represented numbers: one half-way between two weights may be rounded to either, with another code.
            bits = 24 if mine[index, CODES].dtype == torch.int8 else 32
            if (index, CODES) in before:
                size = corrected(before, index).double().abs().nan_to_num(0.0, 0.0, 0.0)
            near = [corrected(other, index) for other in others if (index, CODES) in other]
            found = corrected(mine, index), corrected(wanted, index)
            counted = not kinds & {"integers", "signs", "single"}
            check(name, *found, near, size, arithmetic, flips, said, (tensor.dtype, bits, counted), mixes)
            continue
        if kind_of(what) == "preconditioner":
            check_covariance(name, tensor, wanted[name], near, mine, wanted, said)
            continue
        check(name, tensor, wanted[name], near, size, arithmetic, flips, said, mixes=mixes)


def _go_on(step, where, ours, definition, twin, probes):
    """Give all optimizers the same bits, in the way that the case says."""
    then = step.get("then", "fused")
    if then == "swap":
        mine, wanted = ours.snapshot(), definition.snapshot()
        saved, other = copy.deepcopy(ours.optimizer.state_dict()), copy.deepcopy(definition.optimizer.state_dict())
        refused = set()
        for one, state in ((ours, other), (twin, other), (definition, saved), *((probe, saved) for probe in probes)):
            try:
                one.reload(state)
            except ValueError as error:
                refused.add(str(error))
            else:
                refused.add(None)
        if refused == {None}:
            for one, source in ((ours, wanted), (definition, mine)):
                for name, tensor in one.tensors().items():
                    if name[1] != "parameter" and not same_bits(tensor, source[name]):
                        raise Different(f"{where}: {name} is not what the state dict held")
        elif all(bool(tensor.isfinite().all()) for tensor in (*mine.values(), *wanted.values())):
            # Numbers that are not finite may be refused: one side may have an infinity and the other NaN, see `check`.
            raise Different(f"{where}: the state dict is refused: {refused - {None}}")
        source = definition.snapshot()
    else:
        source = (ours if then == "fused" else definition).snapshot()
    for one in (ours, definition, twin):
        one.take(source, where)
    for probe in probes:
        if set(probe.tensors()) != set(source):  # its nudged numbers were refused where the others were not
            probe.reload(definition.optimizer.state_dict())
        probe.take(source, where)

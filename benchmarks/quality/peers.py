"""Other people's optimizers: how each is built for a model, its settings, and the package that it comes from.

Weight decay is 0 everywhere. Settings are those of the package's documentation; where a model of 160 columns or a run
of 160 steps needs another one, `Peer.note` says so. ``pip install -e ".[peers]"`` installs all packages but
apollo-torch, whose licence (CC BY-NC 4.0) allows no commercial use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

#: SOAP, Kron and Shampoo keep a square matrix for each axis that is no longer than this: not for 8,192 words.
LONGEST_AXIS = 1024
#: Steps from one projection of GaLore and APOLLO to the next: theirs is 200, more than the shortest run has.
PROJECTED_EVERY = 50


@dataclass(frozen=True)
class Peer:
    """How an optimizer is built from a model and a learning rate.

    Args:
        build: ``(model, lr)`` to the optimizer.
        start: the rate at which a search begins.
        needs: the distributions that are to be installed -> a module of each.
        note: settings that are not the package's defaults.
    """

    build: Callable[[nn.Module, float], Optimizer]
    start: float
    needs: dict[str, str] = field(default_factory=dict)
    note: str = ""


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, as one that a scheduler and a loop can use."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {"lr": 0.0})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """A step of each."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        self.state = {p: state for part in self.parts for p, state in part.state.items()}  # type: ignore[assignment]
        return loss


@dataclass(frozen=True)
class Split:
    """Parameters by their place in a model: (name, parameter) each."""

    hidden: list[tuple[str, nn.Parameter]]
    embedding: list[tuple[str, nn.Parameter]]
    head: list[tuple[str, nn.Parameter]]
    rest: list[tuple[str, nn.Parameter]]


def split(model: nn.Module) -> Split:
    """The head is the last linear layer, ``rest`` has the vectors."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = {id(linear[-1].weight)} if linear else set()
    parts = Split([], [], [], [])
    for name, p in model.named_parameters():
        if p.ndim < 2:
            parts.rest.append((name, p))
        else:
            where = parts.embedding if id(p) in embeddings else parts.head if id(p) in head else parts.hidden
            where.append((name, p))
    return parts


def tensors(*parts: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Parameters without their names."""
    return [p for part in parts for _, p in part]


def width(model: nn.Module) -> int:
    """The shortest side of the hidden matrices."""
    return min(min(p.shape) for _, p in split(model).hidden)


def _muon(model: nn.Module, lr: float) -> Optimizer:
    parts = split(model)
    muon = torch.optim.Muon(tensors(parts.hidden), lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    others = tensors(parts.embedding, parts.head, parts.rest)
    return Together(muon, torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True))


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[nn.Module, float], Optimizer]:
    def build(model: nn.Module, lr: float) -> Optimizer:
        cls = getattr(importlib.import_module("pytorch_optimizer"), name)
        return cls(model.parameters(), lr=lr, weight_decay=0.0, **options)

    return build


def _shampoo(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import ScalableShampoo
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    return ScalableShampoo(
        model.parameters(),
        lr=lr,
        weight_decay=0.0,
        preconditioning_compute_steps=20,
        no_preconditioning_for_layers_with_dim_gt=LONGEST_AXIS,
        graft_type=LayerWiseGrafting.ADAGRAD,
    )


def _adam_mini(model: nn.Module, lr: float) -> Optimizer:
    """It tells layers by their names, so each gets one that it knows."""
    from adam_mini import Adam_mini

    parts, config = split(model), getattr(model, "config", None)
    named = [("embed." + name, p) for name, p in parts.embedding] + [("lm_head." + name, p) for name, p in parts.head]
    named += [(name if p.shape[0] == p.shape[1] else "mlp." + name, p) for name, p in parts.hidden]
    # Not their own names: a norm behind an output layer would be taken for a matrix.
    named += [(f"vector.{n}.{name.rpartition('.')[2]}", p) for n, (name, p) in enumerate(parts.rest)]
    heads = config.num_attention_heads if config is not None else model.heads
    return Adam_mini(named, lr=lr, weight_decay=0.0, dim=width(model), n_heads=heads, verbose=False)


def _low_rank(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Groups of GaLore and APOLLO: every matrix, the embedding and the head among them, and the vectors."""
    parts = split(model)
    matrices = tensors(parts.hidden, parts.embedding, parts.head)
    return [{"params": matrices, "update_proj_gap": PROJECTED_EVERY, **options}, {"params": tensors(parts.rest)}]


def _galore(model: nn.Module, lr: float) -> Optimizer:
    from pytorch_optimizer import GaLore

    groups = _low_rank(model, rank=width(model) // 4, scale=0.25, projection_type="std")
    return GaLore(groups, lr=lr, weight_decay=0.0)


def _apollo(rank: int | None, scale: float, scale_type: str) -> Callable[[nn.Module, float], Optimizer]:
    def build(model: nn.Module, lr: float) -> Optimizer:
        from apollo_torch import APOLLOAdamW

        options = {"rank": rank or width(model) // 4, "scale": scale, "scale_type": scale_type}
        groups = _low_rank(model, proj="random", proj_type="std", **options)
        return APOLLOAdamW(groups, lr=lr, weight_decay=0.0)

    return build


def _from(module: str, name: str) -> Callable[[nn.Module, float], Optimizer]:
    def build(model: nn.Module, lr: float) -> Optimizer:
        return getattr(importlib.import_module(module), name)(model.parameters(), lr=lr, weight_decay=0.0)

    return build


def _po(build: Callable[[nn.Module, float], Optimizer], start: float, note: str = "") -> Peer:
    return Peer(build, start, {"pytorch-optimizer": "pytorch_optimizer"}, note)


PEERS: dict[str, Peer] = {
    "adamw": Peer(
        lambda model, lr: torch.optim.AdamW(model.named_parameters(), lr, weight_decay=0.0, fused=True), 1e-3
    ),
    "sgd": Peer(
        lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9), 6.4e-2, note="momentum 0.9"
    ),
    "adafactor": Peer(
        lambda model, lr: torch.optim.Adafactor(model.parameters(), lr, weight_decay=0.0), 3.2e-2,
        note="no first moment; its rate is relative to the RMS of the weights",
    ),
    "muon": Peer(
        _muon, 4e-3, note='hidden matrices, `adjust_lr_fn="match_rms_adamw"`; AdamW at the same rate for all others'
    ),
    "lion": _po(_pytorch_optimizer("Lion"), 2.5e-4),
    "soap": _po(
        _pytorch_optimizer("SOAP", max_precondition_dim=LONGEST_AXIS), 4e-3, f"axes up to {LONGEST_AXIS:,} are rotated"
    ),
    # Without opt-einsum torch contracts its factors in an order that takes 40 GB for 8,192 words.
    "kron": Peer(
        _pytorch_optimizer("Kron", max_size_triangular=LONGEST_AXIS), 1e-3,
        {"pytorch-optimizer": "pytorch_optimizer", "opt-einsum": "opt_einsum"},
        f"triangular factors for axes up to {LONGEST_AXIS:,}, diagonal ones for longer axes",
    ),
    "shampoo": _po(
        _shampoo, 1e-3,
        f"`ScalableShampoo`: matrices with axes up to {LONGEST_AXIS:,}, roots every 20 steps, grafted on AdaGrad",
    ),
    "came": _po(_pytorch_optimizer("CAME"), 1.25e-4),
    "schedule_free": _po(
        _pytorch_optimizer("ScheduleFreeAdamW"), 4e-3, "the warm-up of all others, then a constant rate"
    ),
    "galore": _po(
        _galore, 8e-3,
        f"rank a quarter of the width, every matrix, scale 0.25, a projection for {PROJECTED_EVERY} steps",
    ),
    "adam_mini": Peer(_adam_mini, 1e-3, {"adam-mini": "adam_mini"}, "layers named as it expects them"),
    "apollo": Peer(
        _apollo(None, 1.0, "channel"), 4e-3, {"apollo-torch": "apollo_torch"},
        f"rank a quarter of the width, every matrix, a projection for {PROJECTED_EVERY} steps",
    ),
    "apollo_mini": Peer(
        _apollo(1, 128.0, "tensor"), 2e-3, {"apollo-torch": "apollo_torch"},
        f"rank 1, scale 128, every matrix, a projection for {PROJECTED_EVERY} steps",
    ),
    "adamw_8bit_bitsandbytes": Peer(_from("bitsandbytes.optim", "AdamW8bit"), 1e-3, {"bitsandbytes": "bitsandbytes"}),
    "adamw_8bit_torchao": Peer(_from("torchao.optim", "AdamW8bit"), 1e-3, {"torchao": "torchao.optim"}),
    "adamw_4bit_torchao": Peer(_from("torchao.optim", "AdamW4bit"), 1e-3, {"torchao": "torchao.optim"}),
    "flash_adamw": _po(_pytorch_optimizer("FlashAdamW"), 1e-3),
}  # fmt: skip


def missing(name: str) -> str | None:
    """Why a peer cannot be built here, or None where it can."""
    for package, module in PEERS[name].needs.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # other people's packages fail in ways of their own
            if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
                return f"{package} is not installed"
            return f"{package} cannot be imported: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """Of its message, with the error's type."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:150]}" if text else type(error).__name__


def state_tensors(held: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Plain tensors with at least one axis, in dicts, lists and objects; a quantized tensor's parts in its place."""
    seen = set() if seen is None else seen
    if held is None or isinstance(held, (str, bytes, int, float, type, torch.device, torch.dtype, nn.Module)):
        return
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from state_tensors(getattr(held, name), seen)
        elif held.ndim:
            yield held
        return
    inner = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple, set)) else None
    for value in vars(held).values() if inner is None and hasattr(held, "__dict__") else inner or ():
        yield from state_tensors(value, seen)


def state_bytes(optimizer: Optimizer) -> int:
    """Of the memory behind the state: each piece once, as a whole, without weights and gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    counted = {t.untyped_storage().data_ptr() for p in params for t in (p, p.grad) if t is not None}
    total = 0
    for tensor in state_tensors({n: state for n, state in enumerate(optimizer.state.values())}):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total

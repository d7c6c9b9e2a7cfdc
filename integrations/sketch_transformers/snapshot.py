"""A copy of everything that training changes in a Trainer, to restore it."""

from __future__ import annotations

import functools
import gc
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from sketch_transformers import _private

#: Containers with more entries are data, in which no generators are searched for.
LARGE = 10_000


class Snapshot:
    """Weights, buffers, attributes of modules, optimizer, scheduler, random numbers, Trainer's and accelerate's state.

    Everything is restored in place: tensors get their old numbers; dictionaries, lists, sets and deques get their old
    entries. Tensors are copied to the CPU, because copies on a device would take the memory that is measured. Frozen
    parameters are not copied, because training does not change them.

    Attributes:
        nbytes: bytes of the copies.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.nbytes = 0
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        self._seen: set[int] = set()
        for module in trainer.model.modules():
            self._keep(vars(module))
        own = trainer.optimizer
        while isinstance(getattr(own, "optimizer", None), torch.optim.Optimizer):
            own = own.optimizer
        if own is not None:  # with the references to its state and groups, because loading a state dict makes new ones
            self._keep(vars(own))
        if trainer.lr_scheduler is not None:
            self._keep(vars(trainer.lr_scheduler))
        self._shallow = [(vars(found), dict(vars(found))) for found in (trainer, trainer.args, trainer.accelerator)]
        gradients = trainer.accelerator.gradient_state
        self._gradients = (gradients, gradients.sync_gradients, gradients.dataloader_references)
        # Hooks of an optimizer that is made for a trial stay on the parameters; an existing optimizer keeps its own.
        parameters = list(trainer.model.parameters()) if own is None else []
        self._hooks = [(p, dict(_private.grad_hooks(p))) for p in parameters]
        sources = [trainer.model, trainer.train_dataset, trainer.data_collator, trainer.compute_loss_func]
        self._random = [_state_of(found) for found in generators([*sources, *vars(trainer).values()])]
        self._random += [_restoring(random.getstate(), random.setstate)]
        self._random += [_restoring(np.random.get_state(), np.random.set_state)]
        self._random += [_restoring(torch.get_rng_state(), torch.set_rng_state)]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._random += [_restoring(torch.cuda.get_rng_state_all(), torch.cuda.set_rng_state_all)]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        trainer = self.trainer
        for found, kept in (*self._shallow, *self._dicts):
            found.clear()
            found.update(kept)
        for entries, kept_entries in self._lists:
            entries.clear()
            (entries.update if isinstance(entries, set) else entries.extend)(kept_entries)
        for parameter, hooks in self._hooks:
            found = _private.grad_hooks(parameter)
            found.clear()
            found.update(hooks)
        for parameter in trainer.model.parameters():
            parameter.grad = None
        for tensor, saved in self._tensors:
            tensor.copy_(saved)
        gradients, sync, loaders = self._gradients
        gradients.sync_gradients = sync
        gradients.dataloader_references = loaders
        if torch.cuda.is_available():  # on a CPU, memory of a trial is freed when the next measurement starts
            gc.collect()
            torch.cuda.empty_cache()
        for put_back in self._random:  # last, because freeing objects may run other code
            put_back()

    def _keep(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            frozen = isinstance(value, torch.nn.Parameter) and not value.requires_grad
            if frozen or value.is_meta:
                return
            self._seen.add(id(value))
            place = value  # the tensor itself, not a view: it may have another storage later (`parameter.data = ...`)
            for dim, stride in enumerate(value.stride() if value.layout == torch.strided else ()):
                # Expanded: torch refuses to write to an element that appears several times.
                if stride == 0 and value.shape[dim] > 1:
                    place = place.detach().narrow(dim, 0, 1)
            saved = place.detach().to("cpu", copy=True)
            self._tensors.append((place, saved))
            self.nbytes += saved.numel() * saved.element_size()
        elif isinstance(value, dict):
            self._seen.add(id(value))
            self._dicts.append((value, dict(value)))
            for entry in list(value.values()):
                self._keep(entry)
        elif isinstance(value, (list, set, deque)):
            self._seen.add(id(value))
            self._lists.append((value, list(value)))
            for entry in list(value):
                self._keep(entry)
        elif isinstance(value, tuple):
            for entry in value:
                self._keep(entry)


def generators(roots: list[Any]) -> Iterator[Any]:
    """Generators of random numbers (torch's, numpy's, Python's) that objects refer to, in attributes or closures."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (torch.Tensor, str, bytes, type, types.ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            yield value
        elif isinstance(value, Mapping):
            stack += list(value.values()) if len(value) <= LARGE else []
        elif isinstance(value, (list, tuple, set)):
            stack += list(value) if len(value) <= LARGE else []
        elif isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__]
        elif isinstance(value, types.FunctionType):
            cells = [_content(cell) for cell in value.__closure__ or ()]
            stack += [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif hasattr(value, "__dict__") and not isinstance(value, Trainer):
            stack += list(vars(value).values())


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty closure cell
        return None


def _state_of(generator: Any) -> Callable[[], None]:
    if isinstance(generator, torch.Generator):
        return _restoring(generator.get_state(), generator.set_state)
    if isinstance(generator, random.Random):
        return _restoring(generator.getstate(), generator.setstate)
    if isinstance(generator, np.random.RandomState):
        return _restoring(generator.get_state(), generator.set_state)
    bits = generator.bit_generator
    state = bits.state

    def put_back() -> None:
        bits.state = state

    return put_back


def _restoring(state: Any, put: Callable[[Any], Any]) -> Callable[[], None]:
    return lambda: put(state)

"""State dicts: what is saved, and how saved state is checked before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.notices import warn
from sketch_plugins.optim.checks import copied, exact_step
from sketch_plugins.optim.family import BEFORE
from sketch_plugins.optim.loading import check_containers, load
from sketch_plugins.optim.rule import LastRms
from sketch_plugins.optim.state_checks import StateChecks
from sketch_plugins.optim.weight_bits import corrects, recoded
from sketch_plugins.optim.written import modernize, renew, written_by, written_with
from sketch_plugins.sharding.dtensors import is_dtensor, largest, leading, trim, unwrap, wrap
from sketch_plugins.sharding.names import NAMES
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.pieces import is_key, is_lazy
from sketch_plugins.sharding.state_names import PLACE, flattened, is_ours, nested
from sketch_plugins.stores import Cover

_CONVERT = (
    "To continue from torch.optim's AdamW, Adam, SGD or Adagrad, load the result of "
    "sketch_plugins.convert_state(state_dict, optimizer)"
)


class StateDicts(StateChecks):
    """Saves and loads state. A state dict is checked as a whole before any of it is loaded."""

    def state_dict(self) -> dict[str, Any]:
        """The state dict, as of `torch.optim.Optimizer`. The state of a DTensor's shard is saved as DTensors.

        A state tensor of size s is saved as one of size (W, *s) over W shards: see `sharding.dtensors.wrap`.
        """

        def finish(_: Any, out: dict[str, Any]) -> None:
            for group, saved in zip(self.param_groups, out["param_groups"], strict=True):
                for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                    if is_dtensor(p) and leading(p):
                        own, others = self._split(nested(out["state"].get(key, {})), group, index, p)
                        if own:
                            (part,) = self._parts.of(index, p)
                            layout = self._layout(largest(p), group, part)
                            out["state"][key] = {"step": own["step"], **flattened(wrap(p, own, layout)), **others}

        self._mark_weights()
        # This hook runs first after saving, so hooks of other code see what is saved and may return what they like.
        after = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            after.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. State keeps its own dtypes, whatever the parameter's dtype is.

        (torch would cast every state tensor to the parameter's dtype, and ruin tables, codes and scales.)

        ``weight_bits`` may differ from the saved value: from None corrections start at 0, from 24 to 32 they stand for
        the same numbers, and to None they are dropped, with a warning.

        Raises:
            ValueError: the state was written with other options (compression, depth, seed, ...; the message has both
                values), by another kind of optimizer, or for other shapes. Nothing has been changed then.
        """

        def prepare(incoming: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
            check_containers(incoming)
            # The caller's groups stay unchanged. The copies get the values of newer options.
            groups = [dict(group) for group in incoming["param_groups"]]
            # Checkpoints of older versions have nested state. Here all state is nested.
            saved = {
                key: nested(state) if isinstance(state, Mapping) else state for key, state in incoming["state"].items()
            }
            state = self._spread(self._local_state(saved, groups), groups)
            incoming = {**incoming, "param_groups": groups, "state": state}
            self._check_incoming(incoming)
            # Copies are made before anything changes. If a tensor cannot be copied, or memory runs out, the optimizer
            # has not changed.
            return incoming, self._copies(incoming)

        load(self, state_dict, prepare)
        if self._written is not None:
            self._written.forget()
        self._find_unmeasured()

    def _copies(self, incoming: Mapping[str, Any]) -> dict[Any, Any]:
        """The state of a checked state dict, as this optimizer keeps it."""
        out, known = {}, set()
        for group, saved in zip(self.param_groups, incoming["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                known.add(key)
                if key in incoming["state"]:
                    device = p.to_local().device if is_dtensor(p) else p.device
                    out[p] = flattened(_restored(incoming["state"][key], device, saved["capturable"]))
        # Entries that belong to no parameter are other code's.
        return {**out, **{key: value for key, value in incoming["state"].items() if key not in known}}

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The groups as in a state dict, without the hooks of other code."""
        out, first = [], 0
        for group in self.param_groups:
            last = first + len(group["params"])
            out.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(range(first, last))})
            first = last
        return out

    def _split(
        self, state: Mapping[str, Any], group: Mapping[str, Any], index: int, p: Tensor
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of a parameter's state that are ours, and those of other code."""
        names = {name for part in self._parts.of(index, p) for name in self._expected(part, group)}
        own = {name: value for name, value in state.items() if is_ours(name) or name in names}
        return own, {name: value for name, value in state.items() if name not in own}

    def _targets(self, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The groups as they are after loading, as far as that decides what state they have.

        A group takes ``row_scales`` of the checkpoint, and False of one that is too old to have it.
        """
        return [
            {**group, "row_scales": one.get("row_scales", False)} if "row_scales" in group else group
            for group, one in zip(self.param_groups, saved, strict=False)
        ]

    def _local_state(self, saved: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
        """The state of a state dict as this rank keeps it: for a DTensor the local part, cut to the shard's size."""
        state = dict(saved)
        for group, saved_group in zip(self._targets(groups), groups, strict=False):
            for index, (p, key) in enumerate(zip(group["params"], saved_group.get("params", ()), strict=False)):
                if is_dtensor(p) and leading(p) and isinstance(state.get(key), Mapping) and state[key]:
                    own, others = self._split(state[key], group, index, p)
                    (part,) = self._parts.of(index, p)
                    local = unwrap(own, leading(p))
                    step = {"step": local["step"]} if "step" in local else {}
                    state[key] = {**step, **trim(local, self._layout(part, group, part)), **others}
        return state

    def _spread(self, saved: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
        """A state in which each matrix of a batch has RMS and covers of its own: `LastRms.spread`, `Cover.spread`."""
        state = dict(saved)
        for group, saved_group in zip(self._targets(groups), groups, strict=False):
            for index, (p, key) in enumerate(zip(group["params"], saved_group.get("params", ()), strict=False)):
                if not isinstance(state.get(key), Mapping) or is_lazy(p):
                    continue
                for part in self._parts.of(index, p):
                    own = state[key] if part.key is None else state[key].get(part.key)
                    if isinstance(own, Mapping) and (changed := self.spread_part(own, part, group)):
                        own = {**own, **changed}
                        state[key] = own if part.key is None else {**state[key], part.key: own}
        return state

    def spread_part(self, own: Mapping[str, Any], part: Part, group: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in the state of a part from an earlier version, which measured or covered a batch as a whole."""
        changed = {}
        if group.get("lagged_rms") and isinstance(own.get("rms"), Mapping):
            changed["rms"] = LastRms(self._matrices(part, group)).spread(own["rms"])
        second = self._stores(part, group)[1]
        if isinstance(second, Cover) and isinstance(own.get("second_moment"), Mapping):
            changed["second_moment"] = second.spread(own["second_moment"])
        return changed

    def _check_incoming(self, incoming: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        saved_groups = incoming["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} parameter groups, but this {kind} has {len(self.param_groups)}"
            )
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(saved.get("params", ())) != len(group["params"]):
                raise ValueError(
                    f"group {number} of the state dict has {len(saved.get('params', ()))} parameters, but this "
                    f"{kind}'s has {len(group['params'])}"
                )
            writer = written_by(saved)
            if writer != kind:
                raise ValueError(
                    f"the state dict was not written by {kind}, but by {writer or 'another optimizer'} (group {number})"
                    + (f". Build {writer}, or load the weights alone" if writer else f". {_CONVERT}")
                )
            for name, value in self.FIXED.items():
                saved.setdefault(name, value)
            if NAMES in group:  # the names are the present model's; a checkpoint may have none
                saved[NAMES] = group[NAMES]
            with_state = any(
                isinstance(state := incoming["state"].get(key), Mapping) and any(map(is_ours, state))
                for key in saved["params"]
            )
            written = written_with(saved) if with_state else {}
            for name, option in self.OPTIONS.items():
                if name not in group:
                    continue
                if name not in saved:  # the option is newer than the checkpoint
                    if name == "batch_dims":
                        self._check_batches(group, saved, incoming["state"])
                    known = name in ("weight_bits", "row_scales") or not option.structural
                    saved[name] = BEFORE.get(name, group[name]) if known else group[name]
                saved[name] = self._group_value(name, saved[name])
                if name == "weight_bits" and written.get(name, saved[name]) == saved[name]:
                    written[name] = saved[name] = self._recode(number, saved, incoming["state"])
                if option.structural and saved[name] != group[name] and name != "row_scales":
                    raise ValueError(
                        f"the state dict was written with {name}={saved[name]!r}, but group {number} "
                        f"of this {kind} has {name}={group[name]!r}, which needs another state. Build "
                        "the optimizer with the saved value"
                    )
                if option.structural and written.get(name, saved[name]) != saved[name]:
                    raise ValueError(
                        f"group {number} of the state dict has {name}={saved[name]!r}, but its state "
                        f"was written with {name}={written[name]!r}: the option was changed after the "
                        f"last step. Build the optimizer with {name}={written[name]!r}, and set that "
                        "value in the group of the state dict"
                    )
            modernize(saved)
            renew(kind, self.OPTIONS, saved)
            target = self._targets(saved_groups)[number]
            for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                if saved["capturable"] and not group["capturable"]:  # the checkpoint is from a machine with kernels
                    self._check_kernels(p, saved, partial(self._label, group, index))
                state = incoming["state"].get(key)
                if key not in incoming["state"] or (isinstance(state, Mapping) and not state):
                    continue
                if is_lazy(p):
                    raise ValueError(
                        f"{self._label(group, index)} has no shape yet, because its lazy module has not seen an input, "
                        "but the state dict has state for it: run a batch before you load it"
                    )
                parts = self._parts.of(index, p)
                if parts and parts[0].key is None:
                    self._check_state(parts[0], target, state, self._label(group, parts[0]))
                    continue
                ours = set(filter(is_ours, state)) if isinstance(state, Mapping) else {"no mapping"}
                if ours and ours != {part.key for part in parts}:
                    raise ValueError(
                        f"the saved state of group {number} does not match the {len(parts)} parameter pieces in this "
                        "rank's flat partition: it was saved with another number of processes, another ZeRO stage or "
                        "other ZeRO settings. Load it with the settings of the saved run, or convert the checkpoint: "
                        "sketch-plugins reshard CHECKPOINT --world-size N"
                    )
                for part in parts if ours else ():
                    self._check_state(part, target, state[part.key], self._label(group, part))

    def _recode(self, number: int, saved: Mapping[str, Any], state: dict[Any, Any]) -> int | None:
        """Change the corrections in a group's state to the group's ``weight_bits``. Returns the bits of that state.

        Args:
            number: number of the group.
            saved: the group in the state dict.
            state: the state of all parameters. Its mappings are copies, so they can be changed.
        """
        group = self.param_groups[number]
        before, now = saved["weight_bits"], group["weight_bits"]
        if before == now or (before, now) == (32, 24):
            return before
        lost = 0
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            given = state.get(key)
            if not isinstance(given, Mapping) or not any(map(is_ours, given)) or is_lazy(p):
                continue
            state[key] = given = dict(given)
            for part in self._parts.of(index, p):
                own = given if part.key is None else given.get(part.key)
                if isinstance(own, Mapping):
                    own = given if own is given else dict(own)
                    recoded(own, part, group, before, self._matrix_shape(part, group))
                    if part.key is not None:
                        given[part.key] = own
                    lost += now is None and corrects(part, {**group, "weight_bits": before})
        if lost:
            warn(
                f"the state dict was written with weight_bits={before}, and group {number} of this "
                f"{type(self).__name__} has weight_bits=None: what {lost} parameters have beyond their dtype is "
                f"dropped. Build the optimizer with weight_bits={before} to keep it"
            )
        return now

    def _check_batches(self, group: Mapping[str, Any], saved: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
        """Raise ValueError if the state was written when all matrices of a batch still shared their buckets."""
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            for part in self._parts.of(index, p) if state.get(key) else ():
                if self.batch_axes(part.whole, group):
                    raise ValueError(
                        "the state dict was written before the option batch_dims existed: in its "
                        f"state of {self._label(group, part)} the {part.whole[0]} matrices share "
                        f"buckets, covers or covariances, but with batch_dims={group['batch_dims']!r} each "
                        "matrix has its own. Build the optimizer with batch_dims=0 (at least in this "
                        "group) to continue with the old layout, or start with new state"
                    )


def _restored(saved: Mapping[str, Any], device: torch.device, capturable: bool) -> dict[str, Any]:
    """A copy of a checked state. Without copies a state dict would make two optimizers share their tensors."""
    out: dict[str, Any] = {}
    # The step counter is on the CPU, because reading it would wait for a device. With capturable it is not read.
    cpu = torch.device("cpu")
    for key, value in saved.items():
        if is_key(key):
            out[key] = _restored(value, device, capturable)
        elif key == "step":
            out[key] = exact_step(value)
            assert out[key] is not None
            out[key] = out[key].to(device if capturable else cpu)
        else:
            out[key] = copied(value, cpu if key == PLACE else device)
    return out

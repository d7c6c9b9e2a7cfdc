"""A mixin for DDP strategies that compresses gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Key of a checkpoint for the error memories of all ranks.
MEMORIES = "sketch_lightning_comm"


class Compressing:
    """DDP whose gradients ``sketch_plugins.comm`` compresses; checkpoints contain the error memories.

    Attributes:
        comm_state: the hook's state, from the start of `fit` on; None if gradients are not compressed.
    """

    model: Any
    precision_plugin: Any
    comm_state: Any = None
    _comm: str | None
    _comm_kwargs: dict[str, Any]

    def _set_comm(self, comm: str | None, comm_kwargs: Mapping[str, Any] | None, hook: Any) -> None:
        if comm is None and comm_kwargs:
            raise ValueError(
                f"comm_kwargs={dict(comm_kwargs)!r} has no effect without comm: set a compressor, as in comm='topk'"
            )
        if comm is not None and hook is not None:
            raise ValueError(
                f"comm={comm!r} and ddp_comm_hook cannot be combined, because DDP has one hook: use one of them"
            )
        if comm is not None:
            _check_comm(comm, comm_kwargs or {})  # now, because later the processes would have been started
        self._comm, self._comm_kwargs = comm, dict(comm_kwargs or {})

    def _register_ddp_hooks(self) -> None:
        if self._comm is None:
            super()._register_ddp_hooks()  # type: ignore[misc]
        else:  # Lightning's method would do nothing on a CPU
            from sketch_plugins.comm import attach

            scaler = {"scaler": self.precision_plugin.scaler} if hasattr(self.precision_plugin, "scaler") else {}
            self.comm_state = attach(self.model, **{"compressor": self._comm, **scaler, **self._comm_kwargs})

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Like Lightning's, on every rank; the rank that writes also gets the memories of all ranks."""
        if self.comm_state is not None and "optimizer_states" in checkpoint:  # not if only the weights are saved
            checkpoint[MEMORIES] = self.comm_state.gather()
        super().save_checkpoint(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Like Lightning's, and load the error memories.

        Raises:
            ValueError: they were kept with other options, or the files are not those of all ranks of one run.
        """
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        if self.comm_state is not None and checkpoint.get(MEMORIES):
            self.comm_state.load_gathered(checkpoint[MEMORIES])


def _check_comm(comm: Any, options: Mapping[str, Any]) -> None:
    from sketch_plugins.comm import COMPRESSORS
    from sketch_plugins.comm.state import check_options as check

    if not isinstance(comm, str) or comm not in COMPRESSORS:
        raise ValueError(f"comm={comm!r} is not one of None, {', '.join(map(repr, COMPRESSORS))}")
    try:
        check(options)
        if getattr(options.get("compressor"), "name", options.get("compressor")) not in (None, comm):
            raise ValueError(f"it sets compressor={options['compressor']!r}, but comm={comm!r} is another compressor")
    except ValueError as error:
        raise ValueError(f"comm_kwargs={dict(options)!r}: {error}") from error

"""Which unknown keys of a parameter group are misspelt options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from sketch_plugins.optim.family import FAMILY
from sketch_plugins.optim.options import Option

# Options that only sketched optimizers have. No framework uses these names for something else.
_SKETCHY = {
    "stack_bytes", "stagger_solves",
    "budget", "shampoo_beta", "update_freq", "statistics_freq", "start_preconditioning_step", "solver", "refresh_every",
    "graft", "matrix_eps", "momentum_placement", "momentum_of", "merge_dims", "max_block_dim", "max_axis",
    "max_aspect_ratio", "nonfinite", "embedding_rate", "row_scales",
}  # fmt: skip
#: Options of some of our optimizers whose names other code uses, too.
_WORDS_OF_OTHERS = frozenset({"depth", "width", "rank", "budget"})
_FAMILY = (frozenset(FAMILY) | _SKETCHY) - {"betas", "eps"}


def misspelt(name: str, options: Mapping[str, Option]) -> str | None:
    """The option, of this or another of our optimizers, that an unknown key of a group probably means; or None.

    Frameworks keep keys of their own in parameter groups ("initial_lr", "name", "lr_scale"), so an unknown key cannot
    be refused as such. A key is refused if it nearly equals an option of ours, or is an option of another of our
    optimizers, unless frameworks use the word themselves (layer-wise decay notes the "depth" of a layer).
    """
    if name in options or not isinstance(name, str) or name in _WORDS_OF_OTHERS:
        return None
    # Options of other optimizers count, too, because this optimizer would not read them.
    close = difflib.get_close_matches(name, _FAMILY.union(options), n=1, cutoff=0.9)
    return close[0] if close else None

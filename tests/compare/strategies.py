"""Hypothesis strategies for cases of `comparison`: derived from the optimizers' tables of options.

An option with choices, or a bool, is drawn from the table itself. A number needs values in `NUMBERS`; one that has none
is an error when the strategies are built, so that a new option is compared or makes a test fail.
"""

from hypothesis import strategies as st

from sketch_plugins import registry

# Values of the numbers: the defaults, bounds of the allowed range, and some in between. Values that an optimizer's own
# table does not allow are left out.
NUMBERS = {
    "lr": [1e-3, 0.1, 1.0, 0.0, 1e-8, ("tensor", 0.03)],
    "betas": [(0.9, 0.999), (0.0, 0.999), (0.9, 0.0), (0.5, 0.5), (0.9, 1.0), (0.0, 1.0), (0.0, 0.0), (0.9, 0.99)],
    "eps": [1e-8, 0.0, 1e-3, 1.0, 1e-15, 1e-30],
    "weight_decay": [0.0, 0.1, 1e-2, 1.0],
    "compression": [0.05, 0.2, 0.5, 1.0, 0.01],
    "width": [0, 1, 2, 7, 40],
    "depth": [1, 2, 3, 4],
    "seed": [0, 1, -5, 2**40 + 3],
    "min_compress_size": [0, 100, 4096],
    "update_clip": [0.0, 0.3, 1e-2, 1.0, 1e-20, 1e10],
    "reference_rms": [1.0, 0.018, 30.0],
    "chunk_size": [0, 300, 1000, 1 << 16],
    "block_size": [128, 16, 1, 7, 32, 200, 2000],
    "clean_every": [0, 1, 2],
    "clean_factor": [0.2, 0.0, 0.5, 1.0],
    "momentum": [0.9, 0.0, 0.5],
    "lr_decay": [0.0, 0.1],
    "initial_accumulator_value": [0.0, 0.1],
    "rank": [32, 1, 2, 0.5],
    "budget": [0.0, 2.0, 8.0],
    "shampoo_beta": [0.99, 0.5],
    "update_freq": [10, 1, 2],
    "statistics_freq": [1, 2],
    "embedding_rate": [2.0, 1.0, 0.5],
    "start_preconditioning_step": [1, 0, 3],
    "refresh_every": [10, 0, 1],
    "matrix_eps": [1e-6, 0.0, 0.1],
    "exponent": [0.0, 0.25, 1.0],
    "merge_dims": [1024, 1, 8],
    "max_block_dim": [8192, 0, 16],
    "max_axis": [16384, 8],
    "max_aspect_ratio": [16.0, 1.0],
    "stack_bytes": [-1, 0, 3000],
}
# Options that are not drawn from the table, and where they are drawn.
ELSEWHERE = {
    "fused": "the comparison sets it: it is what is compared",
    "capturable": "drawn for Triton, the only kernels that have it",
    "compile": "torch.compile takes seconds for a case; tests/optim compares it with the eager path",
}
# Options that Numba leaves to the eager path. They are drawn less often, so that enough cases use its kernels.
NOT_NUMBA = {
    "depth", "hash", "table_dtype", "row_sparse", "first_moment_rounding", "stochastic_rounding", "variant", "seed",
    "allow_dense_count_sketch", "decoupled_weight_decay", "clean_every", "clean_factor", "chunk_size",
}  # fmt: skip
SHAPES = [
    (), (0,), (1,), (5,), (31,), (33,), (129,), (1025,), (0, 3), (3, 0), (1, 1), (1, 40), (40, 1), (7, 5), (24, 48),
    (37, 33), (70, 7), (33, 31), (3, 1025), (20, 129), (129, 31), (33, 129), (2, 128), (2, 3, 4), (6, 5, 7), (1, 3, 1),
    (4, 3, 2, 2), (8, 3, 3, 3), (0, 2, 2), (2, 1, 3, 2), (3, 18, 20), (2, 17, 33), (5, 16, 16), (2, 16, 128), (20, 128),
    (32, 130),
]  # fmt: skip
LAYOUTS = ["contiguous", "offset", "gaps", "transposed", "channels_last", "every_other", "reversed"]
GRADIENT_LAYOUTS = [
    *LAYOUTS, "negative", "negative", "expanded", "expanded", "sparse", "sparse", "sparse_repeated", "sparse_empty",
]  # fmt: skip
KINDS = [
    "normal", "none", "zero", "small", "large", "huge", "tiny", "integers", "signs", "scales", "rows", "single", "nan",
    "inf", "-inf",
]  # fmt: skip
THEN = ["fused", "definition", "swap"]


def values_of(option):
    """The values that an option is drawn from. Raises LookupError if none are defined."""
    if option.choices:
        return list(option.choices)
    if option.type is bool:
        return [False, True]
    if option.name not in NUMBERS:
        raise LookupError(
            f"the option {option.name!r} has neither choices nor values in NUMBERS of tests/compare/strategies.py: "
            "add some there, so that kernels are compared with the definition under it"
        )
    out = []
    for value in NUMBERS[option.name]:
        try:
            option.validate(value[1] if isinstance(value, tuple) and value[0] == "tensor" else value)
        except ValueError:
            continue
        out.append(value)
    return out


def table(name):
    """Option -> values to draw for an optimizer."""
    options = registry.get(name).options
    return {key: values_of(option) for key, option in options.items() if key not in ELSEWHERE}


def changeable(name):
    """Options that may change between steps."""
    options = registry.get(name).options
    return {key: of for key, of in table(name).items() if key != "preset" and not options[key].structural}


@st.composite
def options_of(draw, values, most, rare=frozenset()):
    """Some options with values; those of ``rare`` in a fifth of the cases."""
    names = sorted(values)
    if rare and draw(st.integers(0, 4)) > 0:
        names = [name for name in names if name not in rare]
    # Not a list of any size: most would be short.
    size = draw(st.sampled_from(range(most + 1)))
    chosen = draw(st.lists(st.sampled_from(names), min_size=size, max_size=size, unique=True)) if size else []
    return {name: draw(st.sampled_from(values[name])) for name in chosen}


def _agree(options, name):
    """Leave out options that a constructor refuses; contradictions have tests of their own."""
    out = dict(options)
    if out.get("width"):
        out.pop("compression", None)
    if name == "cs_momentum" and "momentum" in out:
        out.pop("betas", None)
    if name == "sketchy":
        if out.get("preset") == "paper" or out.get("statistics") == "sample":
            out.pop("statistics_freq", None)
        elif out.get("tail", "trace") != "trace":
            out.pop("tail")
        if out.get("statistics_freq") == 2 and out.get("update_freq") == 1:
            out.pop("update_freq")
    return out


@st.composite
def cases(draw, name, backend, quick=False):
    """Cases of an optimizer for a backend; ``quick``: small ones that need few compilations."""
    values = table(name)
    rare = frozenset(NOT_NUMBA) if backend == "numba" else frozenset()
    options = draw(options_of(values, 5, rare))
    if draw(st.integers(0, 7)) > 0:
        options["min_compress_size"] = 0  # otherwise everything that is small enough for a test would be kept exactly
    if name == "sketchy" and draw(st.booleans()):
        options["precondition"] = "none"  # kernels handle parameters without a preconditioner
    if "weight_bits" in values and draw(st.integers(0, 3)) == 3:
        options["weight_bits"] = draw(st.sampled_from([24, 32]))
    options = _agree(options, name)
    # Options of a whole group; several groups have different ones.
    of_groups = {
        key: of
        for key, of in values.items()
        if key not in ("preset", "width", "compression", "statistics", "tail", "statistics_freq", "update_freq")
    }
    groups = [_agree(draw(options_of(of_groups, 3, rare)), name) for _ in range(draw(st.integers(1, 3)))]
    if name == "cs_momentum":
        groups = [{key: value for key, value in group.items() if key != "betas"} for group in groups]
    seed = draw(st.integers(0, 1000))

    # The interpreter takes a second for some thousand numbers; Numba needs more than its units of 4096.
    most = (1300 if quick else 2600) if backend == "triton" else 4300
    shapes = [shape for shape in SHAPES if _size(shape) <= most]
    # Large shapes twice as often, because less can go wrong in small ones.
    shapes += [shape for shape in shapes if _size(shape) > 200]
    # Numba supports two dtypes, and compiles its loops for each combination.
    dtypes = ["float32", "float32", "bfloat16"] if backend == "numba" else ["float32", "bfloat16", "float16"]
    if draw(st.integers(0, 9)) == 9:
        dtypes = ["float64", "float16"]
    if options.get("weight_bits"):
        dtypes = ["bfloat16", "bfloat16", "float32"] if backend == "numba" else ["float16", "bfloat16"]
    mixed = not quick and draw(st.integers(0, 3)) == 3  # gradients of another dtype than the parameter
    plainly = draw(st.booleans())  # contiguous parameters and gradients: all that Numba takes
    tensors = []
    for _ in range(draw(st.sampled_from([1, 2] if quick else [1, 2, 3] if backend == "triton" else [1, 2, 3, 4]))):
        shape = draw(st.sampled_from(shapes))
        if name == "sketchy" and tensors and draw(st.booleans()):  # those of equal shape are stacked
            shape = tensors[-1]["shape"]
        tensors.append(
            {
                "shape": shape,
                "dtype": draw(st.sampled_from(dtypes)),
                "layout": "contiguous" if plainly else draw(st.sampled_from(LAYOUTS)),
                "group": draw(st.integers(0, len(groups) - 1)),
            }
        )
    case = {"optimizer": name, "options": options, "groups": groups, "tensors": tensors, "seed": seed}
    if backend == "numba" and not quick and draw(st.integers(0, 15)) == 15:
        # Kernels are not requested, and a tensor is large enough to use them by default.
        case["fused"] = None
        tensors[0] = {**tensors[0], "shape": (257, 129), "dtype": "float32"}
    if backend == "triton" and "capturable" in registry.get(name).options and draw(st.integers(0, 7)) == 7:
        case["capturable"] = True
    change = changeable(name)
    case["steps"] = []
    for number in range(draw(st.sampled_from([1, 2, 3] if quick else [1, 2, 3, 4]))):
        calm = draw(st.sampled_from([True, False, False]))
        grads = []
        for tensor in tensors:
            spec = {"kind": "normal" if calm else draw(st.sampled_from(KINDS))}
            if not plainly or draw(st.integers(0, 9)) == 9:
                spec["layout"] = draw(st.sampled_from(GRADIENT_LAYOUTS))
            if mixed and tensor["dtype"] != "float64":
                spec["dtype"] = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
            grads.append(spec)
        step = {"grads": grads}
        if number and draw(st.booleans()):
            group = draw(st.integers(0, len(groups) - 1))
            changed = _agree(draw(options_of(change, 2, rare)), name)
            if name == "sketchy":
                changed = {k: v for k, v in changed.items() if k not in ("statistics_freq", "update_freq", "tail")}
            step["change"] = {group: changed}
        step["then"] = draw(st.sampled_from(THEN))
        case["steps"].append(step)
    return case


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size

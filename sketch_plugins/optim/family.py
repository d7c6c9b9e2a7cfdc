"""The options that several optimizers share, each declared once. `declaring` makes tables and docstrings from them."""

from __future__ import annotations

from typing import Annotated, TypedDict

from sketch_plugins.hashing import HASHES
from sketch_plugins.optim.declaring import declared, option, unused
from sketch_plugins.optim.options import BY_POSITION, Option
from sketch_plugins.stores.kinds import FIRST_MOMENTS, SECOND_MOMENTS
from sketch_plugins.stores.sketch import BUCKETS, TABLE_DTYPES

#: The RMS of weights with which `scale_parameter` takes AdamW's learning rate. It was measured (docs/benchmarks.md) and
#: is near 0.02, the standard deviation with which transformers are initialised.
TYPICAL_RMS = 0.017
#: Update clipping and relative steps (Adafactor), in the form that takes AdamW's learning rate: options of presets.
ADAFACTOR_DEVICES = {"update_clip": 1.0, "scale_parameter": True, "reference_rms": TYPICAL_RMS}
#: Options that a checkpoint may be too old to have -> the values that it was trained with.
BEFORE = {"batch_dims": 0, "reference_rms": 1.0, "weight_bits": None, "embedding_rate": 1.0, "row_scales": False}


class Batches(TypedDict, total=False):
    """Which axes of a tensor make a matrix."""

    batch_dims: Annotated[
        int | str | None,
        option(
            "auto",
            "how many of a tensor's first axes are a batch of matrices. With 1 a tensor of three or more dimensions is "
            "a batch of matrices, and each of them has buckets of its own (``compression`` and ``width`` are those of "
            "one matrix), covers and covariances; no expert shares them with another one. "
            "``update_clip`` and ``scale_parameter`` measure each matrix by itself. With 0 dimension 0 is the rows. "
            '``"auto"``: 1 for a tensor ``(E, R, D)`` whose R and D are 16 or more, if E is at most R and D, or if D '
            "is 256 or more; 0 for all others, such as convolutions. It does not change how tensors without sketches, "
            "covers and covariances are kept.",
            choices=("auto", 0, 1),
            structural=True,
        ),
    ]


class Vocabularies(TypedDict, total=False):
    """The step of embeddings and output layers."""

    embedding_rate: Annotated[
        float | None,
        option(
            2.0,
            "the factor of the learning rate for embeddings and output layers whose rows share buckets of the second "
            "moment: matrices of 8,192 rows or more, and 128 columns or more, if the rows are more than 16 times the "
            "columns. Weight decay and row-sparse gradients do not have it.",
            allowed="a number > 0",
            check=lambda v: v > 0,
        ),
    ]


class RowScales(TypedDict, total=False):
    """The step of rows whose gradients are large."""

    row_scales: Annotated[
        bool | None,
        option(
            True,
            "rows whose gradients are larger than those of their bucket take steps that are shorter by as much, so "
            "that they have the size of Adam's. The step of row i is divided by ``sqrt(max(1, r_i / R))``, where r_i "
            "averages the mean square of its gradient and R is the mean of r over the bucket. It holds for tables of "
            'means with ``depth=1`` and ``bucket="mean"``, and matrices of 128 columns or more that are no embeddings '
            "or output layers (see ``embedding_rate``). It takes ``4 / D`` bytes a parameter.",
            structural=True,
        ),
    ]


class Sketches(TypedDict, total=False):
    """How rows fall into the buckets of a sketch."""

    compression: Annotated[
        float | None,
        option(
            0.05,
            "number of buckets in each of the ``depth`` tables, as a fraction of the rows. 1.0 gives every row its own "
            "bucket, which is the dense method.",
            allowed="a number in (0, 1]",
            check=lambda v: 0 < v <= 1,
            structural=True,
        ),
    ]
    width: Annotated[
        int | None,
        option(
            0,
            "number of buckets, in place of ``compression``, at most one for each row; 0: use ``compression``.",
            allowed="an integer >= 0",
            check=lambda v: v >= 0,
            structural=True,
        ),
    ]
    depth: Annotated[
        int | None,
        option(
            1,
            "number of hashes, one table each; the estimate is the minimum (second moment) or median (first moment).",
            allowed="an integer >= 1",
            check=lambda v: v >= 1,
            structural=True,
        ),
    ]
    hash: Annotated[
        str | None,
        option(
            "strided",
            '``"strided"``: row mod width for the first table; ``"affine"``: a seeded bijection, ``(a * row + b) mod R '
            "mod width``; see `sketch_plugins.hashing`.",
            choices=HASHES,
            structural=True,
        ),
    ]
    table_dtype: Annotated[
        str | None,
        option(
            "fp32",
            "dtype of the sketches' tables; "
            '``"bf16"`` takes half the bytes. A bfloat16 table is rounded stochastically at every write, so that its '
            "expected value is the float32 table's. The noise is a function of (seed, step, cell), so runs repeat and "
            "resume bit for bit. Rounding to nearest is not offered: at ``betas[1]=0.999`` a step without gradient "
            "lowers a cell by 1/1000, less than half a unit in the last place of bfloat16 (1/512 or more), so every "
            "such step would be rounded away, and no cell could ever decay.",
            choices=TABLE_DTYPES,
            structural=True,
        ),
    ]


class FirstMoment(TypedDict, total=False):
    """How a first moment is kept."""

    first_moment: Annotated[
        str | None, option("int8", "how the first moment is kept.", choices=tuple(FIRST_MOMENTS), structural=True)
    ]
    block_size: Annotated[
        int | None,
        option(
            128,
            "columns that share one scale of an int8 first moment, which costs ``4 / block_size`` bytes a parameter.",
            allowed="an integer >= 1",
            check=lambda v: v >= 1,
            structural=True,
        ),
    ]
    first_moment_rounding: Annotated[
        str | None, option("nearest", "rounding of int8 codes.", choices=("nearest", "stochastic"))
    ]


class SignedSketch(TypedDict, total=False):
    """Whether a first moment may be kept in a signed sketch."""

    allow_dense_count_sketch: Annotated[
        bool | None,
        option(
            False,
            "allow a signed sketch of a dense first moment, which is refused by default because it does not train.",
        ),
    ]


class SecondMoment(TypedDict, total=False):
    """How a second moment is kept."""

    second_moment: Annotated[
        str | None,
        option(
            "count_min",
            'how the second moment is kept. ``"cover"`` is SM3-II\'s maxima over the slices of each axis, as an '
            'average (see `SM3`); ``"log8"`` has 8 bits for each number, within a sixteenth of it (see '
            "`sketch_plugins.stores.Log8`). The options of a sketch have no effect on these two and on "
            '``"dense"``.',
            choices=tuple(kind for kind in SECOND_MOMENTS if kind != "none"),
            structural=True,
        ),
    ]
    clean_every: Annotated[
        int | None,
        option(
            0,
            "multiply the sketched second moment by ``clean_factor`` every ``clean_every`` steps, before the "
            "update; 0: never.",
            allowed="an integer >= 0",
            check=lambda v: v >= 0,
        ),
    ]
    clean_factor: Annotated[
        float | None,
        option(0.2, "factor of ``clean_every``.", allowed="a number in [0, 1]", check=lambda v: 0 <= v <= 1),
    ]


class Buckets(TypedDict, total=False):
    """How a bucket combines several rows."""

    bucket: Annotated[
        str | None,
        option(
            "mean",
            "how a bucket combines the ``g * g`` of its rows, for dense gradients.",
            choices=BUCKETS,
            structural=True,
        ),
    ]


class Clipping(TypedDict, total=False):
    """What limits or scales the size of a step."""

    update_clip: Annotated[
        float | None,
        option(
            0.0,
            "divide the update by ``max(1, RMS(update) / update_clip)`` (Adafactor's d; 0: off). Each matrix of a "
            "batch (``batch_dims``) has an RMS of its own.",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
        ),
    ]
    scale_parameter: Annotated[
        bool | None,
        option(
            False,
            "multiply the step by ``max(1e-3, RMS(parameter)) / reference_rms``: steps relative to the weights. Each "
            "matrix of a batch (``batch_dims``) has an RMS of its own.",
        ),
    ]
    reference_rms: Annotated[
        float | None,
        option(
            1.0,
            "with scale_parameter, the RMS of weights for which a step uses lr itself. 1: lr is relative to weights "
            "(Adafactor's relative step), 2e-2 to 2e-1. 0.017, which some presets set: AdamW's learning rate carries "
            "over, because weights have an RMS of about 0.02 (docs/algorithms.md). Below 1 the factor is at most 20. "
            "It has no effect without scale_parameter.",
            allowed="a number > 0",
            check=lambda v: v > 0,
        ),
    ]


class Lagged(TypedDict, total=False):
    """When the size of a step is measured."""

    lagged_rms: Annotated[
        bool | None,
        option(
            False,
            "update_clip and scale_parameter use the RMS of the previous step: of its update before clipping, "
            "and of the parameter as it was read. A step then needs one sweep over gradient and parameter, not "
            "two (12 bytes a float32 parameter, not 20), and an update that grows is clipped one step late. Each "
            "parameter (each matrix of a batch) has two more numbers of state, whether or not update_clip and "
            "scale_parameter are on. The "
            "first step of a parameter, and every row-sparse step, measures before it steps, as without this "
            "option; the next step uses what it measured.",
            structural=True,
        ),
    ]


class Kernels(TypedDict, total=False):
    """Ways to run a step other than eager torch."""

    compile: Annotated[
        bool | None,
        option(
            False,
            "compile the eager step with torch.compile, for dense gradients. This needs a C++ compiler on a CPU "
            "and some seconds in the first step; later steps are faster on a CPU (docs/benchmarks.md). The bits "
            "differ from those of the eager step. Do not use it with a scheduler that changes betas: torch would "
            "compile again for every new value.",
        ),
    ]
    capturable: Annotated[
        bool | None,
        option(
            False,
            "keep step counters on the device, so that the step can be captured in a CUDA graph (Triton kernels only, "
            "not with row-sparse gradients, and not if sketches are cleaned).",
        ),
    ]


class Steps(TypedDict, total=False):
    """Options of every step."""

    min_compress_size: Annotated[
        int | None,
        option(
            4096,
            "tensors with fewer elements, and all vectors, are kept exactly.",
            allowed="an integer >= 0",
            check=lambda v: v >= 0,
            structural=True,
        ),
    ]
    row_sparse: Annotated[
        bool | str | None,
        option(
            False,
            'for dense gradients. False updates every row; True skips rows that are all zero; ``"auto"`` does so in a '
            "step in which at least half of the rows are zero. With True and auto, models in which most rows are rare "
            'learn much more slowly: 60 steps of a sentence-transformers model end at a loss of 1.90 with ``"auto"``, '
            "and at 0.12 with False.",
            choices=(False, True, "auto"),
        ),
    ]
    chunk_size: Annotated[
        int | None,
        option(
            0,
            "elements that an eager step works on at a time: its temporaries are a few times as large (0: 2**20 on a "
            "CPU, 2**22 compiled, 2**24 on an accelerator).",
            allowed="an integer >= 0",
            check=lambda v: v >= 0,
        ),
    ]
    fused: Annotated[
        bool | None,
        option(
            None,
            "take the step with a kernel that reads parameter and gradient once. None: Triton's kernels on CUDA "
            "and ROCm, Numba's on a CPU (if the extra ``cpu`` is installed and a tensor has 32768 elements or "
            "more), eager torch otherwise. True: an error if there are no kernels; a tensor that the kernels do "
            "not support takes an eager step, with a warning. False: eager torch. The three round differently, "
            "and each of them repeats its own bits. A kernel that differs from eager torch on a GPU is not used "
            "there, with a warning (docs/check.md).",
            choices=(None, True, False),
        ),
    ]
    stochastic_rounding: Annotated[
        bool | None,
        option(
            False,
            "bfloat16 parameters are rounded up or down at random, so that the expected value is exact. Updates below "
            "half a unit in the last place are then not lost, and no float32 master copy is needed. The noise is a "
            "function of (seed, step, element), with elements numbered in each rank's shard.",
        ),
    ]
    weight_bits: Annotated[
        int | None,
        option(
            None,
            "keep the bits of a weight that a bfloat16 or float16 parameter cannot hold among the state, and use them "
            "in every step: 24 bits a weight take one byte more and are rounded stochastically; 32 take two, which for "
            "bfloat16 is float32 itself. The parameter holds the nearest weight of its dtype. Parameters of other "
            "dtypes do not change, and ``stochastic_rounding`` has no effect on weights with more bits. If other code "
            "writes a weight, its additional bits become void, see docs/weight_bits.md.",
            choices=(None, 24, 32),
            structural=True,
        ),
    ]
    seed: Annotated[
        int | None, option(0, "seed of all random choices; equal seeds give equal results.", structural=True)
    ]
    maximize: Annotated[bool | None, option(False, "ascend instead of descend.")]


class CoupledDecay(TypedDict, total=False):
    """Which kind of weight decay is used."""

    decoupled_weight_decay: Annotated[
        bool | None,
        option(
            False,
            "False: ``weight_decay * p`` is added to the gradient, as in torch.optim; True: the parameter is decayed "
            "by ``lr * weight_decay``, as in AdamW.",
        ),
    ]


class Torchs(TypedDict, total=False):
    """Arguments of torch's optimizers that have no effect here, so that AdamW's arguments can be passed on."""

    amsgrad: Annotated[bool, unused((False,), "the maxima of AMSGrad are not kept")]
    foreach: Annotated[bool | None, unused((None, False), "fused=True is what asks for kernels here")]
    differentiable: Annotated[bool, unused((False,), "a step changes parameters in place, outside of autograd")]


class Decoupled(Torchs, total=False):
    """The same for AdamW's arguments. These optimizers decouple the weight decay, as AdamW does."""

    decoupled_weight_decay: Annotated[bool, unused((True,), "weight decay is decoupled, as in AdamW")]


class _Family(
    Sketches,
    Vocabularies,
    Batches,
    FirstMoment,
    SignedSketch,
    SecondMoment,
    Buckets,
    Clipping,
    Lagged,
    Kernels,
    Steps,
    total=False,
):
    pass


#: These options, by name.
FAMILY: dict[str, Option] = {**BY_POSITION, **declared(_Family)}

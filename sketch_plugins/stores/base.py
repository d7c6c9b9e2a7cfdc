"""The interface of a store, and the gradient that is written to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.kernels.compilation import compiled
from sketch_plugins.sharding.blocks import At, Matrix, Rows, Tile, matrix_shape, row_batches, tiles

State = dict[str, Tensor]
T = TypeVar("T")


class Ema(NamedTuple):
    """One step of an accumulator: ``s <- decay * s + gain * x``.

    An exponential moving average has ``gain = 1 - decay``, Adagrad's sum has ``decay = gain = 1``, and SGD's momentum
    buffer has ``gain = 1``. ``step`` (from 1) seeds stochastic rounding.
    """

    decay: float
    gain: float
    step: Any = 0

    def repeated(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """``(decay, gain)`` of ``times`` steps with the same x: ``a**c`` and ``b * (1 - a**c) / (1 - a)``.

        If a step touches ``c`` rows of one bucket, their c values are replaced by their mean. So the order of the rows
        does not matter, and the result stays within the range of its inputs for any c. (Reading c old values and
        adding c updates would multiply the bucket by ``1 - c * (1 - decay)``, which diverges for c > 20 at decay 0.9.)
        For ``decay = 1`` the gain becomes ``b * c``, which is a sum.
        """
        c = times.to(torch.float64)
        if self.decay == 1.0:
            return torch.ones_like(c), self.gain * c
        decay = self.decay**c
        return decay, self.gain * ((1.0 - decay) / (1.0 - self.decay))


class Gradient:
    """One parameter's gradient as a matrix: all of it, or only its touched rows.

    Args:
        matrix: the gradient as ``(R, D)``, or the values ``(n, D)`` of a sparse gradient.
        rows: the touched rows, distinct and ascending (int64). None means all rows.
        dtype: arithmetic dtype (float32, or float64 for float64 parameters).
        chunk: number of elements of a tile.
        shape: ``(R, D)`` of the parameter.
        packed: ``matrix`` holds only the touched rows (a sparse gradient), in the order of ``rows``.
        negate: use the negative gradient, which ascends instead of descending (``maximize``).
        compile: run the functions of a tile through torch.compile.
        matrices: number of matrices that the rows of the parameter belong to. Their rows follow each other.
        l2: ``(parameter, weight)`` adds ``weight * p`` to the gradient (coupled weight decay).
        measured: number of matrices whose root mean squares are measured one by one. Their rows follow each other. It
            is ``matrices`` where that is more than 1. Where rows share no state, ``matrices`` is 1.
    """

    def __init__(
        self,
        matrix: Matrix,
        rows: Tensor | None,
        dtype: torch.dtype,
        chunk: int,
        shape: tuple[int, int],
        packed: bool = False,
        negate: bool = False,
        l2: tuple[Matrix, float] | None = None,
        compile: bool = False,
        matrices: int = 1,
        measured: int = 1,
    ) -> None:
        self.matrix, self.rows, self.dtype, self.chunk, self.shape = matrix, rows, dtype, chunk, shape
        self.packed, self.negate, self.l2, self.compile = packed, negate, l2, compile
        self.matrices, self.measured = matrices, measured
        self._touched: list[tuple[int, int]] | None = None
        self.device = matrix.device

    def of(self, parameter: Matrix, matrix: Matrix | None = None) -> Gradient:
        """The same gradient for a copy of the parameter (and, if ``matrix`` is given, with a copy of its values)."""
        l2 = None if self.l2 is None else (parameter, self.l2[1])
        return Gradient(
            matrix or self.matrix, self.rows, self.dtype, self.chunk, self.shape, self.packed, self.negate, l2,
            self.compile, self.matrices, self.measured,
        )  # fmt: skip

    def batches(self, period: int = 0, align: int = 1) -> Iterator[At]:
        """The places of all elements, one chunk at a time: tiles, or batches of touched rows of a sparse gradient."""
        if self.rows is None:
            yield from self.distinct(tiles(*self.shape, self.chunk, period, align, self.matrices), lambda at: at.shape)
        else:
            for part, at in row_batches(self.shape[0], self.rows, self.shape[1], self.chunk, align):
                yield Touched(at.total, at.rows, at.lo, at.hi, part)

    def of_matrices(self, period: int = 0, align: int = 1, apart: bool = True) -> Iterator[tuple[int, At]]:
        """`batches` that have rows of one measured matrix each, with its number; `batches` and 0 without ``apart``."""
        if self.measured == 1 or not apart:
            yield from ((0, at) for at in self.batches(period, align))
            return
        height = self.shape[0] // self.measured
        if self.rows is None:
            cut = tiles(*self.shape, self.chunk, period, align, self.measured, apart=True)
            yield from ((at.start // height, at) for at in self.distinct(cut, lambda at: at.shape))
            return
        for matrix, (first, last) in enumerate(self.touched):
            for part, at in row_batches(self.shape[0], self.rows[first:last], self.shape[1], self.chunk, align):
                position = slice(first + part.start, first + part.start + len(at.rows))
                yield matrix, Touched(at.total, at.rows, at.lo, at.hi, position)

    @property
    def touched(self) -> list[tuple[int, int]]:
        """For each measured matrix, the range of its rows among the touched rows. The host reads it from the device."""
        assert self.rows is not None
        if self._touched is None:
            height = self.shape[0] // self.measured
            ends = torch.arange(self.measured + 1, device=self.rows.device) * height
            self._touched = list(pairwise(torch.searchsorted(self.rows, ends).tolist()))
        return self._touched

    def distinct(self, places: Iterable[T], shape: Callable[[T], Any]) -> Iterator[T]:
        """All ``places``. If the gradient is on the meta device, only the first place of each shape.

        A rehearsal steps such tensors to find the temporaries of a step, which only depend on shapes. On the meta
        device each operator takes half a millisecond, so places of equal shape are not repeated.
        """
        if self.device.type != "meta":
            yield from places
            return
        seen = set()
        for place in places:
            if (one := shape(place)) not in seen:
                seen.add(one)
                yield place

    def like(self, tensor: Tensor) -> Matrix:
        """A tensor of the parameter's shape, as a matrix of the same form."""
        return Matrix(tensor, self.matrix.batch)

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a tile, compiled if ``compile`` is set."""
        return compiled(function) if self.compile else function

    def get(self, at: At) -> Tensor:
        """The gradient at a place in the arithmetic dtype, valid until the next call. It may be a view: read only."""
        if self.packed:
            assert isinstance(at, Touched)
            if isinstance(at.position, slice):
                x = self.matrix.get(Tile(at.total, at.position.start, 1, len(at.rows), at.lo, at.hi))[0]
            else:
                x = self.matrix.get(Rows(at.total, at.position, at.lo, at.hi))
        else:
            x = self.matrix.get(at)
        if x.dtype == self.dtype and not self.negate and self.l2 is None:
            return x
        g = scratch.cast("gradient", x, self.dtype)
        if self.negate:
            g.neg_()
        if self.l2 is not None:
            g.add_(self.l2[0].get(at), alpha=self.l2[1])
        return g


class Estimates(Matrix):
    """The estimates of a store as a matrix, so that another store can be assigned them."""

    def __init__(self, store: Store, state: State, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.store, self.state, self.shape, self.dtype = store, state, shape, dtype
        self.device = next(iter(state.values())).device

    def views(self, at: At) -> bool:
        """False: nothing is written into estimates."""
        return False

    def get(self, at: At) -> Tensor:
        """The estimate at a place. It may be a view of the state: read only."""
        return self.store.read(self.state, at, self.dtype).expand(at.shape)


# Elements of a tile when no step sets its size. Such a tile fits a CPU's cache.
CHUNK = 1 << 18


def given(values: Tensor | Gradient, order: int) -> Gradient:
    """The argument of `Store.assign` as a `Gradient`, which is read one tile at a time.

    Raises:
        ValueError: the values are second moments (``order`` 2) and one is negative, or there are only touched rows.
    """
    if isinstance(values, Gradient):
        if values.rows is not None:
            raise ValueError(
                f"there are values for {len(values.rows)} touched rows only; assign needs values for every row"
            )
        return values
    if order == 2 and values.numel() and (least := float(values.min())) < 0:
        raise ValueError(f"a second moment has the value {least:g}, but its values must be >= 0")
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return Gradient(Matrix(values), None, dtype, CHUNK, matrix_shape(values.shape))


class Touched(Rows):
    """Touched rows together with their positions in a packed gradient."""

    def __init__(self, total: int, rows: Tensor, lo: int, hi: int, position: slice | Tensor) -> None:
        super().__init__(total, rows, lo, hi)
        object.__setattr__(self, "position", position)

    position: slice | Tensor


class Store:
    """How one moment of a parameter is kept: an object without state of its own, which works on plain tensors.

    ``allocate`` makes the tensors, ``write`` adds a whole gradient, and ``read`` returns the estimate of a tile in the
    arithmetic dtype. If a row has cells of its own (dense, int8), no pass is needed before reading: ``advance`` reads,
    blends and writes one tile and returns the new estimate. If rows share cells (``shared``), there are two ways:

    * With ``write_first`` (sketches, SM3-I) every row has to be written before any is read. The optimizer calls
      ``write`` first, and ``advance`` only reads.
    * Otherwise (SM3-II) a step reads what the last step left. ``begin`` returns a working state, ``advance`` gets it
      for every tile, and ``finish`` takes the new state from it.

    Attributes:
        shared: rows share cells, so estimates are not exact.
        write_first: every row has to be written before any is read.
        by_bucket: all rows of one bucket have the same estimate.
        tiles_apart: kernels need tiles that have rows of one matrix of a batch each.
        order: 1 if the store accumulates x = g, 2 if it accumulates x = g * g.
        align: tiles start at columns that are multiples of this number.
        block_size: number of columns of a block, or 0 if the store has no blocks.
        kernel: name of the function in `kernels/gpu` (first.py or second.py) that reads and writes the store; empty if
            there is none.
    """

    shared = False
    write_first = False
    by_bucket = False
    tiles_apart = False
    order = 1
    align = 1
    block_size = 0
    kernel = ""

    def loop(self, rows: int) -> str:
        """Name of Numba's loop for a matrix with this number of rows (see `kernels/cpu.py`); empty if there is none."""
        return ""

    def why_impossible(self, name: str, tensor: Tensor) -> str | None:
        """What is wrong with a saved tensor whose shape and dtype are right and whose numbers are finite, or None."""
        return None

    def allocate(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed state tensors for an ``(R, D)`` parameter; ``dtype`` is the arithmetic dtype."""
        return {
            name: torch.zeros(size, dtype=kind, device=device)
            for name, (size, kind) in self.layout(shape, dtype).items()
        }

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype of every state tensor, by name."""
        raise NotImplementedError

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state of an ``(R, D)`` parameter, computed without allocating it."""
        total = 0
        for size, kind in self.layout(shape, dtype).values():
            n = kind.itemsize
            for s in size:
                n *= s
            total += n
        return total

    def period(self, rows: int) -> int:
        """Number of buckets of a strided hash (of each matrix), at which tiles should be cut; 0 if there is none."""
        return 0

    def bucket_of(self, at: Tile) -> int:
        """The bucket of the first row of a tile that was cut at the period."""
        raise NotImplementedError

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The estimate, in a shape that broadcasts to ``at.shape``. It may be a view of the state: read only."""
        raise NotImplementedError

    def used(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The second moment that a step divides by. It is the estimate, unless the store says otherwise."""
        return self.read(state, at, dtype)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Add a whole gradient: ``s <- decay * s + gain * x`` for every row, or for the touched rows."""
        working = self.begin(state, grad)
        for at in grad.batches(align=self.align):
            self.advance(working, at, grad.get(at), ema)
        self.finish(state, working, grad)

    def step_factors(self, state: State, grad: Gradient) -> Tensor | None:
        """``(R, 1)``: what the steps of the rows are multiplied by; None: 1. A step calls it before `write`."""
        return None

    def begin(self, state: State, grad: Gradient) -> State:
        """The working state that ``advance`` gets for every tile: here the state itself, as tiles share nothing."""
        return state

    def finish(self, state: State, working: State, grad: Gradient) -> None:
        """After the last tile: copy into the state what the tiles left in ``working``, which `begin` returned."""

    def advance(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """The estimate after this step. A store whose rows have cells of their own also writes it."""
        slices = self.slices(state, at, ema.step)
        est = self.blend(slices, self.view(g), ema)
        self.write_back(state, at, slices)
        return self.unview(est)

    def view(self, tensor: Tensor) -> Tensor:
        """The tile in the shape that `blend` works on."""
        return tensor

    def unview(self, tensor: Tensor) -> Tensor:
        """The inverse of `view`."""
        return tensor

    def slices(self, state: State, at: At, step: int) -> State:
        """The part of the state that `blend` needs at a place: views for a tile, copies for rows."""
        return {name: at.get(tensor) for name, tensor in state.items()}

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """Blend the gradient into the slices, in place, and return the estimate, which may be one of them."""
        raise NotImplementedError

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Write the slices to the state if they were copies."""
        if isinstance(at, Rows):
            for name, tensor in state.items():
                at.put(tensor, slices[name])

    def peek(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """What `advance` would return, without changing the state."""
        old = self.read(state, at, g.dtype)
        return old if self.write_first else blend(scratch.cast(f"peek {self.order}", old, g.dtype), g, ema, self.order)

    def fill(self, state: State, value: float) -> None:
        """Set every estimate of freshly allocated state to ``value`` (Adagrad's initial accumulator)."""
        raise NotImplementedError

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        r"""Set freshly allocated state so that it holds ``values`` as well as the store can.

        ``values`` are the accumulator itself (m, or v >= 0), not the gradients that it is made of. The state is the
        store's linear map of them. If `write` is linear in the accumulator (dense, count-min and count-sketch), this
        is what the store would hold if it had been written with the gradients behind the values. Each store holds:

        ============= =======================================================================================
        dense         the values; bfloat16 is rounded to nearest
        int8          their codes, rounded to nearest. Values that are codes of the same blocks keep their
                      codes, and their scales up to a unit in the last place
        log8          the nearest of sixteen numbers in each octave; such numbers themselves stay exact
        count-min     in each bucket the mean of its rows' values. With ``bucket="sum"`` it is their sum, and
                      `read` returns an upper bound, as always. A bucket of one row is exact. bfloat16 is
                      rounded stochastically
        count-sketch  the signed sum (or mean)
        row count-min each row's mean exactly, and in the profile the mean over the bucket's rows
        cover         the maximum over each slice: `read` returns an upper bound, the lowest that covers allow
        ============= =======================================================================================

        Estimates that were read from a sketch with ``bucket="sum"`` are sums already: see `estimate_scale`.

        Args:
            state: made by `allocate` for the shape of the values.
            values: a tensor (of any shape whose matrix is ``(R, D)``). If the values are not in memory at once, a
                `Gradient` without ``rows``, which is read tile by tile. No more than tiles is allocated beside them.

        Raises:
            ValueError: a tensor of second moments has a negative number, or a gradient has only touched rows.
        """
        raise NotImplementedError

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        """The factor to apply to `read` before another store is assigned it: 1, except for sketches that sum."""
        return 1.0

    def clean(self, state: State, factor: float, step: int = 0) -> None:
        """Multiply every estimate by ``factor`` (the sketches' cleaning). Other stores do nothing.

        ``step`` seeds stochastic rounding.
        """


def blend(old: Tensor, g: Tensor, ema: Ema, order: int) -> Tensor:
    """``decay * old + gain * x``, written to ``old`` and returned, with x = g or g * g."""
    if order == 2:
        return old.mul_(ema.decay).addcmul_(g, g, value=ema.gain)
    # With decay 0, lerp would turn an infinite gradient into NaN, and `update_clip` would then spread the NaN.
    if ema.decay and ema.gain == 1.0 - ema.decay:
        return old.lerp_(g, ema.gain)  # one pass, as torch.optim.AdamW does it
    return old.mul_(ema.decay).add_(g, alpha=ema.gain)

"""What every store of an accumulator can do, and the gradient it is fed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

    An exponential moving average has ``gain = 1 - decay``; Adagrad's sum ``decay = gain = 1``; SGD's momentum buffer
    ``gain = 1``. ``step`` (from 1) seeds stochastic rounding.
    """

    decay: float
    gain: float
    step: Any = 0

    def repeated(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """``(decay, gain)`` of ``times`` steps with one and the same x: ``a**c`` and ``b * (1 - a**c) / (1 - a)``.

        This is the order-free rule for ``c`` rows of one bucket touched in one step: the c values are replaced by
        their mean, so no order is needed and the result stays within the range of its inputs for any c. (Reading c
        old values and adding c updates multiplies the bucket by ``1 - c * (1 - decay)``: divergence for c > 20 at
        decay 0.9.) For ``decay = 1`` the limit is c: a sum.
        """
        c = times.to(torch.float64)
        if self.decay == 1.0:
            return torch.ones_like(c), self.gain * c
        decay = self.decay**c
        return decay, self.gain * ((1.0 - decay) / (1.0 - self.decay))


class Gradient:
    """One parameter's gradient as a matrix: all of it, or only its touched rows.

    Args:
        matrix: the gradient as ``(R, D)``; for a sparse gradient its values ``(n, D)``.
        rows: the touched rows, distinct and ascending (int64), or None where every row counts.
        dtype: arithmetic dtype (float32, or float64 for float64 parameters).
        chunk: elements of a tile.
        shape: ``(R, D)`` of the parameter.
        packed: ``matrix`` holds the touched rows only (a sparse gradient), in the order of ``rows``.
        negate: ascend instead of descend (``maximize``).
        compile: run the tile functions through torch.compile.
        matrices: how many matrices the rows of the parameter belong to, one behind the other.
        l2: ``(parameter, weight)`` adds ``weight * p`` to the gradient (coupled weight decay).
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
    ) -> None:
        self.matrix, self.rows, self.dtype, self.chunk, self.shape = matrix, rows, dtype, chunk, shape
        self.packed, self.negate, self.l2, self.compile = packed, negate, l2, compile
        self.matrices = matrices
        self.device = matrix.device

    def of(self, parameter: Matrix, matrix: Matrix | None = None) -> Gradient:
        """The same for a copy of the parameter (and, as ``matrix``, of the gradient)."""
        l2 = None if self.l2 is None else (parameter, self.l2[1])
        return Gradient(
            matrix or self.matrix, self.rows, self.dtype, self.chunk, self.shape, self.packed, self.negate, l2,
            self.compile, self.matrices,
        )  # fmt: skip

    def batches(self, period: int = 0, align: int = 1) -> Iterator[At]:
        """Where to look, a chunk at a time: tiles of a dense gradient, batches of the touched rows of a sparse one."""
        if self.rows is None:
            yield from self.distinct(tiles(*self.shape, self.chunk, period, align, self.matrices), lambda at: at.shape)
        else:
            for part, at in row_batches(self.shape[0], self.rows, self.shape[1], self.chunk, align):
                yield Touched(at.total, at.rows, at.lo, at.hi, part)

    def distinct(self, places: Iterable[T], shape: Callable[[T], Any]) -> Iterator[T]:
        """All of them; of a gradient without memory only the first of each shape.

        A step is rehearsed with such tensors to find out what temporaries it takes, which the shapes decide. torch's
        operators take half a millisecond each there.
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
        """A tensor of the parameter's shape as the same matrix."""
        return Matrix(tensor, self.matrix.batch)

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The tile function itself, or its compiled form where that was asked for."""
        return compiled(function) if self.compile else function

    def get(self, at: At) -> Tensor:
        """The gradient there in the arithmetic dtype, until the next call. Read-only: it may be a view of it."""
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
    """What a store reads, as a matrix: for `Store.assign` of another one."""

    def __init__(self, store: Store, state: State, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.store, self.state, self.shape, self.dtype = store, state, shape, dtype
        self.device = next(iter(state.values())).device

    def views(self, at: At) -> bool:
        """Nothing is written into it."""
        return False

    def get(self, at: At) -> Tensor:
        """The estimate there. Read-only: it may be a view of the state."""
        return self.store.read(self.state, at, self.dtype).expand(at.shape)


# Elements of a tile where no step says how large: what is assigned fits a CPU's cache.
CHUNK = 1 << 18


def given(values: Tensor | Gradient, order: int) -> Gradient:
    """What `Store.assign` is given, in the form of a gradient: something that is looked at a tile at a time.

    Raises:
        ValueError: a tensor of second moments (``order`` 2) with a negative number; touched rows only.
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
    """How one moment of a parameter is kept: a stateless object over plain tensors.

    ``allocate`` makes the tensors, ``write`` folds a whole gradient in, ``read`` gives the estimate of a tile in the
    arithmetic dtype. Stores in which a row has cells of its own (dense, int8) need no pass before reading:
    ``advance`` reads, blends and writes one tile and returns the new estimate. Where rows share cells (``shared``)
    there are two ways. Sketches have to be written with every row before any is read (``write_first``): the optimizer
    calls ``write`` first and ``advance`` only reads. Covers are read as the last step left them: what ``begin`` returns
    goes to ``advance`` in place of the state, tile after tile, and ``finish`` takes the new state from it.

    Attributes:
        shared: rows share cells: estimates are not exact.
        write_first: every row has to be written before any is read.
        by_bucket: rows of one bucket have the same estimate.
        order: 1: the store accumulates x = g; 2: x = g * g.
        align: column tiles start on multiples of this.
        block_size: columns of a block; 0: the store has no blocks.
        kernel: name of the function in `kernels/gpu` (first.py or second.py) that keeps it in a step; empty: none.
    """

    shared = False
    write_first = False
    by_bucket = False
    order = 1
    align = 1
    block_size = 0
    kernel = ""

    def loop(self, rows: int) -> str:
        """How Numba's loops keep it in a matrix of so many rows (see `kernels/cpu.py`); empty: they do not."""
        return ""

    def why_impossible(self, name: str, tensor: Tensor) -> str | None:
        """What is wrong with a saved tensor beyond shape, dtype and numbers that are not finite; None: nothing."""
        return None

    def allocate(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed state tensors for an ``(R, D)`` parameter; ``dtype`` is the arithmetic dtype."""
        return {
            name: torch.zeros(size, dtype=kind, device=device)
            for name, (size, kind) in self.layout(shape, dtype).items()
        }

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every state tensor."""
        raise NotImplementedError

    def nbytes(self, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state for an ``(R, D)`` parameter, without allocating it."""
        total = 0
        for size, kind in self.layout(shape, dtype).values():
            n = kind.itemsize
            for s in size:
                n *= s
            total += n
        return total

    def period(self, rows: int) -> int:
        """Buckets of a strided hash (of each matrix) that tiles should respect; 0 where there is none."""
        return 0

    def bucket_of(self, at: Tile) -> int:
        """The bucket of the first row of a tile that respects the period."""
        raise NotImplementedError

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The estimate, broadcastable to ``at.shape``. Read-only: it may be a view of the state."""
        raise NotImplementedError

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Fold a whole gradient in: ``s <- decay * s + gain * x`` for every row, or for the touched rows."""
        working = self.begin(state, grad)
        for at in grad.batches(align=self.align):
            self.advance(working, at, grad.get(at), ema)
        self.finish(state, working, grad)

    def begin(self, state: State, grad: Gradient) -> State:
        """What the ``advance`` of every tile of a step is given: the state itself, where tiles do not meet in it."""
        return state

    def finish(self, state: State, working: State, grad: Gradient) -> None:
        """After the last tile: take over into the state what they left in ``working``, which `begin` returned."""

    def advance(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """The estimate after this step; stores with cells of their own also write it."""
        slices = self.slices(state, at, ema.step)
        est = self.blend(slices, self.view(g), ema)
        self.write_back(state, at, slices)
        return self.unview(est)

    def view(self, tensor: Tensor) -> Tensor:
        """How `blend` wants to see a tile."""
        return tensor

    def unview(self, tensor: Tensor) -> Tensor:
        """What `view` was made of."""
        return tensor

    def slices(self, state: State, at: At, step: int) -> State:
        """What `blend` needs of the state there: views of it for a tile, copies for rows."""
        return {name: at.get(tensor) for name, tensor in state.items()}

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """Blend the gradient into the slices, in place; returns the estimate, which may be one of them."""
        raise NotImplementedError

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Write slices that were copies back."""
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

        ``values`` are the accumulator itself (m, or v >= 0), not what enters it. The state becomes what the store's
        linear map makes of them: where `write` is linear in the accumulator (dense, count-min and count-sketch), what
        the store would hold had it been written with the gradients that the values averaged. So

        ============= =======================================================================================
        dense         the values; bfloat16: to nearest
        int8          their codes, to nearest. Values that are codes of the same blocks keep their codes, and
                      scales to a unit in the last place
        log8          the nearest of sixteen numbers in each octave; values that are such numbers stay
        count-min     each bucket the mean of its rows' values; ``bucket="sum"``: their sum, and `read` gives
                      an upper bound, as ever. A bucket of one row is exact. bfloat16: rounded by chance
        count-sketch  the signed sum (or mean)
        row count-min the row's mean exactly; of the profile the mean over the bucket's rows
        cover         the maximum over each slice: `read` is an upper bound, the least that covers have
        ============= =======================================================================================

        Estimates that were read from a sketch with ``bucket="sum"`` are sums already: see `estimate_scale`.

        Args:
            state: of `allocate`, for the shape of the values.
            values: a tensor (of any shape whose matrix is ``(R, D)``), or, where they are not to be had at once, a
                `Gradient` without ``rows``, which is asked for tiles. Beside them no more than tiles is allocated.

        Raises:
            ValueError: a tensor of second moments with a negative number; a gradient with touched rows.
        """
        raise NotImplementedError

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        """What `read` is to be multiplied by before it is assigned to another store: 1 but for sketches that sum."""
        return 1.0

    def clean(self, state: State, factor: float, step: int = 0) -> None:
        """Multiply every estimate by ``factor`` (the sketches' cleaning); other stores have nothing to clean.

        ``step`` seeds stochastic rounding.
        """


def blend(old: Tensor, g: Tensor, ema: Ema, order: int) -> Tensor:
    """``decay * old + gain * x`` in place of ``old``, with x = g or g * g."""
    if order == 2:
        return old.mul_(ema.decay).addcmul_(g, g, value=ema.gain)
    # Without a decay, lerp would make NaN of an infinite gradient, and `update_clip` then NaN of every number.
    if ema.decay and ema.gain == 1.0 - ema.decay:
        return old.lerp_(g, ema.gain)  # what torch.optim.AdamW does, in one pass
    return old.mul_(ema.decay).add_(g, alpha=ema.gain)

"""The leading singular vectors of rows that keep arriving."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.errors import ArgumentError, MismatchError
from loraspan.linalg.incremental_checks import check_basis, check_options, check_rows, check_state, held_dtype
from loraspan.linalg.incremental_rows import HeldRows, capacity
from loraspan.linalg.incremental_view import Rotation, View, change_of_basis, leading, project
from loraspan.ops.places import carried, find_device, off_metal


class IncrementalSVD:
    r"""Follow the leading right singular vectors of rows that keep arriving, in the memory of a few rows.

    What is held is ``rank + buffer`` weighted rows ``Z`` whose Gram ``Z^T Z`` is the scatter of everything seen, less
    what was cut off. New rows are copied behind them; once twice as many have come, all are replaced by their leading
    orthogonal combinations: one Gram in float64, a small eigendecomposition, one product. The held rows are never
    assumed orthonormal, so nothing drifts, and only the number of rows so far decides when they are compressed, so the
    sizes of the blocks that they come in change no bit. Nor does reading results, or the number of threads.

    Cost: about ``8 (rank + buffer) D`` operations per row, over half of them in float64, however many came before.
    Memory: ``3 (rank + buffer) + 1`` rows, at least 65 + rank + buffer, and ``rank`` more for results that were read.

    Guarantee. Let ``X`` be all rows so far, each times its weight (and less the mean, with ``center``), ``V`` the
    basis. Each compression takes away a positive semidefinite part, so ``X^T X = Z^T Z + P`` with ``P`` their sum:

    .. math:: \|X - X V V^T\|_F^2 = \|Z - Z V V^T\|_F^2 + tr((I - V V^T) P) \le discarded = \|Z - Z V V^T\|_F^2 + tr P.

    So it is never less than the error, and the error exceeds the least possible one by no more than ``tr P``; the
    energy of ``X`` is ``sum(s^2) + discarded``. That is in exact arithmetic: every compression rounds ``Z`` by a few
    units of its dtype, which enters the root of the error like so much noise, and directions below ``2e-7`` (float32)
    or ``1e-14`` (float64) of the largest singular value are lost in it. ``discarded`` is known to ``1e-14`` of the
    energy of ``X``.

    Rows cannot be taken out again: what was cut off when they came is gone, so what is held is not theirs to subtract,
    and every later cut would have been another. ``forget`` lets old rows fade. Where rows must go, keep what they came
    from: a collection keeps each task, can drop one, and fits the bases to the rest again.

    Args:
        rank: how many singular vectors.
        buffer: directions held beyond ``rank``. With ``rank`` of them, the default (at least 8), the error on slowly
            decaying spectra is within 1e-4 of the least; with 0 it may be 1e-2.
        forget: in ``(0, 1]``. A row that ``a`` rows have followed has the weight ``forget^a``, its energy the square
            of that. 1 keeps all.
        center: subtract the mean of all rows so far, weighted by ``forget^(2 a)``, which minimises the scatter.
        device: where rows are held and combined, wherever they come from: ``"cuda"`` or ``"mps"``; ``None`` is where
            the first ones lie. The Grams of a state on MPS, and its mean, are float64 and so the CPU's.

    Attributes:
        seen: the number of rows so far.

    Raises:
        ArgumentError: if an argument is out of range.

    Example:
        >>> import torch
        >>> svd = IncrementalSVD(rank=1)
        >>> svd.update(torch.tensor([[3.0, 4.0]]))
        >>> svd.update(torch.tensor([[3.0, 4.0], [0.8, -0.6]]))
        >>> svd.basis.T, svd.s, round(svd.discarded, 6)
        (tensor([[0.6000, 0.8000]]), tensor([7.0711], dtype=torch.float64), 1.0)

    Source:
        Merging and truncating: Brand, *Fast low-rank modifications of the thin singular value decomposition*, 2006;
        a buffer of rows that is compressed when full: Ghashami, Liberty, Phillips, Woodruff, *Frequent directions*,
        2015. The mean: Ross, Lim, Lin, Yang, *Incremental learning for robust visual tracking*, 2008.
    """

    def __init__(
        self,
        rank: int,
        *,
        buffer: int | None = None,
        forget: float = 1.0,
        center: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        if buffer is None:
            buffer = max(rank, 8) if isinstance(rank, int) else 0
        check_options(rank, buffer, forget, center)
        self.rank, self.buffer, self.forget, self.center = rank, buffer, float(forget), center
        self.device = find_device("IncrementalSVD", device)
        self.seen = 0
        self._rows: HeldRows | None = None
        self._cached: View | None = None

    @cpu_by_default
    def update(self, rows: Tensor) -> None:
        """Take in newer rows.

        Args:
            rows: ``[n, D]``, float16, bfloat16, float32 or float64, any strides, ``n`` any number; a single row is
                ``[1, D]``. They are held in float32, or in float64 if the first ones are float64 (later ones are
                rounded to what the first ones were held in).

        Raises:
            ShapeError: if they are no such matrix, or have other columns or another device than those before.
            NotFiniteError: if they hold a NaN or an infinity.
            ArgumentError: if an entry is above ``2^110`` (float32) or ``2^480`` (float64) in size.
                After any of these everything is as it was.

        Example:
            >>> svd = IncrementalSVD(rank=2)
            >>> for block in torch.eye(4).split(3):
            ...     svd.update(block)
            >>> svd.seen, svd.s
            (4, tensor([1., 1.], dtype=torch.float64))
        """
        state = self._rows
        rows = check_rows("update", rows, None if state is None else state.memory, self.device)
        if not rows.shape[0]:
            return
        if state is None:
            state = self._rows = self._hold(rows, held_dtype(rows))
            if self.center:
                # as good as the mean of the first block, and known from the first row on
                state.center_on(off_metal(rows[0].to(state.memory.dtype).to(state.memory.device)).to(torch.float64))
        state.append(rows)
        self.seen += rows.shape[0]
        self._cached = None

    @cpu_by_default
    def merge(self, other: IncrementalSVD) -> None:
        """Take in all rows that ``other`` has seen, as newer than those seen here.

        So parts of a stream can be followed apart and joined in order, on one machine or many. The rows here age by
        ``other.seen``. ``other`` stays as it is.

        Args:
            other: made with the same options, of rows of the same columns, dtype and device.

        Raises:
            MismatchError: if the options or the rows of both do not fit; nothing has changed then.

        Example:
            >>> one, two = IncrementalSVD(rank=2), IncrementalSVD(rank=2)
            >>> one.update(torch.tensor([[2.0, 0.0]]))
            >>> two.update(torch.tensor([[0.0, 1.0]]))
            >>> one.merge(two)
            >>> one.seen, one.s
            (2, tensor([2., 1.], dtype=torch.float64))
        """
        got = other._options() if isinstance(other, IncrementalSVD) else type(other).__name__
        if got != self._options():
            raise MismatchError(f"IncrementalSVD.merge: other needs the options of this, {self._options()}; got {got}")
        theirs = other._rows
        if theirs is None:
            return
        if self._rows is None:
            self.load_state_dict(other.state_dict())
            return
        if self._rows.kind != theirs.kind:
            raise MismatchError(
                f"IncrementalSVD.merge: rows of both need the same columns, dtype and device; got {self._rows.kind} "
                f"here and {theirs.kind} in other"
            )
        self._rows.merge(theirs, other.seen)
        self.seen += other.seen
        self._cached = None

    @property
    def basis(self) -> Tensor:
        """The singular vectors: ``[D, k]``, orthonormal, float32 or float64 as the rows are held.

        ``k`` is ``rank``, or less where the rows so far have fewer directions. The entry of largest magnitude of a
        vector is positive.
        """
        return self._view("basis").components.T

    @property
    def s(self) -> Tensor:
        """The singular values ``[k]`` of the weighted rows, descending, float64; but for rounding never too large."""
        return self._view("s").s

    @property
    def discarded(self) -> float:
        """A bound on ``|X - X V V^T|_F^2``, the energy of the weighted rows outside the basis; see the class."""
        return self._view("discarded").discarded

    @property
    def mean(self) -> Tensor:
        """The mean of all rows so far, ``[D]``, float64, weighted by ``forget^(2 age)``; with ``center`` alone."""
        mean = self._view("mean").mean
        if mean is None:
            raise ArgumentError("IncrementalSVD.mean: make it with center=True to follow the mean; got center=False")
        return mean

    @property
    def weight(self) -> float:
        """The sum of ``forget^(2 age)`` over all rows so far: ``seen`` where nothing is forgotten."""
        return self._view("weight").weight

    @cpu_by_default
    def transform(self, rows: Tensor) -> Tensor:
        """Give the loadings of rows on the basis, ``(rows - mean) @ basis``, the mean being 0 without ``center``.

        Args:
            rows: ``[n, D]``, as for :meth:`update`.

        Returns:
            ``[n, k]``, of the dtype of :attr:`basis`; products and sums are kept in float64.

        Raises:
            ArgumentError: if no row has been seen yet; otherwise as for :meth:`update`.

        Example:
            >>> svd = IncrementalSVD(rank=1)
            >>> svd.update(torch.tensor([[0.0, 2.0]]))
            >>> svd.transform(torch.tensor([[5.0, 3.0]]))
            tensor([[3.]])
        """
        view = self._view("transform")
        rows = check_rows("transform", rows, view.components, self.device)
        return carried(project(rows, view.components, view.mean), rows.device, view.components.dtype)

    @cpu_by_default
    def rotation(self, old_basis: Tensor) -> Rotation:
        """Say how loadings on an older basis are expressed on the present one.

        Args:
            old_basis: ``[D, k_old]``, orthonormal: :attr:`basis` of any earlier moment, or of another object.

        Returns:
            ``matrix = basis^T old_basis [k, k_old]``, float64, so that ``new = matrix @ old`` for a vector of
            loadings, and ``error``, the spectral norm of ``(I - basis basis^T) old_basis``: no vector loses more than
            this share of its norm. The loss of one vector ``c`` is ``|c|^2 - |matrix c|^2``. Over several updates
            the errors add up at most; from the oldest basis straight to the present one it is exact.

        Raises:
            ShapeError: if ``old_basis`` is no such matrix on the device of the rows.
            NotFiniteError: if it holds a NaN or an infinity.
            ArgumentError: if no row has been seen yet.

        Example:
            >>> svd = IncrementalSVD(rank=1)
            >>> svd.update(torch.tensor([[0.0, 2.0]]))
            >>> old = svd.basis
            >>> svd.update(torch.tensor([[9.0, 0.0]]))
            >>> svd.rotation(old)
            Rotation(matrix=tensor([[0.]], dtype=torch.float64), error=1.0)
        """
        components = self._view("rotation").components
        return change_of_basis(components, check_basis(old_basis, components))

    @cpu_by_default
    def state_dict(self) -> dict[str, Tensor]:
        """Give copies of everything as tensors, options included, which ``safetensors.torch.save_file`` takes.

        Example:
            >>> svd = IncrementalSVD(rank=1)
            >>> svd.update(torch.ones(1, 3))
            >>> sorted(svd.state_dict())
            ['buffer', 'center', 'discarded', 'forget', 'held', 'rank', 'rows', 'seen', 'weight']
        """
        numbers, tensors = ({}, {}) if self._rows is None else self._rows.state()
        numbers |= self._options() | {"seen": self.seen}
        # not torch's default, float32, for a float
        dtypes = {name: torch.float64 if isinstance(value, float) else None for name, value in numbers.items()}
        return {name: torch.tensor(value, dtype=dtypes[name]) for name, value in numbers.items()} | tensors

    @cpu_by_default
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave, of an object with the same options.

        Args:
            state: see there.

        Raises:
            MismatchError: if an option differs.
            FormatError, NotFiniteError: if the state is not whole.
                Everything is as it was after any of these.

        Example:
            >>> one, two = IncrementalSVD(rank=1), IncrementalSVD(rank=1)
            >>> one.update(torch.ones(1, 3))
            >>> two.load_state_dict(one.state_dict())
            >>> torch.equal(one.basis, two.basis)
            True
        """
        check_state(state, self._options(), capacity(self.rank + self.buffer), self.device)
        self.seen = int(state["seen"].item())
        self._cached = self._rows = None
        if self.seen:
            like = state["rows"]
            self._rows = self._hold(like, like.dtype)
            self._rows.restore(state)

    def _hold(self, like: Tensor, dtype: torch.dtype) -> HeldRows:
        return HeldRows(like, dtype, count=self.rank + self.buffer, forget=self.forget, place=self.device)

    def _options(self) -> dict[str, int | float | bool]:
        return {"rank": self.rank, "buffer": self.buffer, "forget": self.forget, "center": self.center}

    @cpu_by_default
    def _view(self, name: str) -> View:
        if self._rows is None:
            raise ArgumentError(f"IncrementalSVD.{name}: no row has been seen yet; call update first")
        if self._cached is None:
            rows, mean, weight, cut = self._rows.compressed()
            components, s, tail = leading(rows, self.rank)
            self._cached = View(components, s, cut + tail, mean, weight)
        return self._cached

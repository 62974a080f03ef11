"""The rows that :class:`loraspan.linalg.IncrementalSVD` holds: appended, compressed when memory is full, merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.linalg.incremental_algebra import Mixing, graded_values, keep_largest, mix_merged, mix_pending
from loraspan.ops.gram import gram
from loraspan.ops.places import carried, off_metal
from loraspan.ops.reconstruct import Piece, reconstruct_many

# Combinations with less than this share of the largest energy are rounding: (2^-22)^2, four units of float32.
_FLOOR = {torch.float32: 2.0**-44, torch.float64: 0.0}
# Below this share a float64 Gram tells energies apart to fewer than 7 digits. In float32 the rows are no better.
_RESOLVED = {torch.float32: 0.0, torch.float64: 1e-9}
# Compressing fewer rows at once costs more in calls than in arithmetic.
_LEAST_BLOCK = 64


class Compressed(NamedTuple):
    """What stands for all rows so far: ``rows [m, D]``, their ``mean``, ``weight``, and the energy ``cut`` off."""

    rows: Tensor
    mean: Tensor | None
    weight: float
    cut: float


class HeldRows:
    """Few weighted rows whose Gram ``Z^T Z`` is the scatter of everything seen, less what was cut off.

    Rows fill ``memory [capacity, D]`` from the front; when it is full, they are replaced by their ``count`` leading
    orthogonal combinations. With ``center``, row 0 is ``shift - mean`` and the pending rows are less ``shift``: the
    mean rounded to the dtype of the rows, so that nothing cancels and subtracting it is exact.

    Attributes:
        memory: see above; a row past ``filled`` means nothing.
        held: rows left by the last compression; those behind them are pending.
        filled: rows in use, row 0 among them.
        weight: the sum of squared weights of what was seen before the pending rows.
        cut: the energy that compression has cut off of that.
        mean: ``[D]``, float64, of that, on the CPU where memory lies on MPS; None without ``center``.
        shift: ``[D]``; None without ``center``.
    """

    def __init__(
        self, like: Tensor, dtype: torch.dtype, *, count: int, forget: float, place: torch.device | None
    ) -> None:
        self.count, self.forget = count, forget
        self.memory = torch.empty(capacity(count), like.shape[1], dtype=dtype, device=place or like.device)
        self.first = self.held = self.filled = 0
        self.weight = self.cut = 0.0
        self.mean: Tensor | None = None
        self.shift: Tensor | None = None

    @property
    def pending(self) -> int:
        """How many rows have come since the last compression."""
        return self.filled - self.first - self.held

    @property
    def rows(self) -> Tensor:
        """The held rows and the pending ones behind them."""
        return self.memory[self.first : self.filled]

    @property
    def kind(self) -> tuple[int, torch.dtype, torch.device]:
        """Columns, dtype and device."""
        return self.memory.shape[1], self.memory.dtype, self.memory.device

    def center_on(self, mean: Tensor) -> None:
        """Take ``mean [D]``, float64, for that of what is held; where nothing is, any row will do."""
        shift = mean.to(self.memory.dtype)
        self.mean, self.shift = mean, shift.to(self.memory.device)
        self.memory[0] = carried(shift.to(torch.float64) - mean, self.memory.device, self.memory.dtype)
        self.first = 1
        self.filled = max(self.filled, 1)

    def append(self, rows: Tensor) -> None:
        """Copy ``rows [n, D]`` to the end, and compress whenever memory is full."""
        start, count, size = 0, rows.shape[0], self.memory.shape[0]
        while start < count:
            step = min(count - start, size - self.filled)
            piece = rows if step == count else rows[start : start + step]
            place = self.memory[self.filled : self.filled + step]
            if piece.device != place.device:
                piece = carried(piece, place.device, place.dtype)
            if self.shift is None:
                place.copy_(piece)
            else:
                torch.sub(piece, self.shift, out=place)
            start += step
            self.filled += step
            if self.filled == size:
                self.compress()

    def compress(self) -> None:
        """Replace held and pending rows by their leading combinations."""
        if self.pending:
            self._adopt(self._combine(self._mix(), in_place=True))

    def compressed(self) -> Compressed:
        """Give what :meth:`compress` would leave, and change nothing."""
        if self.pending:
            return self._combine(self._mix(), in_place=False)
        return Compressed(self.rows, self.mean, self.weight, self.cut)

    def merge(self, newer: HeldRows, seen: int) -> None:
        """Take in a state of ``seen`` newer rows, which is left as it is."""
        # before anything else, since it may be this one
        theirs = newer.compressed()
        self.compress()
        older, end = self.held, self.filled + len(theirs.rows)
        self.memory[self.filled : end] = theirs.rows
        apart = None if self.mean is None or theirs.mean is None else theirs.mean - self.mean
        if apart is not None:
            self.memory[0] = carried(apart, self.memory.device, self.memory.dtype)
        self.filled = end
        mixing = mix_merged(
            older,
            end - self.first - older,
            aged=self.forget**seen,
            weight=self.weight,
            mass=theirs.weight,
            center=apart is not None,
        )
        done = self._combine(mixing, in_place=True)
        mean = None if self.mean is None or apart is None else self.mean + mixing.newer * apart
        self._adopt(done._replace(mean=mean, cut=done.cut + theirs.cut))

    def state(self) -> tuple[dict[str, int | float], dict[str, Tensor]]:
        """Give numbers and tensors from which :meth:`restore` goes on with the same bits."""
        tensors = {"rows": self.rows.clone()}
        if self.mean is not None and self.shift is not None:
            tensors |= {"mean": self.mean.clone()}
        return {"held": self.held, "weight": self.weight, "discarded": self.cut}, tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state` gave, into a new object."""
        if "mean" in state:
            at_home = self.memory.device.type != "mps"
            self.center_on(state["mean"].to(self.memory.device if at_home else "cpu", copy=True))
        self.held, self.filled = int(state["held"].item()), self.first + len(state["rows"])
        self.weight, self.cut = state["weight"].item(), state["discarded"].item()
        self.rows.copy_(state["rows"].to(self.memory.device))

    def _mix(self) -> Mixing:
        return mix_pending(
            self.held, self.pending, forget=self.forget, weight=self.weight, center=self.mean is not None
        )

    def _combine(self, mixing: Mixing, *, in_place: bool) -> Compressed:
        x = self.memory[: self.filled]
        floor, resolved = _FLOOR[x.dtype], _RESOLVED[x.dtype]
        weights, cut = keep_largest(gram(x, precision="f64"), mixing, self.count, floor=floor, resolved=resolved)
        # the mean of the pending rows comes with the rest, as one more row in front
        front = 0 if mixing.share is None else 1
        if mixing.share is not None:
            weights = torch.cat([torch.from_numpy(mixing.share).unsqueeze(0), weights])
        room = self.memory[self.first - front :] if in_place else None
        out = _combined(weights, x, room if len(weights) <= front + self.count else None)
        mean, kept = self.mean, out[front:]
        if front and mean is not None and self.shift is not None:
            row, shift = (off_metal(x).to(torch.float64) for x in (out[0], self.shift))
            mean = mean + mixing.newer * (row + (shift - mean))
        if len(kept) > self.count:
            # all combinations, now so nearly orthogonal that the small ones can be told apart
            s, v = graded_values(kept)
            count = min(self.count, int((s > 0).sum()))
            cut = float(s[count:].square().sum())
            kept = _combined(v[:, :count].T, kept, self.memory[self.first :] if in_place else None)
        return Compressed(kept, mean, mixing.before + mixing.mass, mixing.aged**2 * self.cut + cut)

    def _adopt(self, done: Compressed) -> None:
        self.held, self.weight, self.cut = len(done.rows), done.weight, done.cut
        self.filled = self.first + self.held
        if done.mean is not None:
            self.center_on(done.mean)


def _combined(weights: Tensor, x: Tensor, room: Tensor | None) -> Tensor:
    """Give ``weights @ x``, in the first rows of ``room`` if there is one."""
    out = x.new_empty(len(weights), x.shape[1]) if room is None else room[: len(weights)]
    # `room` may be `x`: a block of columns of all rows is read before any of it is written
    weights = weights.to(x.dtype) if x.is_cpu else carried(weights, x.device, x.dtype)
    reconstruct_many([Piece(x.T, weights.T, out.T)])
    return out


def capacity(count: int) -> int:
    """Give the rows that memory has: those kept, twice as many new ones, and one for the mean.

    Example:
        >>> capacity(64)
        193
    """
    return 1 + count + max(2 * count, _LEAST_BLOCK)

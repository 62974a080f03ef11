"""What is known of a slot's factors before any basis: their Grams, norms and canonical coordinates. No n, no d."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.stack import Stack, pad_square
from loraspan.collection.vectors import FactorRows, Vectors
from loraspan.errors import MismatchError, NotFiniteError
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import svd
from loraspan.ops.gram import gram_blocks

# Singular values of dW below this share of the largest are rounding of the Grams.
_RANK_FLOOR = 1e-8
# Below this share |dW|^2 / (|A|^2 |B|^2), rounding of the Grams is above 1e-6 of dW.
_CANCELLED = 1e-5
# loadings and scales of blocks are stored in float32, and norms of dW go through it
_LONGEST = float(torch.finfo(torch.float32).max)


class Canonical(NamedTuple):
    """``dW_i = (B_i x_i)(y_i A_i)`` with ``B_i x_i = Q u sqrt(s)``, ``y_i A_i = sqrt(s) v^T Q'^T``: free of the gauge.

    ``x [T, r, r]`` (columns), ``y [T, r, r]`` given transposed (columns too), ``s [T, r]`` the singular values of
    ``dW_i``, descending, 0 where there is none (with zero columns).
    """

    x: Tensor
    y: Tensor
    s: Tensor


@dataclass(frozen=True)
class SlotFactors:
    """The tasks of one slot.

    Attributes:
        path: the slot's module path.
        shape: ``(n, d)`` of the slot.
        kind: see :class:`loraspan.adapters.base.Slot`.
        kernel: of a convolution.
        members: the tasks that have the slot, as indices into the adapters, ascending.
        up: the vectors of the output side, columns of ``B_i``.
        down: the vectors of the input side, rows of ``A_i``.
        gram_up: ``B_i^T B_i``, ``[T, r, r]``, float64, zeros around smaller ranks.
        gram_down: ``A_i A_i^T``, likewise.
        scales: ``[T]``, float64.
        squares: ``[T]``: ``|dW_i|_F^2``.
        is_double: whether any factor is float64.
    """

    path: str
    shape: tuple[int, int]
    kind: str
    kernel: tuple[int, int, int] | None
    members: list[int]
    up: Vectors
    down: Vectors
    gram_up: Tensor
    gram_down: Tensor
    scales: Tensor
    squares: Tensor
    is_double: bool = False

    def stacks(self, weights: Tensor) -> tuple[Stack, Stack]:
        """Give the output and the input side, rows weighted to ``w_i dW_i``; ``weights [T]``."""
        square = (weights * self.scales).square()[:, None, None]
        return Stack.of_moments(self.up, square * self.gram_down), Stack.of_moments(self.down, square * self.gram_up)

    def some(self, rows: list[int]) -> SlotFactors:
        """Give some of the tasks, by their places, of adapters that :func:`read_factors` read."""
        assert isinstance(self.up, FactorRows)
        assert isinstance(self.down, FactorRows)
        at = torch.tensor(rows)
        kept = {name: getattr(self, name)[at] for name in ("gram_up", "gram_down", "scales", "squares")}
        up, down = self.up.some(rows), self.down.some(rows)
        return replace(self, members=[self.members[i] for i in rows], up=up, down=down, **kept)

    def canonical(self) -> Canonical:
        """Give the balanced singular value decomposition of every ``dW_i``, in coordinates of its factors."""
        up, down = gram_root(self.gram_up), gram_root(self.gram_down)
        u, s, v = svd(self.scales[:, None, None] * up.r @ down.r.mT)
        present = s > _RANK_FLOOR * s[:, :1]
        root = torch.where(present, s, 0.0).sqrt().unsqueeze(-2)
        return Canonical(up.inverse @ u * root, down.inverse @ v * root, torch.where(present, s, 0.0))


def read_factors(adapters: Sequence[Adapter], place: torch.device | None = None) -> list[SlotFactors]:
    """Group the adapters by slot and take the Grams of every factor, one light pass over the bytes.

    Slots come in the order in which the adapters name them first.

    Args:
        adapters: any ranks, scales and dtypes; an adapter may lack a slot.
        place: the device to compute with them, None for where they lie.

    Raises:
        MismatchError: if adapters disagree on the shape of a slot.
        NotFiniteError: if a factor holds a NaN or an infinity, or a ``dW`` is past float32; names adapter, file, slot
            and factor.
    """
    members: dict[str, list[int]] = {}
    for index, adapter in enumerate(adapters):
        for path in adapter.slots:
            members.setdefault(path, []).append(index)
    for path, indices in members.items():
        _check_shapes(path, [adapters[i] for i in indices])
    found = {path: [adapters[i].slots[path] for i in members[path]] for path in members}
    sides, grams = _measured(found)
    spread = {
        path: [_spread(slot) if flag else slot for slot, flag in zip(found[path], flags, strict=True)]
        for path, both in grams.items()
        if any(flags := _cancels(*both))
    }
    if spread:
        again = _measured(spread)
        sides, grams = sides | again[0], grams | again[1]
    return [_slot_factors(adapters, path, members[path], sides[path], grams[path], place) for path in members]


def _measured(
    slots: Mapping[str, Sequence[Slot]],
) -> tuple[dict[str, tuple[FactorRows, FactorRows]], dict[str, tuple[Tensor, Tensor]]]:
    """Give both sides of the slots, and their padded Grams."""
    sides = {path: _both_sides(some) for path, some in slots.items()}
    # where they lie: few rows each, so that sending them costs more than their products
    grams = iter(gram_blocks([side.x for both in sides.values() for side in both], precision="f64"))
    return sides, {path: (_padded(next(grams)), _padded(next(grams))) for path in sides}


def _cancels(up: Tensor, down: Tensor) -> list[bool]:
    """Say of which tasks ``dW`` is so much shorter than its factors that their Grams cannot tell its error."""
    lengths = up.diagonal(dim1=-2, dim2=-1).sum(-1) * down.diagonal(dim1=-2, dim2=-1).sum(-1)
    flags: list[bool] = ((up * down).sum((-1, -2)) < _CANCELLED * lengths).tolist()
    return flags


def _spread(slot: Slot) -> Slot:
    """Give the same ``dW`` from float64 factors no longer than it needs.

    Columns of one adapter may almost cancel: PEFT's conversion of a PiSSA adapter puts the factors that it began with
    beside those that it ended with.
    """
    if slot.up.device.type != "cpu":
        return slot
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(slot.up.double()), torch.linalg.qr(slot.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    noise = slot.lora_rank * torch.finfo(torch.float64).eps * r_up.norm() * r_down.norm()
    root = torch.where(s > noise, s, 0.0).sqrt()
    return replace(slot, up=q_up @ u * root, down=(q_down @ vh.T * root).T)


def _both_sides(slots: Sequence[Slot]) -> tuple[FactorRows, FactorRows]:
    rank = max(slot.lora_rank for slot in slots)
    return FactorRows([slot.up.T for slot in slots], rank), FactorRows([slot.down for slot in slots], rank)


def _padded(grams: Tensor | list[Tensor]) -> Tensor:
    return grams if isinstance(grams, Tensor) else pad_square(grams)


def _slot_factors(
    adapters: Sequence[Adapter],
    path: str,
    members: list[int],
    sides: tuple[FactorRows, FactorRows],
    grams: tuple[Tensor, Tensor],
    place: torch.device | None,
) -> SlotFactors:
    up, down = grams
    for name, gram in (("up", up), ("down", down)):
        # what is not finite shows in the square of its own row
        finite = gram.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        if not finite.all():
            raise NotFiniteError(
                f"{_which(adapters[members[int((~finite).nonzero()[0])]])}: the factor {name!r} "
                f"(lora_{'B' if name == 'up' else 'A'}) of slot {path!r} holds a NaN or an infinity; "
                f"leave the adapter out or repair its file"
            )
    slots = [adapters[i].slots[path] for i in members]
    scales = torch.tensor([slot.scale for slot in slots], dtype=torch.float64)
    squares = scales.square() * (up * down).sum((-1, -2)).clamp(min=0)
    for i in (~(squares <= _LONGEST**2)).nonzero().flatten().tolist():
        raise NotFiniteError(
            f"{_which(adapters[members[i]])}: dW of slot {path!r} has a norm past the {_LONGEST:.2g} of float32, with "
            f"the scale {slots[i].scale:g}; correct lora_alpha and the patterns, or leave the adapter out"
        )
    first = slots[0]
    return SlotFactors(
        path,
        first.shape,
        first.kind,
        first.kernel,
        members,
        sides[0].on(place),
        sides[1].on(place),
        up,
        down,
        scales,
        squares,
        any(torch.float64 in side.x.dtypes for side in sides),
    )


def _which(adapter: Adapter) -> str:
    return f"adapter {adapter.name!r}" + (f" ({adapter.source.path})" if adapter.source.path else "")


def _check_shapes(path: str, adapters: list[Adapter]) -> None:
    first = adapters[0].slots[path]
    shape = first.shape
    for adapter in adapters[1:]:
        slot = adapter.slots[path]
        if slot.shape != shape or slot.kind != first.kind or slot.kernel != first.kernel:
            raise MismatchError(
                f"slot {path!r} is a {first.kind} of shape {list(first.shape)} in adapter {adapters[0].name!r} and a "
                f"{slot.kind} of shape {list(slot.shape)} in {adapter.name!r}: they are for different base models"
            )

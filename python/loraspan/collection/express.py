"""Express adapters on bases that stand: shared columns for what the bases carry, private ones for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.adapters.base import Adapter
from loraspan.collection.assemble import assemble
from loraspan.collection.bases import Basis, shared_cores
from loraspan.collection.budget import Planner
from loraspan.collection.build import SlotBuilder
from loraspan.collection.collection import Segment, SlotSpace
from loraspan.collection.columns import Columns
from loraspan.collection.factors import Canonical, SlotFactors, read_factors
from loraspan.collection.fit import check_met, describe, total_squares
from loraspan.collection.private import CORRECTIONS
from loraspan.collection.rows import Rows, Width, Widths
from loraspan.collection.segments import interleave
from loraspan.collection.shares import Shares
from loraspan.collection.vectors import Vectors
from loraspan.errors import ArgumentError, MismatchError
from loraspan.linalg.roots import gram_root
from loraspan.ops import RowBlocks, gram_many
from loraspan.ops.packed import Packed
from loraspan.ops.packed_products import packed_products

# An error is the root of a difference of float64 sums: below this it would be said and not known.
_TOLD = 2e-7


@dataclass(frozen=True)
class Expressed:
    """Adapters on bases that stand.

    Attributes:
        segment: with the tasks, in the order of the adapters.
        slots: the bases given, and for slots that they lacked, empty ones.
        squares: ``[N]``: ``|dW|_F^2`` of every adapter.
        lost: by slot, its members and ``[T]`` what they lost there, squared norms.
    """

    segment: Segment
    slots: Mapping[str, SlotSpace]
    squares: Tensor
    lost: Mapping[str, tuple[list[int], Tensor]]


def express(
    slots: Mapping[str, SlotSpace],
    adapters: Sequence[Adapter],
    *,
    max_error: float | None,
    dtype: Widths | Width,
    operator: str = "add",
    place: torch.device | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Expressed:
    """Give the columns of adapters on standing bases. A pure function: nothing that is given changes.

    Args:
        slots: the bases, by module path. A slot that only the adapters have gets bases of no width.
        adapters: at least one.
        max_error: relative error on ``dW`` that no task exceeds, every task in the form that takes the fewest bytes;
            None for shared columns alone, whatever they lose.
        dtype: of loadings and private columns, or the widths of each.
        operator: to name in an error.
        place: the device to compute with the factors.
        report: called with "add", slots done and slots in all, where there is a ``max_error``.

    Raises:
        ArgumentError: if ``max_error`` is below what rounding to ``dtype`` allows, or 2e-7, below which float64 does
            not tell it.
        MismatchError: if an adapter disagrees with the bases on a slot.
        NotFiniteError: if a factor holds a NaN or an infinity.
    """
    if max_error is not None and max_error < _TOLD:
        raise ArgumentError(
            f"{operator}: max_error={max_error:g} is below what rounding in float64 lets anyone measure: ask for "
            f"{_TOLD:g} or more"
        )
    widths = Widths.of(dtype)
    factors, bases = read_standing(slots, adapters, widths.dtype, place)
    whole = {**slots, **{f.path: _empty(f, widths.dtype) for f in factors if f.path not in slots}}
    squares = total_squares(factors, len(adapters))
    canonicals = [f.canonical() for f in factors]
    if max_error is None:
        found = [_shared(f, both, widths) for f, both in zip(factors, bases, strict=True)]
    else:
        spectra = [(f.members, c.s) for f, c in zip(factors, canonicals, strict=True)]
        of_slots = Shares(spectra, [f.shape for f in factors], squares).within(max_error, widths)
        found = _within(factors, canonicals, bases, of_slots, widths, report or (lambda _stage, _done, _total: None))
    columns = {f.path: made for f, (made, _) in zip(factors, found, strict=True)}
    lost = {f.path: (f.members, gone) for f, (_, gone) in zip(factors, found, strict=True)}
    totals = torch.zeros_like(squares)
    for members, gone in lost.values():
        totals.index_add_(0, torch.tensor(members), gone)
    tasks = describe(adapters, squares, totals)
    check_met(operator, tasks, max_error, widths)
    return Expressed(Segment(tasks, columns), whole, squares, lost)


def read_standing(
    slots: Mapping[str, SlotSpace], adapters: Sequence[Adapter], dtype: torch.dtype, place: torch.device | None = None
) -> tuple[list[SlotFactors], list[tuple[Basis, Basis]]]:
    """Give the factors of the adapters, slots in the order of ``slots``, and their products with the bases.

    Raises:
        MismatchError: if an adapter disagrees with the bases on a slot.
        NotFiniteError: if a factor holds a NaN or an infinity.
    """
    factors = read_factors(adapters, place)
    _check_shapes(slots, factors, adapters)
    order = {path: i for i, path in enumerate(slots)}
    factors.sort(key=lambda f: order.get(f.path, len(order)))
    spaces = [slots[f.path] if f.path in slots else _empty(f, dtype) for f in factors]
    return factors, standing_bases(factors, spaces)


def standing_bases(factors: Sequence[SlotFactors], slots: Sequence[SlotSpace]) -> list[tuple[Basis, Basis]]:
    """Give the products of every slot's vectors with its bases, and those of the bases with themselves, in float64."""
    sides = [
        (vectors, v)
        for f, space in zip(factors, slots, strict=True)
        for vectors, v in ((f.up, space.u), (f.down, space.v))
    ]
    jobs, owners = [], []
    for i, (vectors, v) in enumerate(sides):
        if isinstance(v, Packed):
            continue
        for group in _groups(vectors.x, v.shape[1]):
            jobs.append(RowBlocks([*group, v.T]).on(vectors.x.target))
            owners.append(i)
    parts: list[list[Tensor]] = [[] for _ in sides]
    for owner, gram in zip(owners, gram_many(jobs, precision="f64"), strict=True):
        parts[owner].append(gram)
    made = [_basis(vectors, v, of_side) for (vectors, v), of_side in zip(sides, parts, strict=True)]
    return list(zip(made[::2], made[1::2], strict=True))


def _groups(x: RowBlocks, rank: int) -> list[list[Tensor]]:
    """Blocks of about as many rows as the basis has vectors: a Gram of both then costs twice their product."""
    groups: list[list[Tensor]] = []
    rows = rank
    for block in x.blocks:
        if not groups or rows + block.shape[0] > max(rank, 1):
            groups.append([])
            rows = 0
        groups[-1].append(block)
        rows += block.shape[0]
    return groups if rank else []


def _basis(vectors: Vectors, v: Rows, grams: Sequence[Tensor]) -> Basis:
    if isinstance(v, Packed):
        found = packed_products(vectors.x, v, precision="f64")
        return Basis(v, vectors.pad(found.rows), found.basis)
    rank = v.shape[1]
    if not rank:
        flat = torch.zeros(vectors.x.shape[0], 0, dtype=torch.float64)
        return Basis(v, vectors.pad(flat), flat.new_zeros(0, 0))
    seen = torch.cat([gram[:-rank, -rank:] for gram in grams])
    return Basis(v, vectors.pad(seen), grams[0][-rank:, -rank:].clone())


def _shared(slot: SlotFactors, bases: tuple[Basis, Basis], widths: Widths) -> tuple[Columns, Tensor]:
    shared = shared_cores(*bases, slot.scales, slot.squares, widths.loadings)
    ranks = (bases[0].rank, bases[1].rank)
    return assemble(slot.members, [shared.part], slot.shape, ranks, widths.dtype), shared.squares


def _within(
    factors: Sequence[SlotFactors],
    canonicals: Sequence[Canonical],
    bases: Sequence[tuple[Basis, Basis]],
    shares: Sequence[Tensor],
    widths: Widths,
    report: Callable[[str, int, int], None],
) -> list[tuple[Columns, Tensor]]:
    """Slot after slot; what a task does not spend of its share in one is left for the next."""
    unspent = torch.zeros(1 + max(max(f.members) for f in factors), dtype=torch.float64) if factors else torch.zeros(0)
    found: list[tuple[Columns, Tensor]] = []
    for slot, canonical, both, share in zip(factors, canonicals, bases, shares, strict=True):
        report("add", len(found), len(factors))
        members = torch.tensor(slot.members)
        allowed = (share + unspent[members]).clamp(min=0)
        columns, lost = _cheapest(slot, canonical, both, allowed, widths)
        unspent[members] += share - lost
        found.append((columns, lost))
    report("add", len(factors), len(factors))
    return found


def _cheapest(
    slot: SlotFactors, canonical: Canonical, bases: tuple[Basis, Basis], allowed: Tensor, widths: Widths
) -> tuple[Columns, Tensor]:
    """Give every task the form that takes it the fewest bytes."""
    seen = [basis.products @ gram_root(basis.gram).inverse for basis in bases]
    bytes_of = Planner(slot.shape, canonical, seen[0], seen[1], allowed, widths).bytes_by_form()
    forms = list(bytes_of)
    chosen = np.stack([bytes_of[form] for form in forms]).argmin(axis=0)
    ranks = (bases[0].rank, bases[1].rank)
    parts, lost = [], torch.zeros_like(allowed)
    for j in np.unique(chosen):
        rows = np.flatnonzero(chosen == j)
        columns, gone = _build(forms[j], _some(slot, canonical, bases, allowed, rows), ranks, widths)
        parts.append((rows, columns))
        lost[torch.from_numpy(rows)] = gone
    return interleave(parts), lost


_Some = tuple[SlotFactors, Canonical, tuple[Basis, Basis], Tensor]


def _some(
    slot: SlotFactors, canonical: Canonical, bases: tuple[Basis, Basis], allowed: Tensor, rows: NDArray[np.int64]
) -> _Some:
    if len(rows) == len(slot.members):
        return slot, canonical, bases, allowed
    at = torch.from_numpy(rows)
    out, inn = (basis._replace(products=basis.products[at]) for basis in bases)
    return slot.some(rows.tolist()), Canonical(*(part[at] for part in canonical)), (out, inn), allowed[at]


def _build(form: str, some: _Some, ranks: tuple[int, int], widths: Widths) -> tuple[Columns, Tensor]:
    slot, canonical, bases, allowed = some
    builder = SlotBuilder(slot, canonical, torch.ones_like(allowed), allowed, widths, CORRECTIONS)
    if form == "pp":
        parts, lost = builder.private()
    elif form == "ss":
        parts, lost = builder.shared(bases)
    else:
        parts, lost = builder.one_sided(form, bases[1 if form == "ps" else 0])
    return assemble(slot.members, parts, slot.shape, ranks, widths.dtype), lost


def _empty(factors: SlotFactors, dtype: torch.dtype) -> SlotSpace:
    n, d = factors.shape
    return SlotSpace(torch.empty(n, 0, dtype=dtype), torch.empty(d, 0, dtype=dtype), factors.kind, factors.kernel)


def _check_shapes(slots: Mapping[str, SlotSpace], factors: Sequence[SlotFactors], adapters: Sequence[Adapter]) -> None:
    for f in factors:
        space = slots.get(f.path)
        if space is None:
            continue
        shape = space.shape
        if (f.shape, f.kind, f.kernel) != (shape, space.kind, space.kernel):
            raise MismatchError(
                f"slot {f.path!r} is a {space.kind} of shape {list(shape)} in the collection and a {f.kind} of shape "
                f"{list(f.shape)} in adapter {adapters[f.members[0]].name!r}: they are for different base models"
            )

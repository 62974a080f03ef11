"""Fit a collection: from adapters to bases and columns, slot after slot, in few passes over the bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from loraspan.adapters.base import Adapter
from loraspan.collection.abreast import abreast
from loraspan.collection.assemble import assemble
from loraspan.collection.bases import make_basis, shared_cores
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.core_space import energy_by_rank, refine_products
from loraspan.collection.factors import SlotFactors, read_factors
from loraspan.collection.plans import CANDIDATES, Options, Outcome, PlanLine, fit_smallest
from loraspan.collection.plans_in_bytes import fit_bytes
from loraspan.collection.ranges import Range, find_range
from loraspan.collection.rows import WIDTHS, Width, Widths
from loraspan.collection.stack import Stack
from loraspan.collection.summary import summarized
from loraspan.collection.turned import turned_cores
from loraspan.collection.within import Fitted, fit_within
from loraspan.errors import ArgumentError, MismatchError
from loraspan.ops.blocks import CPU
from loraspan.ops.stream import held

Progress = Callable[[str, int, int], None]

# Directions beyond the rank: at least 8, and up to whole vectors of the operators, which cost nothing more.
_OVERSAMPLE, _VECTOR = 8, 16
_FIRST_WIDTH = 64
# Above this share of the energy the range is found in float64, as it is for float64 factors.
_FINE_ENERGY = 1 - 1e-4


@dataclass(frozen=True)
class Goal:
    """What a fit is asked for: exactly one of ``rank``, ``energy``, ``max_error`` and ``max_bytes``.

    Attributes:
        rank: width of every basis (cut to the numerical rank); all ends shared.
        energy: share of the collection's energy that every slot keeps; all ends shared.
        max_error: relative error on ``dW`` that no task exceeds; shared columns where they pay, private for the rest.
        refine: iterations of joint refinement.
        dtype: of bases, loadings and private columns: a floating dtype, 8 or 4 bits, or CODED; None for what takes the
            fewest bytes, with ``max_error`` or ``max_bytes``.
        seed: of the sketches.
        max_bytes: all bytes on disk; the worst task's error is made as small as they allow.
    """

    rank: int | None = None
    energy: float | None = None
    max_error: float | None = None
    refine: int = 2
    dtype: Width | None = torch.float32
    seed: int = 0
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "max_error", "max_bytes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ArgumentError(
                f"compress: give exactly one of rank, energy, max_error and max_bytes; got {given or 'none'}"
            )
        for name in (*given, "refine", "seed"):
            value, kind = getattr(self, name), Real if name in ("energy", "max_error") else Integral
            if not isinstance(value, kind) or isinstance(value, bool):
                whole = "whole " if kind is Integral else ""
                raise ArgumentError(f"compress: {name} is a {whole}number; got {value!r}")
        if self.rank is not None and self.rank < 1:
            raise ArgumentError(f"compress: rank is at least 1; got {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ArgumentError(f"compress: energy is a share above 0 and at most 1; got {self.energy}")
        if self.max_error is not None and not (0 < self.max_error < 1):
            raise ArgumentError(f"compress: max_error is between 0 and 1; got {self.max_error}")
        if self.refine < 0:
            raise ArgumentError(f"compress: refine is at least 0; got {self.refine}")
        if self.dtype is not None and self.dtype not in WIDTHS.values():
            raise ArgumentError(
                f"compress: dtype is float32, bfloat16, float16, int8, 'int4' (8 and 4 bits in blocks) or 'coded'; "
                f"got {self.dtype}"
            )

    @property
    def widths(self) -> Widths:
        """Of a fit that does not choose; float32 where none is asked for."""
        return Widths.of(torch.float32 if self.dtype is None else self.dtype)

    @property
    def floats(self) -> torch.dtype:
        """Of what is not packed."""
        return self.widths.dtype

    @property
    def candidates(self) -> tuple[Widths, ...]:
        """What a fit that chooses may choose from."""
        return CANDIDATES if self.dtype is None else (self.widths,)


def fit(
    adapters: Sequence[Adapter], goal: Goal, progress: Progress | None = None, place: torch.device | None = None
) -> Collection:
    """Give the collection of ``adapters`` that meets ``goal``; see :func:`fit_with_plans`."""
    return fit_with_plans(adapters, goal, progress, place)[0]


def fit_with_plans(
    adapters: Sequence[Adapter], goal: Goal, progress: Progress | None = None, place: torch.device | None = None
) -> tuple[Collection, tuple[PlanLine, ...]]:
    """Give the collection of ``adapters`` that meets ``goal``, and the plans that were counted for it, if any.

    Args:
        adapters: at least one, with distinct names; an adapter may lack slots that others have.
        goal: what to meet.
        progress: called with a stage, how much of it is done, and how much there is.
        place: the device to compute with the factors, None for where they lie; the collection lies on the CPU.

    Raises:
        ArgumentError: if there is no adapter, ``max_error`` is below what rounding to ``goal.dtype`` allows, or
            ``max_bytes`` is too few.
        MismatchError: if names clash or adapters disagree on a slot.
        NotFiniteError: if a factor holds a NaN or an infinity.
    """
    _check_names(adapters)
    report = progress or (lambda _stage, _done, _total: None)
    report("read", 0, len(adapters))
    slots = read_factors(adapters, place)
    report("read", len(adapters), len(adapters))
    squares = total_squares(slots, len(adapters))
    outcome = _fit_slots(adapters, slots, squares, goal, report)
    report("fit", len(slots), len(slots))
    collection = collect(adapters, slots, squares, outcome.fitted, outcome.widths)
    check_met("compress", collection.tasks, goal.max_error, outcome.widths)
    return collection, outcome.plans


def _fit_slots(
    adapters: Sequence[Adapter], slots: Sequence[SlotFactors], squares: Tensor, goal: Goal, report: Progress
) -> Outcome:
    if goal.max_error is not None and goal.dtype is not None:
        fitted = fit_within(slots, squares, goal.max_error, goal.widths, goal.seed, goal.refine, report)
        return Outcome(fitted, goal.widths, goal.max_error, ())
    if goal.max_error is None and goal.max_bytes is None:
        # a device is one for all slots
        on_cpu = all(side.x.plain and side.x.device in (CPU, None) for slot in slots for side in (slot.up, slot.down))
        fitted = abreast(
            lambda slot: fit_shared(slot, squares, goal, goal.widths),
            slots,
            lambda i: report("fit", i, len(slots)),
            None if on_cpu else 1,
        )
        return Outcome(fitted, goal.widths, 0.0, ())
    options = Options(goal.candidates, goal.seed, goal.refine, report)
    if goal.max_error is not None:
        return fit_smallest(slots, squares, goal.max_error, options)
    assert goal.max_bytes is not None

    def measure(fitted: list[Fitted], widths: Widths) -> int:
        return summarized(collect(adapters, slots, squares, fitted, widths))[1]

    found = fit_bytes(slots, squares, goal.max_bytes, measure, options)
    if isinstance(found, int):
        raise ArgumentError(
            f"compress: max_bytes={goal.max_bytes:,} cannot be met: {len(adapters)} adapters take {found:,} bytes at "
            f"the least, extras, names and configurations included; allow more"
        )
    return found


def collect(
    adapters: Sequence[Adapter],
    slots: Sequence[SlotFactors],
    squares: Tensor,
    fitted: Sequence[Fitted],
    widths: Widths,
) -> Collection:
    """Put fitted slots together, with what is known of every task."""
    lost = torch.zeros(len(adapters), dtype=torch.float64)
    for slot, (_, _, slot_lost) in zip(slots, fitted, strict=True):
        lost.index_add_(0, torch.tensor(slot.members), slot_lost)
    spaces = {slot.path: space for slot, (space, _, _) in zip(slots, fitted, strict=True)}
    columns = {slot.path: made for slot, (_, made, _) in zip(slots, fitted, strict=True)}
    one = Segment(describe(adapters, squares, lost), columns)
    return Collection(spaces, (one,), widths.dtype, _base_model(adapters), bits=widths.bits)


def _check_names(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise ArgumentError("compress: there is no adapter to compress")
    for name, count in Counter(adapter.name for adapter in adapters).items():
        if count > 1:
            raise MismatchError(f"compress: {count} adapters are named {name!r}; give each a name of its own")


def check_met(operator: str, tasks: Sequence[Task], max_error: float | None, widths: Widths) -> None:
    """Refuse what rounding keeps from meeting ``max_error``."""
    if max_error is None:
        return
    worst = max(tasks, key=lambda task: task.error)
    if worst.error > max_error * (1 + 1e-9):
        raise ArgumentError(
            f"{operator}: max_error={max_error:g} is below what rounding to {widths} allows: task "
            f"{worst.name!r} is stored with {worst.error:.3g} at best; ask for more, or for dtype float32"
        )


def total_squares(slots: Sequence[SlotFactors], count: int) -> Tensor:
    """Give every task's ``|dW|_F^2`` over all its slots, ``[count]``."""
    squares = torch.zeros(count, dtype=torch.float64)
    for slot in slots:
        squares.index_add_(0, torch.tensor(slot.members), slot.squares)
    return squares


def fit_shared(slot: SlotFactors, squares: Tensor, goal: Goal, widths: Widths) -> Fitted:
    """Fit one slot with all ends shared."""
    members = torch.tensor(slot.members)
    # a task's relative error counts where a rank is asked for, the collection's energy where that is
    norms = squares[members].sqrt()
    weights = torch.ones_like(norms) if goal.energy is not None else torch.where(norms > 0, 1 / norms, 0.0)
    sides = slot.stacks(weights)
    fine = slot.is_double or (goal.energy is not None and goal.energy > _FINE_ENERGY)
    precision = "f64" if fine else "f32"
    with held([side.x for side in sides]):
        ranges, ranks = _choose_ranks(slot, sides, goal, precision)
        seen = [side.pad(found.xv) for side, found in zip(sides, ranges, strict=True)]
        turns = refine_products(seen[0] * (weights * slot.scales)[:, None, None], seen[1], *ranks, goal.refine)
        made = turned_cores(slot, squares[members], sides, ranges, turns, widths)
        if made is None:
            out, inn = (
                make_basis(side, found.w @ turn, widths.basis)
                for side, found, turn in zip(sides, ranges, turns, strict=True)
            )
            made = out, inn, shared_cores(out, inn, slot.scales, slot.squares, widths.loadings)
    out, inn, shared = made
    columns = assemble(slot.members, [shared.part], slot.shape, (out.rank, inn.rank), widths.dtype)
    return SlotSpace(out.v, inn.v, slot.kind, slot.kernel), columns, shared.squares


def _choose_ranks(
    slot: SlotFactors, sides: tuple[Stack, Stack], goal: Goal, precision: str
) -> tuple[tuple[Range, Range], tuple[int, int]]:
    """Find ranges wide enough for the goal, and the ranks to cut them to."""
    width = _FIRST_WIDTH if goal.rank is None else math.ceil((goal.rank + _OVERSAMPLE) / _VECTOR) * _VECTOR
    while True:
        out, inn = (
            find_range(side, width, precision=precision, seed=goal.seed + i, form=goal.widths.basis == torch.float32)
            for i, side in enumerate(sides)
        )
        limits = len(out.energies), len(inn.energies)
        if goal.rank is not None:
            return (out, inn), (min(goal.rank, limits[0]), min(goal.rank, limits[1]))
        cores = sides[0].pad(out.xv).mT @ sides[1].pad(inn.xv) * slot.scales[:, None, None]
        energies = energy_by_rank(cores)
        wanted = (goal.energy or 0.0) * float(slot.squares.sum()) * (1 - 1e-12)
        enough = (energies >= wanted).nonzero()
        if len(enough) or max(limits) < width:
            rank = int(enough[0]) if len(enough) else max(limits)
            return (out, inn), (min(rank, limits[0]), min(rank, limits[1]))
        width *= 2


def describe(adapters: Sequence[Adapter], squares: Tensor, lost: Tensor) -> tuple[Task, ...]:
    """Say what is known of every task, from ``[N]`` squared norms of its ``dW`` and of what was lost."""
    return tuple(
        Task(
            name=adapter.name,
            error=math.sqrt(missing / square) if square > 0 else 0.0,
            error_kind="measured",
            norm=math.sqrt(square),
            scales={path: slot.scale for path, slot in adapter.slots.items()},
            lora_ranks={path: slot.lora_rank for path, slot in adapter.slots.items()},
            config=adapter.config,
            source=adapter.source,
            factor_bytes=adapter.nbytes,
            factor_dtype=_factor_dtype(adapter),
            extras=adapter.extras,
        )
        for adapter, missing, square in zip(adapters, lost.tolist(), squares.tolist(), strict=True)
    )


def _factor_dtype(adapter: Adapter) -> str:
    """The dtype of most of its factors."""
    found = Counter(slot.up.dtype for slot in adapter.slots.values())
    return str(found.most_common(1)[0][0]).removeprefix("torch.") if found else "float32"


def _base_model(adapters: Sequence[Adapter]) -> str | None:
    return next((a.source.base_model for a in adapters if a.source.base_model), None)

r"""New bases for the tasks that a collection holds: what has become common among cores and private columns.

Nothing but the collection is read. A task is ``dW_i = left_i right_i^T`` with ends on the bases and private ones, so
the enlarged bases ``[U Q_out]``, ``[V Q_in]`` hold every task, and a fit in their coordinates is the fit of the tasks
as they are stored: its matrices are as large as the bases and the private ends together (or sketched, where these are
many), whatever the number of tasks and the length of the vectors.

Source:
    The merge of Share, arXiv 2602.06043, section 3, with weighted cores in place of stacked loadings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import Columns
from loraspan.collection.factors import SlotFactors
from loraspan.collection.fit import Goal, fit_shared, total_squares
from loraspan.collection.layout import CHANGE_BYTES, collection_bytes
from loraspan.collection.plans import Options
from loraspan.collection.plans_in_bytes import fit_bytes
from loraspan.collection.private import CORRECTIONS
from loraspan.collection.rows import Widths
from loraspan.collection.segments import merge
from loraspan.collection.stored import stored_slots
from loraspan.collection.summary import summarized
from loraspan.collection.within import Fitters, fit_within
from loraspan.errors import ArgumentError

_Report = Callable[[str, int, int], None]
_Fitted = list[tuple[SlotSpace, Columns, Tensor]]
# What rounding adds to a loss beyond its measured value, relative to the task.
_ROUNDING = 1e-9


def refit(
    collection: Collection,
    *,
    rank: int | None = None,
    max_forgetting: float | None = None,
    max_bytes: int | None = None,
    spend: float = 1.0,
    refine: int = 2,
    seed: int = 0,
    report: _Report | None = None,
) -> Collection:
    """Give the same tasks on new bases, in one segment.

    With ``max_forgetting`` alone they stay on the old bases, and lose nothing, where new ones would take more bytes.
    What a task loses is its distance from what was stored of it, relative to the norm of its original ``dW``. Its error
    against its original is then at most its error before and that loss, and is reported as a ``"bound"``; the losses of
    its life add up in ``Task.forgotten``.

    Args:
        collection: with at least one task.
        rank: width of every new basis; None takes what needs the fewest bytes.
        max_forgetting: what any task may lose over its whole life; private columns keep the rest. None, with a rank,
            keeps shared columns alone, whatever they lose.
        max_bytes: what the collection may take on disk. Alone, the worst loss is as small as that allows.
        spend: the share of what is left of ``max_forgetting`` that this refit may take.
        refine: iterations of joint refinement.
        seed: of the sketches.
        report: called with "fit", slots done and slots in all.

    Raises:
        ArgumentError: if there is no task, no goal is given, one is out of range, or they cannot be met:
            ``max_forgetting`` is spent or below what rounding takes, or ``max_bytes`` are too few.
    """
    _check(collection, rank, max_forgetting, max_bytes)
    report = report or (lambda _stage, _done, _total: None)
    slots = stored_slots(collection)
    squares = total_squares(slots, len(collection.tasks))
    if rank is None and max_forgetting is None:
        assert max_bytes is not None
        options = Options((collection.widths,), seed, refine, report)
        fitted = _within_bytes(collection, slots, squares, max_bytes, options)
    elif max_forgetting is None:
        goal = Goal(rank=rank, refine=refine, seed=seed)
        # float32 sums would stop at 3e-4 of the largest direction, and a refit is to lose no more than a direct fit
        fine = (replace(slot, is_double=True) for slot in _told(slots, report))
        fitted = [fit_shared(slot, squares, goal, collection.widths) for slot in fine]
    else:
        allowed = spend * _allowances(collection.tasks, squares, max_forgetting)
        fitted = _within_loss(slots, squares, allowed, collection.widths, rank, refine, seed, report)
    report("fit", len(slots), len(slots))
    made = _collection(collection, slots, fitted, squares)
    if max_forgetting is not None:
        _check_met(collection, made.tasks, max_forgetting)
    if rank is None and max_bytes is None:
        joined = _joined(collection)
        return made if collection_bytes(made) <= collection_bytes(joined) else joined
    if max_bytes is not None and (size := summarized(made)[1] + CHANGE_BYTES) > max_bytes:
        raise ArgumentError(
            f"refit: max_bytes={max_bytes:,} cannot be met with rank={rank} and max_forgetting={max_forgetting}: the "
            f"collection would take {size:,} bytes; nothing was changed: allow more of one"
        )
    return made


def _joined(collection: Collection) -> Collection:
    """Give the same tasks on the same bases in one segment, without slots that none of them has."""
    segment = merge(collection.segments)
    slots = {path: space for path, space in collection.slots.items() if path in segment.columns}
    return replace(collection, slots=slots, segments=(segment,))


def _check(collection: Collection, rank: int | None, max_forgetting: float | None, max_bytes: int | None) -> None:
    if not collection.tasks:
        raise ArgumentError("refit: the collection has no task; add one first")
    if rank is None and max_forgetting is None and max_bytes is None:
        raise ArgumentError("refit: give rank, max_forgetting, max_bytes or several of them")
    if rank is not None and rank < 1:
        raise ArgumentError(f"refit: rank is at least 1; got {rank}")
    if max_forgetting is not None and not 0 < max_forgetting < 1:
        raise ArgumentError(f"refit: max_forgetting is between 0 and 1; got {max_forgetting}")


def _allowances(tasks: Sequence[Task], squares: Tensor, max_forgetting: float) -> Tensor:
    """Give what each task may still lose, relative to what is stored of it, ``[N]``."""
    left = torch.tensor([max(max_forgetting - task.forgotten, 0.0) * task.norm for task in tasks], dtype=torch.float64)
    return torch.where(squares > 0, left * torch.where(squares > 0, squares, 1.0).rsqrt(), 0.0)


def _told(slots: Sequence[SlotFactors], report: _Report) -> Iterator[SlotFactors]:
    for i, slot in enumerate(slots):
        report("fit", i, len(slots))
        yield slot


def _within_bytes(
    collection: Collection, slots: Sequence[SlotFactors], squares: Tensor, limit: int, options: Options
) -> _Fitted:
    def measure(fitted: _Fitted, _: Widths) -> int:
        return summarized(_collection(collection, slots, fitted, squares))[1] + CHANGE_BYTES

    found = fit_bytes(slots, squares, limit, measure, options)
    if isinstance(found, int):
        raise ArgumentError(
            f"refit: max_bytes={limit:,} cannot be met: the collection takes {found:,} bytes at the least, extras, "
            f"names and configurations included; nothing was changed: allow more"
        )
    return found.fitted


def _within_loss(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    allowed: Tensor,
    widths: Widths,
    rank: int | None,
    refine: int,
    seed: int,
    report: _Report,
) -> _Fitted:
    if rank is None:
        return fit_within(slots, squares, allowed, widths, seed, refine, report, CORRECTIONS)
    fitters = Fitters(slots, squares, coarse=False, seed=seed, refine=refine, corrections=CORRECTIONS)
    fitted = []
    for i, (fitter, share) in enumerate(zip(fitters.slots, fitters.shares(allowed, widths), strict=True)):
        report("fit", i, len(slots))
        fitted.append(fitter.build_joint(rank, share, widths))
    return fitted


def _aged(task: Task, loss: float) -> Task:
    share = loss / task.norm if task.norm > 0 else 0.0
    if share <= 0:
        return task
    return replace(task, error=task.error + share, error_kind="bound", forgotten=task.forgotten + share)


def _check_met(collection: Collection, tasks: Sequence[Task], max_forgetting: float) -> None:
    worst = max(range(len(tasks)), key=lambda i: tasks[i].forgotten)
    before, after = collection.tasks[worst].forgotten, tasks[worst].forgotten
    if after > max_forgetting + _ROUNDING:
        raise ArgumentError(
            f"refit: max_forgetting={max_forgetting:g} cannot be met: task {tasks[worst].name!r} has lost {before:.3g} "
            f"in earlier refits and would lose {after - before:.3g} more, rounding to {collection.widths} included; "
            f"nothing was changed: allow more, or keep the bases as they are"
        )


def _collection(collection: Collection, slots: Sequence[SlotFactors], fitted: _Fitted, squares: Tensor) -> Collection:
    lost = torch.zeros_like(squares)
    for slot, (_, _, of_slot) in zip(slots, fitted, strict=True):
        lost.index_add_(0, torch.tensor(slot.members), of_slot)
    tasks = tuple(_aged(task, math.sqrt(float(gone))) for task, gone in zip(collection.tasks, lost, strict=True))
    spaces = dict(collection.slots)
    for slot, (space, _, _) in zip(slots, fitted, strict=True):
        spaces[slot.path] = space
    # a slot that no task has any more goes with the tasks that had it
    spaces = {path: space for path, space in spaces.items() if path in {slot.path for slot in slots}}
    columns = {slot.path: made for slot, (_, made, _) in zip(slots, fitted, strict=True)}
    return replace(collection, slots=spaces, segments=(Segment(tasks, columns),))

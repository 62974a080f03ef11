"""Check and time one case of ``benches/gpu.py``: a record for every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import _gpu_shared_lora as serving
from _bench import Timing
from _gpu_cases import Case, Goal
from _gpu_device import Candidate, Clock, kernel_times, take_turns
from _gpu_report import Record, reason_of
from loraspan.errors import BackendError

Rates = Mapping[str, float]


def case_records(
    build: Callable[[], Case], backends: Sequence[str], clock: Clock, limits: Rates, rounds: int
) -> list[Record]:
    """Check every backend on a case, then time those that are right, and torch, in turns."""
    case = build()
    name: Record = {"operator": case.operator, "case": case.shape, "dtype": case.dtype, "precision": case.precision}
    right, records = _checked(name, {backend: lambda b=backend: case.excess(b) for backend in backends})
    ours = {backend: (lambda _, b=backend: case.ours(b)) for backend in right}
    # nobody is timed where no answer of ours is right
    candidates = ours | case.theirs if ours else {}
    timings, kernels = take_turns(clock, candidates, rounds), kernel_times(clock, candidates)
    floor = case.cost.floor(limits) * 1e3
    for backend, record in right.items():
        timing, own = timings[backend], kernels[backend]
        record |= _times(timing) | {"kernels ms": own, "floor ms": floor, "share": floor / (own or timing.median)}
        record |= {"share of call": floor / timing.median, "share is of": "kernels" if own else "calls"}
        record |= {"bytes": case.cost.moved, "operations": case.cost.operations}
        for rival in case.theirs:
            theirs = kernels[rival]
            record[f"x {rival}"] = timings[rival].median / timing.median
            record[f"kernels x {rival}"] = theirs / own if theirs and own else None
        records.append(record | {"goals": _judged(record, case.goals, clock)})
    return records


def shared_lora_records(
    batch: serving.Batch, backends: Sequence[str], clock: Clock, limits: Rates, rounds: int
) -> list[Record]:
    """Check and time a batch call by call and, on a GPU, as a CUDA graph of one call on each copy."""
    copies = serving.draw(batch, clock.cache_bytes, clock.device)
    runs = serving.candidates(batch, backends, copies)
    name: Record = {"operator": "shared_lora", "case": batch.shape, "dtype": batch.dtype}
    # not of the plain one, which computes something else
    checks = {
        who: lambda w=who: serving.excess(batch, runs[w], copies[0], factors=w not in backends)
        for who in runs
        if who != "plain"
    }
    found, records = _checked(name, checks)
    right = {backend: found[backend] for backend in backends if backend in found}
    for one in copies:
        one.y.zero_()
    candidates = {who: run for who, run in runs.items() if who in right or who not in backends} if right else {}
    calls, kernels = take_turns(clock, candidates, rounds), kernel_times(clock, candidates)
    graphs = _graph_times(clock, candidates, len(copies), rounds)
    times, floor = graphs or calls, batch.cost.floor(limits) * 1e3
    for backend, record in right.items():
        record |= _times(calls[backend]) | {"kernels ms": kernels[backend], "floor ms": floor}
        if graphs:
            low, high = graphs[backend][1:]
            record |= {"graph ms": graphs[backend].median, "graph low": low, "graph high": high}
        own = times[backend].median
        record |= {"share": floor / own, "times plain": own / times["plain"].median}
        record |= {f"x {who}": times[who].median / own for who in ("loop", "grouped")}
        record |= {f"calls x {who}": calls[who].median / calls[backend].median for who in ("plain", "loop", "grouped")}
        record |= {"bytes": batch.cost.moved, "operations": batch.cost.operations, "copies": len(copies)}
        records.append(record | {"goals": _judged(record, serving.goals(batch), clock)})
    return records


def _checked(name: Record, checks: Mapping[str, Callable[[], float]]) -> tuple[dict[str, Record], list[Record]]:
    """Give the records of who is right, to be timed, and those of who is wrong or refuses."""
    right: dict[str, Record] = {}
    others: list[Record] = []
    for who, excess in checks.items():
        record = name | {"backend": who}
        try:
            off = excess()
        except BackendError as refusal:
            others.append(record | {"status": "refused", "reason": reason_of(refusal)})
            continue
        if off <= 1:
            right[who] = record | {"status": "timed", "error": off}
        else:
            others.append(record | {"status": "wrong", "reason": f"{off:.3g} times the error it may have"})
    return right, others


def _graph_times(clock: Clock, candidates: Mapping[str, Candidate], copies: int, rounds: int) -> dict[str, Timing]:
    """Time a call inside a CUDA graph of one call on each copy; nothing where there are no graphs."""
    graphs: dict[str, Candidate] = {}
    for who, run in candidates.items():
        replay = clock.captured(lambda run=run: [run(turn) for turn in range(copies)])
        if replay is not None:
            graphs[who] = lambda _, replay=replay: replay()
    whole = take_turns(clock, graphs, rounds)
    return {who: Timing(*(part / copies for part in timing)) for who, timing in whole.items()}


def _judged(record: Record, goals: Sequence[Goal], clock: Clock) -> str | None:
    """Say of each goal whether it is met; they are for GPUs."""
    if clock.device.type != "cuda" or not goals:
        return None
    return "; ".join(goal.judge(float(str(record[goal.figure]))) for goal in goals)


def _times(timing: Timing) -> Record:
    return {"ms": timing.median, "low": timing.low, "high": timing.high}

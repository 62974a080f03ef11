"""The larger cases of ``benches/gpu.py``: randomized_svd beside torch.svd_lowrank, and compress from files to the end.

By the wall, the device waited for: results come to the CPU, and what is sent there travels on streams of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import loraspan
from _bench import Timing
from _gpu_cases import SEED, worst_of
from _gpu_device import Clock, summary
from collection import make_collection
from loraspan.linalg import randomized_svd
from peers.job import dw_errors

# how much larger an error may be than the one it is compared with, as in benches/randomized_svd.py
SLACK = 1.02
# of the same mathematics on another device, what other roundings do to an error on dW, relatively
SAME = 1e-3
Record = dict[str, object]


class Stack(NamedTuple):
    """``count`` matrices ``[rows, columns]`` to decompose at ``rank``."""

    count: int
    rows: int
    columns: int
    rank: int


STACKS = {False: [Stack(24, 100, 65536, 16), Stack(1, 4096, 4096, 64)], True: [Stack(2, 20, 300, 4)]}
ADAPTERS = {False: 100, True: 3}


def turns(clock: Clock, candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Time them in turns, in milliseconds; one round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            clock.wait()
            start = time.perf_counter()
            run()
            clock.wait()
            if turn:
                found[name].append((time.perf_counter() - start) * 1e3)
    return {name: summary(values) for name, values in found.items()}


def svd_records(stack: Stack, clock: Clock, rounds: int) -> list[Record]:
    """Check and time randomized_svd on matrices on the device, and on those that are sent there from the CPU."""
    here = torch.Generator().manual_seed(SEED)
    x = torch.randn(stack.count, stack.rows, stack.columns, generator=here).mul_(0.3)
    weights = torch.logspace(0, -1, 2 * stack.rank) / (2 * stack.rank) ** 0.5
    for member in x:
        left = torch.randn(stack.rows, 2 * stack.rank, generator=here) * weights
        member.addmm_(left, torch.randn(2 * stack.rank, stack.columns, generator=here))
    there, rank = x.to(clock.device), stack.rank

    def theirs() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [torch.svd_lowrank(member, rank, niter=2) for member in there]

    def residual(u: Tensor, s: Tensor, vh: Tensor) -> float:
        u, s, vh = (t.to(clock.device).double() for t in (u, s, vh))
        return float((there[0].double() - (u * s) @ vh).norm())

    ours = {"there": there} if clock.device.type == "cpu" else {"there": there, "sent": x}
    u, s, v = theirs()[0]
    allowed = SLACK * residual(u, s, v.mT)
    errors = {name: residual(*(t[0] for t in _svd(y, rank, clock)[:3])) for name, y in ours.items()}
    candidates: dict[str, Callable[[], object]] = {n: (lambda y=y: _svd(y, rank, clock)) for n, y in ours.items()}
    timings = turns(clock, candidates | {"torch": theirs}, rounds) if worst_of(errors.values()) <= allowed else {}
    records: list[Record] = []
    for name in ours:
        case = f"{stack.count} x {stack.rows} x {stack.columns}, rank {rank}"
        place = f"on the {clock.device.type}" if name == "there" else "sent from the CPU"
        record: Record = {"operator": "randomized_svd", "case": case, "dtype": "f32", "backend": place}
        record |= {"error": errors[name] / allowed, "status": "timed" if errors[name] <= allowed else "wrong"}
        if timings:
            record |= _times(timings[name]) | {"x torch": timings["torch"].median / timings[name].median}
        records.append(record)
    return records


def _svd(x: Tensor, rank: int, clock: Clock) -> tuple[Tensor, ...]:
    return tuple(randomized_svd(x, rank, device=clock.device))


def compress_records(adapters: int, clock: Clock, rounds: int) -> list[Record]:
    """Compress generated adapters into a folder, on the CPU alone and with the device; both errors have to agree."""
    with tempfile.TemporaryDirectory() as made:
        folders = make_collection(Path(made) / "adapters", adapters)

        def run(device: torch.device | None) -> Path:
            out = Path(tempfile.mkdtemp(dir=made)) / "out"
            loraspan.compress(folders, rank=32, device=device).save(out)
            return out

        ways: dict[str, torch.device | None] = {"CPU alone": None, f"device={clock.device}": clock.device}
        errors = {name: _error(run(device), folders) for name, device in ways.items()}
        own = errors["CPU alone"]
        wrong = {name for name, error in errors.items() if not abs(error - own) <= SAME * own}
        fine: dict[str, Callable[[], object]] = {n: (lambda d=d: run(d)) for n, d in ways.items() if n not in wrong}
        timings = turns(clock, fine, rounds)
    records = []
    for name in ways:
        case = f"{adapters} adapters of 12 modules, f32, rank 32"
        record: Record = {
            "operator": "compress",
            "case": case,
            "dtype": "f32",
            "backend": name,
            "dW error": errors[name],
        }
        record["status"] = "wrong" if name in wrong else "timed"
        if name in timings:
            record |= _times(timings[name]) | {"x CPU alone": timings["CPU alone"].median / timings[name].median}
        records.append(record)
    return records


def _error(folder: Path, folders: list[Path]) -> float:
    """Give the worst relative error on dW of a task."""
    space = loraspan.open(folder)
    tasks = []
    for name in space.tasks:
        slots = space.reconstruct(name).slots
        tasks.append((name, {path: (slot.down, slot.up, slot.scale) for path, slot in slots.items()}))
    return dw_errors(folders, tasks)["worst"]


def _times(timing: Timing) -> Record:
    return {"ms": timing.median, "low": timing.low, "high": timing.high}

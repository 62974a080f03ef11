"""Measure what this machine does at most: multiply-adds in registers, and memory read, written and copied.

    python benches/roofline.py [--threads 2] [--json FILE]

Figures are the best of the rounds, since nothing can make a ceiling look too high: GFLOP/s (a multiply-add counts as
two) and GB/s over 256 MiB. ``write`` uses ordinary stores, ``stream`` stores that go past the caches, ``copy`` ordinary
ones and counts what it reads plus what it writes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from _bench import machine, table, write_lines
from loraspan import _core, _native

_TRAFFIC_BYTES = 256 << 20


class Ceilings(NamedTuple):
    """GFLOP/s and GB/s of one instruction set; ``bf16`` is None where the processor has no such product."""

    f32: float
    f64: float
    bf16: float | None
    read: float
    write: float
    stream: float
    copy: float


def measure(threads: int, isa: str = _native.BEST, rounds: int = 9) -> Ceilings:
    """Measure all ceilings of one instruction set."""
    f32, f64, bf16 = (_arithmetic(kind, threads, isa, rounds) for kind in _core.Arithmetic.__members__.values())
    return Ceilings(f32 or 0.0, f64 or 0.0, bf16, *_traffic(threads, isa, rounds))


def _best(run: Callable[[], float], rounds: int) -> float:
    """Give the highest rate, in billions a second, of work that ``run`` reports."""
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        work = run()
        best = max(best, work / (time.perf_counter() - start) / 1e9)
    return best


def _arithmetic(kind: _core.Arithmetic, threads: int, isa: str, rounds: int) -> float | None:
    # 1e6 repetitions of 12 vector operations: some milliseconds, well above the start of the threads
    return _best(lambda: _core.arithmetic(kind, 1_000_000, threads, isa), rounds) or None


def _traffic(threads: int, isa: str, rounds: int) -> list[float]:
    memory = [torch.ones(_TRAFFIC_BYTES + 64, dtype=torch.uint8) for _ in range(2)]
    to, from_ = (-(-m.data_ptr() // 64) * 64 for m in memory)
    rates = []
    for kind in _core.Traffic.__members__.values():
        moved = float(_TRAFFIC_BYTES * (2 if kind is _core.Traffic.copy else 1))

        def run(kind: _core.Traffic = kind, moved: float = moved) -> float:
            _core.traffic(kind, to, from_, _TRAFFIC_BYTES, threads, isa)
            return moved

        rates.append(_best(run, rounds))
    return rates


def main() -> None:
    """Print the ceilings of every instruction set that runs here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = [name for name, built, supported in _native.INSTRUCTION_SETS if built and supported]
    records = [
        {"bench": "roofline", "set": name, **measure(options.threads, name)._asdict(), **machine()} for name in names
    ]
    for record in records:
        print(json.dumps(record))
    print(table(records, ["set", "threads", *Ceilings._fields]))
    write_lines(options.json, records)


if __name__ == "__main__":
    main()

"""What the benches share: interleaved timing, the record of the machine, JSON lines and a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from loraspan import _native


class Timing(NamedTuple):
    """Seconds of one candidate over all rounds: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleave(candidates: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Timing]:
    """Time each candidate once per round, so that all of them meet the same disturbances.

    A candidate gets the number of the round, to take another copy of its operands each time. One round before the
    first is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            run(round_)
            elapsed = time.perf_counter() - start
            if round_:
                seconds[name].append(elapsed)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: Sequence[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine() -> dict[str, object]:
    """Say where figures come from."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.BEST,
        "last_cache_bytes": last_cache_bytes(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "loraspan": version("loraspan"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def last_cache_bytes() -> int:
    """Give the size of the largest cache, 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units.get(s[-1], 1) for s in sizes), default=32 << 20)


def copies_past_cache(nbytes: int) -> int:
    """Say how many copies of an operand make each use of the next one a cold one: twice the last cache in all."""
    return max(2, -(-2 * last_cache_bytes() // max(1, nbytes)))


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Lay out the named columns of ``rows``; figures with three digits, what is missing as a dash."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def write_lines(path: str | None, records: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line to ``path``, if there is one."""
    if path:
        Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))

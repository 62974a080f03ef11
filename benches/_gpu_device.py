"""Clocks of ``benches/gpu.py``, on a GPU and on the CPU; what a card can do at most; where figures come from."""

from __future__ import annotations

import datetime
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from _bench import Timing, machine

Candidate = Callable[[int], object]
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
# runs that are not counted: libraries load, kernels are compiled, clocks rise
WARM_UP = 3


class WallClock:
    """Milliseconds on the CPU."""

    name = "wall clock"
    device = torch.device("cpu")
    backends = ("cpu", "reference")
    cache_bytes = 0

    def wait(self) -> None:
        """There is nothing to wait for."""

    def timed(self, run: Callable[[], object]) -> float:
        """Give the milliseconds of a call."""
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def kernels(self, run: Callable[[], object]) -> float | None:
        """Give the milliseconds of the kernels of a call, apart from copies and launches: none here."""
        del run

    def captured(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """Give what replays ``run`` as a CUDA graph: nothing here."""
        del run


class EventClock:
    """Milliseconds on a GPU between two events, nothing of the operands in its L2 cache."""

    name = "CUDA events"
    backends = ("cuda", "triton")

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = _l2_bytes(torch.cuda.get_device_properties(self.device))
        self._flush = torch.empty(max(256 << 20, 2 * self.cache_bytes), dtype=torch.uint8, device=self.device)

    def wait(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize()

    def timed(self, run: Callable[[], object]) -> float:
        """Give the milliseconds of a call, what it does on the host included once the flush is over."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def kernels(self, run: Callable[[], object]) -> float | None:
        """Give the milliseconds of the kernels of a call, apart from copies and launches; None if nobody tells."""
        self._flush.zero_()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            run()
            self.wait()
        found = [
            event.time_range.elapsed_us()
            for event in record.events()
            if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Copy"))
        ]
        return sum(found) / 1e3 if found else None

    def captured(self, run: Callable[[], object]) -> Callable[[], object] | None:
        """Give what replays ``run`` as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


Clock = WallClock | EventClock


def missing(device: str) -> str | None:
    """Say that there is no such device, if so, without touching it: where one process may, the tests come first."""
    if device == "cpu" or torch.cuda.is_available():
        return None
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"torch {torch.__version__}, built with {built}, finds no GPU here; --device cpu runs without one"


def clock_of(device: str) -> Clock:
    """Give the clock of ``cpu`` or of ``cuda``, the current one."""
    return WallClock() if device == "cpu" else EventClock()


def take_turns(
    clock: Clock, candidates: Mapping[str, Candidate], rounds: int, warm_up: int = WARM_UP
) -> dict[str, Timing]:
    """Time every candidate once a round, so that all meet the same disturbances; milliseconds."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warm_up + rounds):
        for name, run in candidates.items():
            took = clock.timed(lambda run=run, turn=turn: run(turn))  # type: ignore[misc]
            if turn >= warm_up:
                found[name].append(took)
    return {name: summary(values) for name, values in found.items()}


def summary(values: list[float]) -> Timing:
    """Give the median, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(median, low, high)


def kernel_times(clock: Clock, candidates: Mapping[str, Candidate]) -> dict[str, float | None]:
    """Give the milliseconds of each candidate's kernels, the median of three calls."""
    times: dict[str, float | None] = {}
    for name, run in candidates.items():
        found = [clock.kernels(lambda run=run, turn=turn: run(turn)) for turn in range(3)]  # type: ignore[misc]
        told = [each for each in found if each is not None]
        times[name] = statistics.median(told) if told else None
    return times


def ceilings(clock: Clock, copied: int, size: int, rounds: int) -> dict[str, float]:
    """Measure a copy in bytes/s, read and written, and products ``[size, size]`` in operations/s by dtype.

    The best of the rounds, since nothing makes a ceiling look too high. float32 products are IEEE's, without TF32.
    """
    torch.set_float32_matmul_precision("highest")
    source = torch.ones(copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    rates = {"copy": 2 * copied / _best(clock, lambda: target.copy_(source), rounds)}
    for kind, dtype in DTYPES.items():
        side = size // 2 if kind == "f64" else size
        # drawn and not constant: what the entries are decides the power that a card draws, and so its clock
        x = torch.randn(side, side, device=clock.device).to(dtype)
        out = torch.empty_like(x)
        rates[kind] = 2 * side**3 / _best(clock, lambda x=x, out=out: torch.matmul(x, x, out=out), rounds)
    return rates


def _best(clock: Clock, run: Callable[[], Any], rounds: int) -> float:
    return min(clock.timed(run) for _ in range(WARM_UP + rounds)) / 1e3


def facts(device: str) -> dict[str, object]:
    """Say where figures come from; what is of a GPU is None where the CPU computes.

    A GPU is asked in a process of its own, which is gone before the tests begin: some let in one at a time.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    found: dict[str, object] = {
        "device": device,
        "card": None,
        "date": now.strftime("%Y-%m-%d"),
        "begun": now.isoformat(timespec="seconds"),
        "triton": _version("triton") or _version("pytorch-triton") or _version("pytorch-triton-rocm"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    if device == "cuda":
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
            found |= child.submit(_card).result()
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found | {"numpy": _version("numpy"), "system": platform.platform()} | machine()


def _card() -> dict[str, object]:
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": _l2_bytes(card),
    }


def _l2_bytes(card: Any) -> int:
    # what the oldest torch does not tell
    return int(getattr(card, "L2_cache_size", 0))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(program: str, *arguments: str) -> str | None:
    """Give the first line that a program prints, or None."""
    if shutil.which(program) is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True, timeout=60)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None

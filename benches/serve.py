"""Serve many tasks of one model at once, beside PEFT's mixed batch and vlora's wrapper.

    python benches/serve.py [--out FILE] [--only adapters,model] [--rounds 9]
    python benches/serve.py --device cuda --out FILE            # bf16, CUDA graphs and torch.compile too
    python benches/serve.py --small                             # tiny shapes: whether all of it runs, nothing else

``benches/README.md`` says what the figures mean. Answers are checked against float64 before anyone is timed. A peer
that is not installed is left out, and said. Ends with 1 on a wrong answer or a part that broke, with 2 without a GPU
where one was asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from _bench import table
from _gpu_device import WallClock, clock_of, facts, missing
from _gpu_report import Record, Report
from _serve_contenders import PEERS, Batch, Place
from _serve_held import graph_records, memory_records, switching_records
from _serve_space import Sizes
from _serve_timed import OF_PEERS, adapter_records, model_records, resident_records

PARTS = ("adapters", "model", "resident", "memory", "switching", "graphs")
COLUMNS = ("case", "dtype", "way", "how", "backend", "status", "ms", "low", "high", "us", "x PEFT", "x vlora", "x base")
MORE = ("MB", "adapters MB", "share", "kB of Python", "kB of tensors", "B kept", "goals", "reason")
# dearest over cheapest of cases that should cost the same
LEVEL = 1.25
SERIES = ((1, 1), (100, 1), (10_000, 1), (64, 64), (1000, 64), (10_000, 64), (64, 16), (64, 4), (64, 2))
SMALL_SERIES = ((1, 1), (9, 1), (4, 4), (9, 4))

# glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1

Job = tuple[str, Callable[[], Sequence[Record]]]


class Lines(Report):
    """The records of a run as they come, tables of each part, and the goals."""

    def add(self, record: Record) -> None:
        """Take a record."""
        super().add({"bench": "serve", **record})

    def show(self, parts: Sequence[str]) -> None:
        """Print a table for each part, and which goals are met."""
        for part in parts:
            rows = [record for record in self.records if record["operator"] == part]
            columns = [c for c in (*COLUMNS, *MORE) if any(row.get(c) is not None for row in rows)]
            if rows:
                print(f"\n{part}\n{table(rows, columns)}")
        asked = [(r, goal) for r in self.records for goal in str(r.get("goals") or "").split("; ") if goal]
        print(f"\n{sum(goal.endswith(': met') for _, goal in asked)} of {len(asked)} goals met; missed:")
        for record, goal in asked:
            if not goal.endswith(": met"):
                print(
                    "  " + ", ".join(str(record[key]) for key in ("operator", "case", "way") if record.get(key)), goal
                )
        for record in self.failed:
            print(f"NOT RIGHT: {record['operator']}, {record.get('case')}, {record.get('backend')}: {record['reason']}")


def jobs(at: Place, small: bool, compiler: str | None, peers: tuple[str, ...] = PEERS) -> dict[str, list[Job]]:
    """Give what is to be measured, part by part."""
    gpu = at.clock.device.type == "cuda"
    rows, sizes = (4, ((32, 2),)) if small else (64, ((1024, 8), (4096, 2)))
    all_of = Batch(rows, rows, rows)
    # layers of a Llama: width, hidden, how many
    shapes = ((32, 48, 2),) if small else ((1024, 2816, 8), (4096, 11008, 2))
    many = 3 if small else 128 if gpu else 8
    found: dict[str, list[Job]] = {part: [] for part in PARTS}
    for size, count in sizes:
        run = partial(adapter_records, size, count, all_of, at, goals=OF_PEERS)
        found["adapters"].append((f"{count} x {size} x {size}", run))
    for shape in shapes:
        for tokens in (1, many):
            # one compilation, of the largest layers by single tokens: what an engine decodes with
            chosen = compiler if shape is shapes[-1] and tokens == 1 else None
            run = partial(model_records, shape, tokens, all_of, at, chosen, peers)
            found["model"].append((f"{shape[2]} layers of {shape[0]}, {tokens} tokens", run))
    series = [Batch(rows, distinct, resident) for resident, distinct in (SMALL_SERIES if small else SERIES)]
    found["resident"].append(("series", partial(resident_records, sizes[-1][0], series, at)))
    size, tasks = (64, 20) if small else (4096, 1000)
    found["memory"].append((f"{tasks} tasks", partial(memory_records, size, 4, tasks, at)))
    found["switching"].append(("switching", partial(switching_records, shapes[0], all_of, at)))
    found["graphs"].append(("graphs", partial(graph_records, sizes[0][0], all_of, at)))
    return found


def levels(records: Sequence[Record]) -> list[Record]:
    """Say of each number of distinct tasks whether time is flat in the tasks resident, way by way."""
    mine = [r for r in records if r["operator"] == "resident" and r.get("backend") == "loraspan" and "ms" in r]
    found: list[Record] = []
    for distinct, way in dict.fromkeys((r["distinct"], r["way"]) for r in mine):
        times = {r["resident"]: float(str(r["ms"])) for r in mine if (r["distinct"], r["way"]) == (distinct, way)}
        if len(times) > 1:
            ratio = max(times.values()) / min(times.values())
            case = f"{min(times)} to {max(times)} tasks resident, {distinct} in the batch"
            goal = f"largest over smallest {ratio:.3g}, goal <= {LEVEL}: {'met' if ratio <= LEVEL else 'missed'}"
            found.append({"case": case, "way": way, "backend": "loraspan", "status": "compared", "goals": goal})
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), help="of models and tables (f32; bf16 on a GPU)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, by commas")
    parser.add_argument("--small", action="store_true", help="tiny shapes, no use but to see that all of it runs")
    parser.add_argument("--rounds", type=int, help="turns of everyone: 9, or 2 if small")
    parser.add_argument("--alone", action="store_true", help="whole models without peers, in a minute or two")
    parser.add_argument("--compile", action="store_true", help="compiled models too, as on a GPU; a minute on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of JSON lines; one that is there is replaced")
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only is of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    return options


def _place(options: argparse.Namespace) -> Place:
    dtype = options.dtype or ("bf16" if options.device == "cuda" else "f32")
    rounds = options.rounds or (2 if options.small else 9)
    return Place(clock_of(options.device), dtype, rounds, Sizes(8, 4) if options.small else Sizes())


def _compiler(options: argparse.Namespace) -> str | None:
    """Give the compiler of the model that is compiled too; None for none."""
    if options.device == "cpu" and not options.compile:
        return None
    return "aot_eager" if options.small else "inductor"


def _keep_memory() -> None:
    """Let freed memory stay with the process, where the C library can: vlora frees and takes gigabytes at each switch.

    Without it, half of vlora's time, and whoever's turn is next, waits for the system's fresh pages.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def _start(options: argparse.Namespace) -> tuple[Mapping[str, object], Place]:
    here = facts(options.device) | {"small": options.small}
    print("\n".join(f"{key:<18}{value}" for key, value in here.items()), flush=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.unlink(missing_ok=True)
    place = _place(options)
    if options.small and isinstance(place.clock, WallClock):
        # two threads of tiny work wait for each other where others are at work
        torch.set_num_threads(1)
    return here, place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it; give the exit code."""
    options = _options(arguments)
    if (reason := missing(options.device)) is not None:
        print(f"serve.py: {reason}", file=sys.stderr)
        return 2
    _keep_memory()
    # a node without a network: nobody is to wait for one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    here, place = _start(options)
    peers = () if options.alone else PEERS
    report = Lines(here, options.out)
    with torch.no_grad():
        for part, runs in jobs(place, options.small, _compiler(options), peers).items():
            for case, run in runs if part in options.only else ():
                # tiny shapes have no goals
                more: Record = {"operator": part} | ({"goals": None} if options.small else {})
                report.guarded(more | {"case": case}, lambda run=run, more=more: [r | more for r in run()])
                if place.clock.device.type == "cuda":
                    torch.cuda.empty_cache()
    for record in () if options.small else levels(report.records):
        report.add({"operator": "resident", **record})
    report.add({"operator": None, "status": "ended", "load at the end": os.getloadavg()[0]})
    report.show(options.only)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

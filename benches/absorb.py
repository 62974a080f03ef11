"""One more adapter in a store of many tasks: time, bytes written and memory, whatever the number of tasks.

    python benches/absorb.py --json benches/results/absorb.jsonl     # stores of 100, 300 and 1000 tasks; some minutes
    python benches/absorb.py --tasks 100 --no-peer

A store of 100 tasks is made by ``compress(rank=64)`` of the adapters of ``benches/collection.py`` (12 slots of 4096
inputs, rank 16, float32), and larger ones hold its columns several times under other names: as many bytes, files and
records as so many tasks have. A new process opens the store and adds adapters that it does not hold, one by one, each
with its own commit, the first of them untimed; then the same without ``fsync``. vlora holds 100 adapters of the
collection in memory and absorbs others, one by one: ``absorb``, which fits everything anew, and
``absorb_incremental``; it saves nothing.

Imports are not timed, files are in the page cache, threads are two. Memory is the peak of anonymous pages above that
after the import, sampled from outside. The error of what was added is measured in float64 from the originals. Linux
only.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import loraspan
from _bench import machine, table, write_lines
from collection import make_collection
from compress_runs import Failure, _environment, _watch, peers_python, warm
from loraspan import store
from loraspan.collection.collection import Collection, Segment

HELD, RANK, ADDED = 100, 64, 9
# within which adapters are added: about what 64 directions leave of these
MAX_ERROR = 0.1
# what one run of a peer may take; 300 adapters are past it for vlora, which is never asked to hold more than 100
PEER_BYTES = 4e9
GOAL, LEVEL = 50.0, 1.3
PEERS = Path(__file__).parent / "peers"
TIMES = ("ms", "low", "high", "no fsync", "open ms")
COLUMNS = ("contender", "tasks", *TIMES, "kB written", "memory MB", "error", "x ours")
Record = dict[str, Any]


def main() -> None:
    options = _options()
    folders = make_collection(options.cache / "collections" / "f32", HELD + ADDED, "f32")
    warm(folders)
    base = _base(folders[:HELD], options)
    records = [_ours(base, folders[HELD:], tasks, options) for tasks in options.tasks]
    if options.peer:
        records += _peer(folders, options)
    ours = records[0]["ms"]
    records = [
        {"bench": "absorb", **r, "x ours": r["ms"] / ours} | machine() | {"threads": options.threads} for r in records
    ]
    write_lines(options.json, records)
    print(table(records, COLUMNS))
    _judge(records)


def _options() -> argparse.Namespace:
    cache = Path.home() / ".cache" / "loraspan-bench"
    parser = argparse.ArgumentParser(description="Add one adapter to stores of many tasks.")
    parser.add_argument("--tasks", type=int, nargs="+", default=[100, 300, 1000], help=f"multiples of {HELD}")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without vlora")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=cache, help=f"collections and stores ({cache})")
    parser.add_argument("--json", help="write one JSON line per contender and size")
    options = parser.parse_args()
    if any(tasks < HELD or tasks % HELD for tasks in options.tasks):
        parser.error(f"--tasks are multiples of {HELD}")
    return options


def _base(folders: list[Path], options: argparse.Namespace) -> Collection:
    """Give the collection of the first adapters, compressed once and kept."""
    kept = options.cache / "absorb" / f"base-{RANK}.span"
    if not (kept / "CURRENT").exists():
        shutil.rmtree(kept, ignore_errors=True)
        loraspan.compress(folders, rank=RANK).save(kept)
    return loraspan.open(kept).collection


def _grown(base: Collection, tasks: int) -> Collection:
    """Give as many tasks with the same columns, under names of their own."""
    segments = []
    for copy in range(tasks // HELD):
        for segment in base.segments:
            named = tuple(t and replace(t, name=t.name if not copy else f"{t.name} copy {copy}") for t in segment.tasks)
            segments.append(Segment(named, segment.columns))
    return replace(base, segments=tuple(segments))


def _ours(base: Collection, new: list[Path], tasks: int, options: argparse.Namespace) -> Record:
    """Add one adapter after the other to a store of ``tasks``, with ``fsync`` and, in a store of its own, without."""
    folder = options.cache / "absorb" / "work.span"
    found = {}
    for sync in (True, False):
        shutil.rmtree(folder, ignore_errors=True)
        store.save(_grown(base, tasks), folder)
        flags = [] if sync else ["--no-sync"]
        command = [sys.executable, PEERS / "absorb_loraspan.py", folder, *new, "--max-error", MAX_ERROR, *flags]
        found[sync] = _run([*command, "--threads", options.threads], options.threads)
    shutil.rmtree(folder, ignore_errors=True)
    done = found[True]
    return {
        "contender": "loraspan add",
        "tasks": tasks,
        **_spread(done["seconds"]),
        "no fsync": 1e3 * statistics.median(found[False]["seconds"]),
        "open ms": 1e3 * done["open"],
        "kB written": statistics.median(done["written"]) / 1e3,
        "memory MB": done["memory"] / 1e6,
        "error": max(done["errors"]),
        "seconds": done["seconds"],
        "written": done["written"],
    }


def _peer(folders: list[Path], options: argparse.Namespace) -> list[Record]:
    python = peers_python(options.cache / "venv")
    records = []
    for method in ("absorb", "absorb_incremental"):
        command = [python, PEERS / "absorb_vlora.py", method, *folders[: HELD + 3], "--held", HELD]
        try:
            done = _run([*command, "--threads", options.threads], options.threads)
        except Failure as failure:
            print(f"absorb: vlora's {method} failed: {failure}; the others go on", file=sys.stderr)
            continue
        if done["memory"] > PEER_BYTES:
            print(f"absorb: vlora's {method} took {done['memory'] / 1e9:.1f} GB, past the limit", file=sys.stderr)
        records.append(
            {
                "contender": f"vlora {method}",
                "tasks": HELD,
                **_spread(done["seconds"]),
                "memory MB": done["memory"] / 1e6,
                "error": max(done["errors"]),
                "seconds": done["seconds"],
            }
        )
    return records


def _run(command: list[object], threads: int) -> Record:
    """Run a contender in a new process and give what it says, with its peak of memory."""
    words = [str(word) for word in command]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, env=_environment(threads))
    events, peak = _watch(child)
    if child.returncode or "done" not in events:
        raise Failure(f"{Path(words[1]).name} ended with status {child.returncode}")
    return events["done"] | {"memory": max(peak - events["ready"]["anonymous"], 0)}


def _spread(seconds: list[float]) -> Record:
    return {"ms": 1e3 * statistics.median(seconds), "low": 1e3 * min(seconds), "high": 1e3 * max(seconds)}


def _judge(records: list[Record]) -> None:
    """Say whether the goals are met."""
    ours = [record for record in records if record["contender"] == "loraspan add"]
    for name in ("ms", "kB written"):
        values = [record[name] for record in ours]
        ratio = max(values) / min(values)
        met = "met" if ratio <= LEVEL else "missed"
        print(f"goal: {name} independent of the number of tasks: largest over smallest {ratio:.2f} (<= {LEVEL}): {met}")
    for record in records:
        if record["contender"] == "vlora absorb":
            ratio = record["x ours"]
            met = "met" if ratio >= GOAL else "missed"
            print(f"goal: {GOAL:.0f} times faster than vlora's absorb: {ratio:.0f}: {met}")


if __name__ == "__main__":
    main()

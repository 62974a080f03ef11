"""The whole job, measured: a folder of PEFT adapters becomes a compressed folder, by loraspan and by its peers.

    python benches/compress.py --adapters 100 --json benches/results/compress.jsonl
    python benches/compress.py --only loraspan "torch mock" --repeats 9
    python benches/compress.py --scaling
    python benches/compress.py --show benches/results/compress.jsonl

Each run is a new process on two threads with a warm page cache; imports are not timed. Memory is the peak of anonymous
pages above that after the import, sampled from outside every 5 ms; pages of mapped files are not in it. The error on
``dW`` is measured afterwards from what was saved. What is compared with what is in ``benches/README.md``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench import machine
from collection import make_collection
from compress_report import show_goals, show_inside, show_scaling, show_table
from compress_runs import ALL_DTYPES, CONTENDERS, Contender, Failure, measure, peers_python, run_once, warm

SCALING = (50, 100, 200, 400)
Record = dict[str, Any]


def main() -> None:
    options = _options()
    if options.show:
        records = [json.loads(line) for line in options.show.read_text().splitlines()]
    elif options.scaling:
        records = [_contest(["loraspan"], options.dtypes[0], count, options)[0] for count in SCALING]
    else:
        records = []
        for dtype in options.dtypes:
            records += _contest(options.only, dtype, options.adapters, options)
        if "loraspan" in options.only:
            records.append(_inside(options))
    if options.json and not options.show:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    show_table(records)
    show_inside(records)
    show_scaling(records)
    show_goals(records)


def _options() -> argparse.Namespace:
    cache = Path.home() / ".cache" / "loraspan-bench"
    parser = argparse.ArgumentParser(description="Measure the whole job beside the peers.")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", choices=ALL_DTYPES, default=list(ALL_DTYPES))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--repeats", type=int, help="for every contender; by default 5, and 2 and 1 for the slow ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scaling", action="store_true", help=f"loraspan alone at {SCALING} adapters")
    parser.add_argument("--cache", type=Path, default=cache, help=f"collections and outputs ({cache})")
    parser.add_argument("--venv", type=Path, help="the peers' virtual environment, made if missing (CACHE/venv)")
    parser.add_argument("--json", type=Path, help="append one JSON line per contender, dtype and size")
    parser.add_argument("--show", type=Path, help="run nothing; print the tables of such a file")
    options = parser.parse_args()
    options.venv = options.venv or options.cache / "venv"
    return options


def _contest(names: list[str], dtype: str, adapters: int, options: argparse.Namespace) -> list[Record]:
    """Run the contenders on one collection in turns, so that a slow minute of the machine hits all of them."""
    contenders = [CONTENDERS[name] for name in names if dtype in CONTENDERS[name].dtypes]
    collection, source_bytes = _collection(dtype, adapters, options)
    repeats = {one.name: options.repeats or one.repeats for one in contenders}
    runs: dict[str, list[Record]] = {one.name: [] for one in contenders}
    for turn in range(max(repeats.values(), default=0)):
        for one in contenders:
            if turn < repeats[one.name]:
                try:
                    runs[one.name].append(_run(one, collection, adapters, options))
                except Failure as failure:
                    print(f"compress: {failure}; the others go on", file=sys.stderr)
                    repeats[one.name] = 0
                    continue
                print(f"{one.name}, {dtype}, {adapters}: {runs[one.name][-1]['total']:.2f} s", file=sys.stderr)
    records = []
    for one in (one for one in contenders if repeats[one.name]):
        errors = measure(one, _python(one, options), collection, adapters, options.threads, _out(one, options))
        shape = {"dtype": dtype, "adapters": adapters, "rank": one.rank, "source_bytes": source_bytes}
        records.append({"bench": "compress", "contender": one.name, **shape, **_median(runs[one.name]), **errors})
    return [record | _machine(options) for record in records]


def _inside(options: argparse.Namespace) -> Record:
    """Take what our own job spends its time on, from the median of five runs that time their inside."""
    one, dtype = CONTENDERS["loraspan"], options.dtypes[0]
    collection, source_bytes = _collection(dtype, options.adapters, options)
    repeats = options.repeats or one.repeats
    runs = [_run(one, collection, options.adapters, options, inside=True) for _ in range(repeats)]
    middle = sorted(runs, key=lambda run: run["total"])[len(runs) // 2]
    shape = {"dtype": dtype, "adapters": options.adapters, "rank": one.rank, "source_bytes": source_bytes}
    return {"bench": "compress inside", "contender": one.name, **shape, "seconds": middle["stages"]} | _machine(options)


def _run(
    one: Contender, collection: Path, adapters: int, options: argparse.Namespace, *, inside: bool = False
) -> Record:
    return run_once(
        one, _python(one, options), collection, adapters, options.threads, _out(one, options), inside=inside
    )


def _collection(dtype: str, adapters: int, options: argparse.Namespace) -> tuple[Path, int]:
    collection = options.cache / "collections" / dtype
    return collection, warm(make_collection(collection, adapters, dtype))


def _python(one: Contender, options: argparse.Namespace) -> str:
    return sys.executable if one.own else peers_python(options.venv)


def _out(one: Contender, options: argparse.Namespace) -> Path:
    return Path(options.cache / "out" / one.name.replace(" ", "-"))


def _median(runs: list[Record]) -> Record:
    """Give the run of median time whole, with the times of all of them."""
    middle = sorted(runs, key=lambda run: run["total"])[(len(runs) - 1) // 2]
    totals = [run["total"] for run in runs]
    return middle | {"total": statistics.median(totals), "totals": totals, "memory": max(run["memory"] for run in runs)}


def _machine(options: argparse.Namespace) -> Record:
    """Say where and with what a record was made."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return machine() | {"threads": options.threads, "commit": commit.strip()}


if __name__ == "__main__":
    main()

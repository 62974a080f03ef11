"""Error over bytes: loraspan beside what else keeps adapters, on collections that share much and little.

    python benches/fidelity.py --json benches/results/fidelity.jsonl            # everyone; what is there is not redone
    python benches/fidelity.py --json benches/results/fidelity.jsonl --ours     # loraspan alone, anew, against the rest
    python benches/fidelity.py --no-peers --only shared                         # without vlora and lorashare
    python benches/fidelity.py --show benches/results/fidelity.jsonl --picture benches/results/fidelity.svg

For every point of another way (its bytes, its worst error) some point of ours has to have no more bytes and no more
error. Where none of ours has so far, loraspan is asked for ``max_bytes`` of as many. Bytes are those of all files; an
error is relative, Frobenius, on ``dW`` over all slots of a task, of the factors that come back, in float64. What the
ways and the columns are is in ``benches/README.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import loraspan
from _bench import machine
from _fidelity_cases import Case, Factors, cases
from _fidelity_draw import GOAL_SHARE, draw
from _fidelity_peers import NAMES, peers
from _fidelity_show import OURS, Point, met, others_of, ours_of, show
from _fidelity_ways import Kept, controls, svds
from compress_runs import peers_python
from loraspan.adapters import Adapter
from loraspan.adapters.base import Slot
from loraspan.errors import ArgumentError

VENV = Path.home() / ".cache" / "loraspan-bench" / "venv"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=24, help="of the generated collections")
    parser.add_argument("--only", nargs="+", choices=list(cases(1)), metavar="CASE", help=", ".join(cases(1)))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--ours", action="store_true", help="forget loraspan's own points of these cases first")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep every point there as it comes, and take those up"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the curves; needs matplotlib")
    parser.add_argument("--show", type=Path, metavar="FILE", help="run nothing; print the tables of such a file")
    options = parser.parse_args(arguments)
    if options.show:
        records = _read(options.show)
    else:
        torch.set_num_threads(1)
        records = run(options)
    show(records)
    if options.picture:
        draw(records, options.picture)


def run(options: argparse.Namespace) -> list[Point]:
    """Add to the points of a file those that it lacks."""
    chosen = {name: make for name, make in cases(options.adapters).items() if not options.only or name in options.only}
    file = Lines(options.json)
    if options.ours:
        file.drop(lambda record: record.get("way") == OURS and record["case"] in chosen)
    file.add({"machine": machine()})
    python = None if options.no_peers else peers_python(VENV)
    for name, make in chosen.items():
        case = make()
        about = {"case": name, "adapters": len(case.adapters), "factor_bytes": _factor_bytes(case.adapters)}
        for kept in _others(case, [record for record in file.records if record.get("case") == name], python):
            if isinstance(kept, Kept):
                sizes = {"nbytes": kept.nbytes} | ({"folders": kept.folders} if kept.folders else {})
                file.add({**about, "way": kept.way, **sizes, **measure(case, kept.rebuilt)})
            else:
                file.add({**about, "way": kept[0], "refused": kept[1]})
        rows = [record for record in file.records if record.get("case") == name]
        for record in _ours(case, rows):
            file.add({**about, **record})
            print(f"fidelity: {name}: {_short(record)}", file=sys.stderr)
    return file.records


class Lines:
    """Records, written to a file, if there is one, as soon as they are there."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.records = _read(path) if path and path.exists() else []

    def add(self, record: Point) -> None:
        """Add one at the end."""
        self.records.append({"bench": "fidelity", **record})
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def drop(self, unwanted: object) -> None:
        """Write the file anew without some."""
        self.records = [record for record in self.records if not unwanted(record)]
        if self._path:
            self._path.write_text("".join(json.dumps(record) + "\n" for record in self.records))


def measure(case: Case, rebuilt: Sequence[Factors]) -> Point:
    """Give the worst and the mean error, and the accuracy where there are tasks."""
    errors = [error(adapter, factors) for adapter, factors in zip(case.adapters, rebuilt, strict=True)]
    found: Point = {"worst": max(errors), "mean": sum(errors) / len(errors)}
    return found | ({"accuracy": case.accuracy(rebuilt)} if case.accuracy else {})


def error(original: Adapter, rebuilt: Factors) -> float:
    """Give the relative error on ``dW`` over all slots."""
    lost = whole = 0.0
    for path, slot in original.slots.items():
        left, right = slot.scale * slot.up.double(), slot.down.double()
        mine = rebuilt[path]
        lost += _square(torch.cat([left, -mine[0]], 1), torch.cat([right, mine[1]]))
        whole += _square(left, right)
    return math.sqrt(lost / whole)


def _square(left: Tensor, right: Tensor) -> float:
    """``|left right|_F^2`` by QR: squares of Grams would end at errors of 1e-8."""
    inner = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(inner.square().sum())


def _others(case: Case, known: Sequence[Point], python: str | None) -> Iterator[Kept | tuple[str, str]]:
    names = {record["way"].split()[0].rstrip(",") for record in known}
    if "SVD" not in names:
        factors = [{p: (s.scale * s.up.double(), s.down.double()) for p, s in a.slots.items()} for a in case.adapters]
        yield Kept("original", sum(adapter.nbytes for adapter in case.adapters), factors)
        yield from svds(case.adapters)
        yield from controls(case.adapters)
    if python is not None and not names & set(NAMES):
        yield from peers(case.adapters, python)


def _ours(case: Case, rows: Sequence[Point]) -> Iterator[Point]:
    """Ask for as many bytes as a point takes, those of the fewest first, where no point of ours meets it yet."""
    mine = ours_of(rows)
    asked = {row["asked"] for row in rows if row["way"] == OURS}
    targets = [(row[key], key, row) for row in others_of(rows) for key in ("nbytes", "folders") if key in row]
    goal = int(GOAL_SHARE * _factor_bytes(case.adapters)) if case.accuracy else 0
    for limit in sorted({limit for limit, _, _ in targets} | ({goal} if goal else set())):
        open_still = [row for bytes_, key, row in targets if bytes_ == limit and not met(row, mine, key)]
        if limit in asked or not (open_still or limit == goal):
            continue
        found = compress(case, limit)
        mine += [found] if "nbytes" in found else []
        yield found


def compress(case: Case, limit: int) -> Point:
    """Ask loraspan for ``max_bytes``, and measure what the folder takes and gives back."""
    try:
        space = loraspan.compress(list(case.adapters), max_bytes=limit)
    except ArgumentError as refusal:
        return {"way": OURS, "asked": limit, "refused": str(refusal)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.span"
        space.save(path)
        nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        opened = loraspan.open(path)
        rebuilt = [_factors(opened.reconstruct(adapter.name).slots) for adapter in case.adapters]
        found = {"way": OURS, "asked": limit, "nbytes": nbytes, **measure(case, rebuilt)}
    chosen = next((line for line in space.report().plans if line.chosen), None)
    return found | {"widths": str(space.collection.widths), "forms": chosen.forms if chosen else None}


def _factors(slots: dict[str, Slot]) -> Factors:
    return {path: (slot.scale * slot.up.double(), slot.down.double()) for path, slot in slots.items()}


def _factor_bytes(adapters: Iterable[Adapter]) -> int:
    """Of the factors in float32."""
    return sum(4 * (slot.up.numel() + slot.down.numel()) for adapter in adapters for slot in adapter.slots.values())


def _short(record: Point) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
    )


def _read(path: Path) -> list[Point]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()

"""Error over bytes: loraspan beside what else keeps adapters, on collections that share much and little.

    python benches/fidelity.py --json benches/results/fidelity.jsonl --picture fidelity.png
    python benches/fidelity.py --no-peers                 # without the virtual environment of vlora and lorashare
    python benches/fidelity.py --show benches/results/fidelity.jsonl

For every point of another way (its bytes, its worst error) loraspan is asked for ``max_bytes`` of as many, and has to
have no more error: the last table counts where it does. An error is relative, Frobenius, on ``dW`` over all slots of a
task, in float64. Bytes are all bytes on disk: those of a PEFT folder each, with its header and configuration, for SVDs.

``SVD``: every adapter's own truncated SVD at one rank in all slots, stored in f16, 8 and 4 bits (the packing of
loraspan itself). ``SVD, ranks by energy``: the same with each adapter's ranks chosen freely over its slots, the most
energy per byte first. ``random basis``: shared bases drawn at random. ``mean``: the mean of all ``dW``, for everyone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import loraspan
from _bench import machine, table, write_lines
from _fidelity_cases import cases, write_all
from compress_runs import CONTENDERS, Failure, measure, peers_python, run_once
from loraspan.adapters import Adapter
from loraspan.collection.collection import SlotSpace
from loraspan.collection.express import express
from loraspan.collection.layout import header
from loraspan.collection.rows import row_bytes, store_rows, tensors_of, values_of
from loraspan.errors import ArgumentError

VENV = Path.home() / ".cache" / "loraspan-bench" / "venv"
WIDTHS = {"f16": torch.float16, "8 bits": 8, "4 bits": 4}
Point = dict[str, object]
# of the configuration file of a PEFT adapter, at the least: peft_type, r, lora_alpha and three target modules
CONFIG_BYTES = 120
# what a sum of float64 squares may differ by
ROUNDING = 1e-6


def main() -> None:
    """Run all cases, print the tables, and write JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--picture", metavar="FILE", help="draw the curves; needs matplotlib")
    parser.add_argument("--show", metavar="FILE", help="print the tables of an earlier run")
    options = parser.parse_args()
    if options.show:
        records = [json.loads(line) for line in Path(options.show).read_text().splitlines()]
    else:
        records = list(run(options))
        write_lines(options.json, records)
    show(records)
    if options.picture:
        draw(records, options.picture)


def run(options: argparse.Namespace) -> Iterator[Point]:
    """Give a record per point of every way, and ours beside it."""
    python = None if options.no_peers else peers_python(VENV)
    where = machine()
    for name, adapters in cases(options.adapters).items():
        if options.only and name not in options.only:
            continue
        print(f"fidelity: {name}", file=sys.stderr)
        for way, nbytes, errors in ways(adapters, python):
            point = {"bench": "fidelity", "case": name, "way": way, "nbytes": nbytes, **_summary(errors)}
            yield {**point, **ours(adapters, nbytes), "adapters": len(adapters), "machine": where}


def ours(adapters: Sequence[Adapter], nbytes: int) -> Point:
    """Ask loraspan for as many bytes; measure what it gives against the originals."""
    try:
        space = loraspan.compress(list(adapters), max_bytes=nbytes)
    except ArgumentError:
        return {"our_nbytes": None, "our_worst": None, "our_mean": None}
    errors = [_error(adapter, space.reconstruct(adapter.name)) for adapter in adapters]
    found = _summary(errors)
    widths = str(space.collection.widths)
    return {"our_nbytes": space.nbytes, "our_worst": found["worst"], "our_mean": found["mean"], "our_widths": widths}


def ways(adapters: Sequence[Adapter], python: str | None) -> Iterator[tuple[str, int, list[float]]]:
    """Give every point of every other way: its name, bytes and errors."""
    spectra = [{path: _svd(slot) for path, slot in adapter.slots.items()} for adapter in adapters]
    widest = max(len(s) for of in spectra for _, s, _ in of.values())
    for width in WIDTHS:
        for rank in sorted({1, 2, 3, widest // 2, 3 * widest // 4, widest}):
            kept = [{path: min(rank, len(s)) for path, (_, s, _) in of.items()} for of in spectra]
            yield f"SVD {width}, rank {rank}", *_stored(spectra, kept, width)
        for share in (0.05, 0.2, 0.5):
            kept = [_by_energy(of, share, width) for of in spectra]
            yield f"SVD {width}, ranks by energy, {share:g} dropped", *_stored(spectra, kept, width)
    for rank in (8, 32):
        yield f"random basis {rank}", *_random_basis(adapters, rank)
    yield "mean", *_mean(spectra)
    if python is not None:
        yield from _peers(adapters, python)


def _svd(slot: object) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(slot.up.double())
    p, t = torch.linalg.qr(slot.down.double().T)
    u, s, vh = torch.linalg.svd(slot.scale * r @ t.T)
    return (q @ u).T, s, vh @ p.T


def _stored(
    spectra: Sequence[dict[str, tuple[Tensor, Tensor, Tensor]]], kept: Sequence[dict[str, int]], name: str
) -> tuple[int, list[float]]:
    width, nbytes, errors = WIDTHS[name], 0, []
    for of, ranks in zip(spectra, kept, strict=True):
        lost = whole = 0.0
        held: list[tuple[str, torch.dtype, Sequence[int]]] = []
        for path, (u, s, v) in of.items():
            rank = ranks[path]
            root = s[:rank].sqrt()[:, None]
            ends = [store_rows(root * side[:rank], width) if rank else None for side in (u, v)]
            for factor, end in zip("BA", ends, strict=True):
                parts = [] if end is None else tensors_of(f"base_model.model.{path}.lora_{factor}", "weight", end)
                held += [(tensor_name, tensor.dtype, tensor.shape) for tensor_name, tensor in parts]
            left, right = (values_of(end).double() if end is not None else u[:0] for end in ends)
            lost += _distance(u.T * s, v, left.T, right if rank else v[:0])
            whole += float(s.square().sum())
        data = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in held)
        nbytes += len(header(held, {})) + data + CONFIG_BYTES
        errors.append(math.sqrt(lost / whole))
    return nbytes, errors


def _distance(up: Tensor, down: Tensor, left: Tensor, right: Tensor) -> float:
    """``|up down - left right|_F^2`` from small Grams."""
    both_up, both_down = torch.cat([up, -left], 1), torch.cat([down, right])
    return max(float(((both_up.T @ both_up) * (both_down @ both_down.T)).sum()), 0.0)


def _by_energy(of: dict[str, tuple[Tensor, Tensor, Tensor]], share: float, name: str) -> dict[str, int]:
    """Drop columns, the least energy per byte first, until ``share`` of the norm is gone."""
    columns = [
        (float(x) ** 2 / sum(row_bytes(side.shape[1], WIDTHS[name]) for side in (u, v)), float(x) ** 2, path)
        for path, (u, s, v) in of.items()
        for x in s
    ]
    budget = share**2 * sum(energy for _, energy, _ in columns)
    kept = {path: len(s) for path, (_, s, _) in of.items()}
    for _, energy, path in sorted(columns):
        budget -= energy
        if budget < 0:
            break
        kept[path] -= 1
    return kept


def _random_basis(adapters: Sequence[Adapter], rank: int) -> tuple[int, list[float]]:
    draw = torch.Generator().manual_seed(0)
    slots = {}
    for path, slot in adapters[0].slots.items():
        u, v = (torch.linalg.qr(torch.randn(m, min(rank, m), generator=draw))[0] for m in slot.shape)
        slots[path] = SlotSpace(u, v, slot.kind, slot.kernel)
    made = express(slots, adapters, max_error=None, dtype=torch.float16).segment
    nbytes = sum(2 * (space.u.numel() + space.v.numel()) for space in slots.values())
    nbytes += sum(rows.nbytes for columns in made.columns.values() for rows in columns.tensors().values())
    return nbytes, [task.error for task in made.tasks if task is not None]


def _mean(spectra: Sequence[dict[str, tuple[Tensor, Tensor, Tensor]]]) -> tuple[int, list[float]]:
    dense = [{path: (u.T * s) @ v for path, (u, s, v) in of.items()} for of in spectra]
    mean = {path: sum(one[path] for one in dense) / len(dense) for path in dense[0]}
    errors = []
    for one in dense:
        lost = sum(float((one[path] - mean[path]).square().sum()) for path in one)
        errors.append(math.sqrt(lost / sum(float(x.square().sum()) for x in one.values())))
    return sum(2 * x.numel() for x in mean.values()), errors


def _peers(adapters: Sequence[Adapter], python: str) -> Iterator[tuple[str, int, list[float]]]:
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in", Path(folder) / "out"
        write_all(list(adapters), source)
        for name in ("vlora", "lorashare"):
            for rank in (2, 4, 8, 16):
                contender = replace(CONTENDERS[name], rank=rank)
                try:
                    disk = run_once(contender, python, source, len(adapters), 2, out)["disk"]
                    found = measure(contender, python, source, len(adapters), 2, out)
                except (Failure, OSError, ValueError, IndexError) as error:
                    print(f"fidelity: {name} at {rank}: {error}", file=sys.stderr)
                    continue
                yield f"{name} {rank}", disk, [found["worst"], found["mean"]]


def _error(original: Adapter, other: Adapter) -> float:
    lost = whole = 0.0
    for path, slot in original.slots.items():
        up, down = slot.scale * slot.up.double(), slot.down.double()
        mine = other.slots[path]
        lost += _distance(up, down, mine.scale * mine.up.double(), mine.down.double())
        whole += float(((up.T @ up) * (down @ down.T)).sum())
    return math.sqrt(lost / whole)


def _summary(errors: Sequence[float]) -> Point:
    return {"worst": max(errors), "mean": sum(errors) / len(errors)}


def show(records: Sequence[Point]) -> None:
    """Print every point, and how often ours has no more error in no more bytes."""
    for case in dict.fromkeys(record["case"] for record in records):
        rows = [record for record in records if record["case"] == case]
        print(f"\n{case}, {rows[0]['adapters']} adapters")
        print(table(rows, ("way", "nbytes", "worst", "mean", "our_nbytes", "our_worst", "our_mean", "our_widths")))
    print()
    better = [record for record in records if holds(record)]
    print(f"no more bytes and no more worst error: {len(better)} of {len(records)} points")
    for record in records:
        if not holds(record):
            print(f"  not: {record['case']}: {record['way']}")


def holds(record: Point) -> bool:
    """Say whether ours has no more worst error in no more bytes."""
    if record["our_worst"] is None:
        return False
    return record["our_nbytes"] <= record["nbytes"] and record["our_worst"] <= record["worst"] * (1 + ROUNDING)


def draw(records: Sequence[Point], path: str) -> None:
    """Draw worst error over bytes, a panel a case."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(record["case"] for record in records))
    figure, axes = plt.subplots(-(-len(names) // 3), 3, figsize=(15, 4 * -(-len(names) // 3)), squeeze=False)
    for axis, case in zip(axes.flat, names, strict=False):
        rows = [record for record in records if record["case"] == case]
        for way in dict.fromkeys(row["way"].split(",")[0].rstrip("0123456789 ") for row in rows):
            points = sorted((r["nbytes"], r["worst"]) for r in rows if r["way"].startswith(way))
            axis.plot(*zip(*points, strict=True), ".-", alpha=0.6, label=way)
        points = sorted((r["our_nbytes"], r["our_worst"]) for r in rows if r["our_worst"] is not None)
        if points:
            axis.plot(*zip(*points, strict=True), "k.-", label="loraspan")
        axis.set(title=case, xscale="log", yscale="log", xlabel="bytes", ylabel="worst error on dW")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

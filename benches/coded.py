"""Measure coded columns: bits an entry at an error beside 8 and 4 bits, bases, what the coder takes, and its speed.

    python benches/coded.py [--family own-seed] [--rounds 9] [--json FILE]

``bits an entry`` are those of a whole collection of sample adapters, heads apart, over the entries of their factors.
``bases`` are plans for adapters of one seed, the sample ones and generated ones of 2 slots of 1024 x 768: bytes of
columns and bases where each is alone, on float16 bases and on coded ones, and those of the folder. ``coder`` writes the
numbers of the collection coded within 0.2, beside their entropy if each were coded by how often it occurs in 32 rows of
like size, which knows nothing of the trellis. ``speed`` is that of one thread, of 4 million normal entries in rows of
4096: rounded each by itself, with steps of a half and a 200th of their standard deviation, and by a trellis to what
loses as much as a step of a half.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import loraspan
from _bench import interleave, machine, table
from _fidelity_cases import cases
from loraspan.cli.demo_compare import Family
from loraspan.cli.demo_data import FAMILIES
from loraspan.collection.beside import Beside
from loraspan.collection.coded import CODED_FIELDS
from loraspan.collection.coding import LARGEST, Codes, Known, decode, encode, trellis
from loraspan.ops.packed import Packed

ERRORS = (0.4, 0.2, 0.1, 0.05, 0.01, 1e-3, 3e-4)
WIDTHS = ("coded", "f16", "int8", "int4")
CODED_AT = 0.2
SHARED_ERRORS = (0.3, 0.1, 0.03)
FLOAT_BASES = "float16 bases, float16 loadings, coded private ends"
TOGETHER = 32
ROWS, LENGTH, STEPS = 1024, 4096, (0.5, 0.005)
# numbers of a trellis to a step that loses as much
UNITS = 1.716
Record = dict[str, object]
Table = tuple[Codes, Known]


def main() -> None:
    """Run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="own-seed", choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    family = Family(options.family)
    tables: list[Table] = []
    parts = {
        "bits": list(bits(family, tables)),
        "bases": list(bases()),
        "coder": list(coder(tables)),
        "speed": list(speed(options.rounds)),
    }
    for name, records in parts.items():
        print(f"\n{name}\n{table(records, list(records[-1]))}")
    if options.json:
        about = {"bench": "coded", "family": options.family, "machine": machine()}
        lines = [json.dumps({**about, "part": name, **record}) for name, found in parts.items() for record in found]
        with options.json.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def bits(family: Family, tables: list[Table]) -> Iterator[Record]:
    """Compress the family to errors in each width; ``tables`` takes what is coded within 0.2."""
    adapters = list(family.adapters.values())
    entries = sum(s.up.numel() + s.down.numel() for adapter in adapters for s in adapter.slots.values())
    heads = sum(extra.nbytes for adapter in adapters for extra in adapter.extras.values())
    for error in ERRORS:
        for width in WIDTHS:
            try:
                space = loraspan.compress(adapters, max_error=error, dtype=width)
            except loraspan.errors.ArgumentError:
                # less than such a width can round to
                continue
            nbytes = space.nbytes - heads
            yield {"max_error": error, "width": width, "kB": nbytes / 1e3, "bits an entry": 8 * nbytes / entries}
            if (width, error) == ("coded", CODED_AT):
                columns = [c for segment in space.collection.segments for c in segment.columns.values()]
                for column in columns:
                    known = Beside.of(column).known()
                    ends = {field: getattr(column, field) for field in CODED_FIELDS}
                    tables += [(e.numbers.numpy(), known[field]) for field, e in ends.items() if isinstance(e, Packed)]


def bases() -> Iterator[Record]:
    """Compress adapters of one seed to errors."""
    every = cases(24)
    for name in ("trained, shared-seed", "one seed"):
        adapters = list(every[name]().adapters)
        for error in SHARED_ERRORS:
            space = loraspan.compress(adapters, max_error=error)
            planned = {(line.widths, line.forms): line.nbytes for line in space.report().plans}
            yield {
                "adapters": name,
                "max_error": error,
                "alone": _kb(planned["coded", "private"]),
                "float16 bases": _kb(planned[FLOAT_BASES, "input side shared"]),
                "coded": _kb(planned["coded", "mixed"]),
                "stored": _kb(space.nbytes),
            }


def _kb(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 1e3


def coder(tables: Sequence[Table]) -> Iterator[Record]:
    """Give the bytes of the numbers as they are coded, and of their entropy."""
    rows = [row for codes, _ in tables for row in codes]
    size = [float(np.abs(row.astype(np.int16)).mean()) for row in rows]
    ordered = [rows[i] for i in np.argsort(size, kind="stable")]
    alike = [np.concatenate(ordered[i : i + TOGETHER]) for i in range(0, len(ordered), TOGETHER)]
    found = {
        "entropy": sum(entropy(each) for each in alike) / 8,
        "coded": float(len(encode(*zip(*tables, strict=True)))),
    }
    for way, nbytes in found.items():
        yield {"numbers": way, "kB": nbytes / 1e3, "over entropy": nbytes / found["entropy"] - 1}


def entropy(codes: Codes) -> float:
    """Give the bits of numbers each coded by how often it occurs among them."""
    counts: NDArray[np.int64] = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def speed(rounds: int) -> Iterator[Record]:
    """Time encoding and decoding of a large table, and rounding by a trellis."""
    normal = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(20261123))
    found: dict[str, Codes] = {}
    for step in STEPS:
        numbers = (normal / step).round()
        found[f"steps of {step}"] = numbers.to(torch.int8 if numbers.abs().max() <= LARGEST[8] else torch.int16).numpy()
    fine = normal * (UNITS / STEPS[0])
    found["trellis"] = trellis(fine).to(torch.int8).numpy()
    for what, took in interleave({"trellis": lambda _: trellis(fine)}, rounds).items():
        yield {"what": "round", "numbers": what, "million entries/s": normal.numel() / took.median / 1e6}
    for name, codes in found.items():
        stream = encode([codes])
        assert bool((decode(stream, [codes.shape])[0] == codes).all())
        over = len(stream) * 8 / entropy(codes) - 1
        for what, took in interleave(both_ways(codes, stream), rounds).items():
            speed = {"million entries/s": codes.size / took.median / 1e6, "bits an entry": 8 * len(stream) / codes.size}
            yield {"what": what, "numbers": name, **speed, "over entropy": over}


def both_ways(codes: Codes, stream: bytes) -> dict[str, Callable[[int], object]]:
    """Give what is timed."""
    return {"encode": lambda _: encode([codes]), "decode": lambda _: decode(stream, [codes.shape])}


if __name__ == "__main__":
    main()

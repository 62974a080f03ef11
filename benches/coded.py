"""Measure coded ends: bits an entry at an error beside 8 and 4 bits, ways to write the numbers, and their speed.

    python benches/coded.py [--family own-seed] [--rounds 9] [--json FILE]

``bits an entry`` are those of a whole collection of sample adapters, heads apart, over the entries of their factors.
``ways`` write the same numbers, those of the collection coded within 0.2: ``entropy`` is of 32 rows of like size at a
time, which no code of single numbers can beat; the order of rows is counted in ours alone. Speeds are those of one
thread, of 4 million normal entries in rows of 4096, with steps of a half and a 200th of their standard deviation.
"""

from __future__ import annotations

import argparse
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import loraspan
from _bench import interleave, machine, table
from loraspan.cli.demo_compare import Family
from loraspan.cli.demo_data import FAMILIES
from loraspan.collection.coded import CODED_FIELDS
from loraspan.collection.coding import LARGEST, Codes, decode, encode
from loraspan.ops.packed import Packed

ERRORS = (0.4, 0.2, 0.1, 0.05, 0.01, 1e-3, 3e-4)
WIDTHS = ("coded", "f16", "int8", "int4")
CODED_AT = 0.2
TOGETHER = 32
ROWS, LENGTH, STEPS = 1024, 4096, (0.5, 0.005)
Record = dict[str, object]


def main() -> None:
    """Run, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="own-seed", choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    family = Family(options.family)
    tables: list[Codes] = []
    parts = {
        "bits": list(bits(family, tables)),
        "ways": list(ways(tables)),
        "speed": list(speed(options.rounds)),
    }
    for name, records in parts.items():
        print(f"\n{name}\n{table(records, list(records[0]))}")
    if options.json:
        about = {"bench": "coded", "family": options.family, "machine": machine()}
        lines = [json.dumps({**about, "part": name, **record}) for name, found in parts.items() for record in found]
        with options.json.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))


def bits(family: Family, tables: list[Codes]) -> Iterator[Record]:
    """Compress the family to errors in each width; ``tables`` takes the numbers of what is coded within 0.2."""
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
                held = [rows for c in columns for rows in (getattr(c, field) for field in CODED_FIELDS)]
                tables += [rows.numbers.numpy() for rows in held if isinstance(rows, Packed)]


def ways(tables: Sequence[Codes]) -> Iterator[Record]:
    """Give the bytes of the same numbers written in several ways."""
    rows = [row for table_ in tables for row in table_]
    size = [float(np.abs(row.astype(np.int16)).mean()) for row in rows]
    ordered = [rows[i] for i in np.argsort(size, kind="stable")]
    alike = [np.concatenate(ordered[i : i + TOGETHER]) for i in range(0, len(ordered), TOGETHER)]
    one = {"": np.concatenate(rows).tobytes(), ", rows by size": np.concatenate(ordered).tobytes()}
    found = {"entropy": sum(entropy(each) for each in alike) / 8, "ours": float(len(encode(tables)))}
    found |= {f"a number a byte, Huffman{how}": float(len(huffman(data))) for how, data in one.items()}
    found["a number a byte, LZMA, rows by size"] = float(len(lzma.compress(one[", rows by size"], preset=9)))
    for way, nbytes in found.items():
        yield {"way": way, "kB": nbytes / 1e3, "over entropy": nbytes / found["entropy"] - 1}


def entropy(codes: Codes) -> float:
    """Give the bits of numbers each coded by how often it occurs among them."""
    counts: NDArray[np.int64] = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def huffman(data: bytes) -> bytes:
    """Give a deflate stream without matches."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 7, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(data) + stream.flush()


def speed(rounds: int) -> Iterator[Record]:
    """Time encoding and decoding of a large table."""
    normal = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(20261123))
    for step in STEPS:
        numbers = (normal / step).round()
        codes: Codes = numbers.to(torch.int8 if numbers.abs().max() <= LARGEST[8] else torch.int16).numpy()
        stream = encode([codes])
        assert bool((decode(stream, [codes.shape])[0] == codes).all())
        over = len(stream) * 8 / entropy(codes) - 1
        for what, took in interleave(both_ways(codes, stream), rounds).items():
            speed = {"million entries/s": codes.size / took.median / 1e6, "bits an entry": 8 * len(stream) / codes.size}
            yield {"what": what, "step": step, **speed, "over entropy": over}


def both_ways(codes: Codes, stream: bytes) -> dict[str, Callable[[int], object]]:
    """Give what is timed."""
    return {"encode": lambda _: encode([codes]), "decode": lambda _: decode(stream, [codes.shape])}


if __name__ == "__main__":
    main()

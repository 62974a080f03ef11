"""Measure packed rows: what 8 and 4 bits cost in error, and pack, unpack, reconstruct and shared_lora in time.

    python benches/packed.py [--only error,pack,reconstruct,shared_lora] [--rounds 9] [--size 4096] [--json FILE]

``error`` is the relative Frobenius error of normal entries in rows of length 4096, 16 and 8, and of rows of which seven
entries of ten are 0, for several ways to spend the same bytes on 4 bits, all with float16 scales of blocks of 64.
``GB/s`` counts the float32 entries, read or written once. Candidates take turns, each turn with another copy of the
operands, together twice the last cache. Answers are checked before they are timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import roofline
from _bench import copies_past_cache, interleave, machine, table, write_lines
from loraspan.ops import Cores, Packed, Piece, pack, reconstruct_many, shared_lora_, unpack
from loraspan.ops.packed_reference import LEVELS

BLOCK = 64
Record = dict[str, object]
UNIFORM = torch.arange(-7, 8) / 7
# Dettmers et al., QLoRA, 2023, appendix E
BELOW = (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004)
ABOVE = (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)
NORMAL_FLOAT = torch.tensor([*BELOW, 0.0, *ABOVE])
OURS = torch.tensor(LEVELS) / 127
# Max, Quantizing for Minimum Distortion, 1960, table I: the best 16 levels for normal entries of known size
MAX = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]) / 2.733


class Grid(NamedTuple):
    """Levels up to 1, and the scales that are tried, of the block's largest entry."""

    levels: Tensor
    ratios: tuple[float, ...]


SEARCHED = tuple(sign * ratio for ratio in (1.0, 0.84, 0.92, 1.08) for sign in (1, -1))
GRIDS = {
    "uniform": Grid(UNIFORM, (1.0,)),
    "uniform, searched": Grid(UNIFORM, SEARCHED),
    "NF4": Grid(NORMAL_FLOAT, (1.0,)),
    "NF4, searched": Grid(NORMAL_FLOAT, SEARCHED),
    "Max, searched": Grid(torch.cat([-MAX.flip(0), MAX]), SEARCHED),
    "our levels": Grid(OURS, (1.0,)),
}


def on_grid(x: Tensor, grid: Grid) -> Tensor:
    """Give rows quantized in blocks: per block the best of the scales that are tried."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % BLOCK)).reshape(-1, BLOCK).double()
    best, least = blocks, torch.full((len(blocks), 1), torch.inf, dtype=torch.float64)
    middles = (grid.levels[1:] + grid.levels[:-1]).double() / 2
    for ratio in grid.ratios:
        scale = (blocks.abs().amax(1, keepdim=True) * ratio).half().double()
        found = grid.levels.double()[torch.bucketize(blocks / scale, middles)] * scale
        error = (found - blocks).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best.reshape(len(x), -1)[:, : x.shape[1]]


def errors() -> Iterator[Record]:
    """Give the error of each way, and of 8 bits."""
    for length, zeros in ((4096, 0.0), (16, 0.0), (8, 0.0), (4096, 0.7)):
        rng = torch.Generator().manual_seed(20261122)
        x = torch.randn(1_000_000 // length, length, generator=rng)
        x = torch.where(torch.rand(x.shape, generator=rng) < zeros, 0.0, x)
        ways = {name: on_grid(x, grid) for name, grid in GRIDS.items()}
        ways |= {f"loraspan, {bits} bits": unpack(pack(x, bits)).double() for bits in (4, 8)}
        found = {name: ((got - x.double()).norm() / x.double().norm()).item() for name, got in ways.items()}
        yield {"bench": "packed error", "length": length, "zeros": zeros, **found}


def torch_pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Do it as one writes it in torch: the largest entry of each block to the end of a uniform grid."""
    blocks = x.view(-1, BLOCK)
    most = 127 if bits == 8 else 7
    scale = (blocks.abs().amax(1, keepdim=True) / most).half()
    levels = (blocks / scale).round_().clamp_(-most, most).to(torch.int8)
    if bits == 4:
        levels = (levels[:, 0::2] & 15) | (levels[:, 1::2] << 4)
    return levels, scale


def torch_unpack(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Undo :func:`torch_pack`."""
    if bits == 4:
        codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=2).flatten(1)
    return codes.float() * scale


def packing(size: int, rounds: int, read: float) -> Iterator[Record]:
    """Time ``pack`` and ``unpack`` of 512 rows."""
    copies = copies_past_cache(512 * size * 4)
    xs = [torch.randn(512, size) for _ in range(copies)]
    for bits in (8, 4):
        ours, theirs = [pack(x, bits) for x in xs], [torch_pack(x, bits) for x in xs]
        for got in (unpack(ours[0]), torch_unpack(*theirs[0], bits).view(512, size)):
            assert (got - xs[0]).norm() <= {8: 0.01, 4: 0.12}[bits] * xs[0].norm()
        for what, candidates in {
            "pack": {
                "loraspan": lambda turn, bits=bits: pack(xs[turn % copies], bits),
                "torch": lambda turn, bits=bits: torch_pack(xs[turn % copies], bits),
            },
            "unpack": {
                "loraspan": lambda turn, ours=ours: unpack(ours[turn % copies]),
                "torch": lambda turn, bits=bits, theirs=theirs: torch_unpack(*theirs[turn % copies], bits),
            },
        }.items():
            timings = interleave(candidates, rounds)
            rate = {name: 4e-9 * 512 * size / timing.median for name, timing in timings.items()}
            yield {
                "bench": "packed",
                "case": what,
                "bits": bits,
                "GB/s": rate["loraspan"],
                "of memory": rate["loraspan"] / read,
                "torch GB/s": rate["torch"],
                "x torch": rate["loraspan"] / rate["torch"],
            }


def beside(form: str, make: Callable[[int], Callable[[int], Tensor]], rounds: int) -> Record:
    """Time ``make(bits)`` for float32 (0), 8 and 4 bits in turns, after a look at what each gives."""
    found = {bits: make(bits) for bits in (0, 8, 4)}
    exact = found[0](0).clone()
    for bits, most in ((8, 0.02), (4, 0.3)):
        off = (found[bits](0) - exact).norm() / exact.norm()
        assert off <= most, f"{form} in {bits} bits: off by {off:.3g}"
    timings = interleave({str(bits): run for bits, run in found.items()}, rounds)
    record: Record = {"bench": "packed", "case": form, "us f32": timings["0"].median * 1e6}
    for bits in (8, 4):
        record |= {f"us {bits} bits": timings[str(bits)].median * 1e6}
        record |= {f"x f32, {bits} bits": timings["0"].median / timings[str(bits)].median}
    return record


def held(rows: Tensor, bits: int) -> Tensor | Packed:
    """Give vectors as rows, packed or not."""
    return pack(rows, bits) if bits else rows


def rebuilding(size: int, rounds: int) -> Iterator[Record]:
    """Time one side of a task of rank 16 from 64 basis vectors, and 16 private columns."""
    copies = copies_past_cache(64 * size)
    vectors = [torch.randn(64, size) / size**0.5 for _ in range(copies)]
    loadings, out = torch.randn(16, 64), torch.empty(size, 16)

    def piece(bits: int, private: bool) -> Callable[[int], Tensor]:
        bases = [held(v[:16] if private else v, bits) for v in vectors]
        plain = [b if isinstance(b, Packed) else b.T for b in bases]
        weights = None if private else held(loadings, bits)
        columns = weights.T if isinstance(weights, Tensor) else weights

        def run(turn: int) -> Tensor:
            reconstruct_many([Piece(plain[turn % copies], columns, out)])
            return out

        return run

    yield beside("reconstruct, shared", lambda bits: piece(bits, False), rounds)
    yield beside("reconstruct, private", lambda bits: piece(bits, True), rounds)


def serving(size: int, rounds: int) -> Iterator[Record]:
    """Time rows of as many tasks of 16 columns, all shared or all private, on bases of 64 vectors."""
    rng = torch.Generator().manual_seed(20261122)
    v, u = (torch.randn(64, size, generator=rng) / size**0.5 for _ in range(2))
    left, right = torch.randn(64 * 16, 64, generator=rng), torch.randn(64 * 16, 64, generator=rng)
    own = torch.randn(2, 64 * 16, size, generator=rng) / size**0.5
    for rows in (1, 8, 64):
        for private in (False, True):
            copies = copies_past_cache(8 * rows * size)
            xs = [torch.randn(rows, size, generator=rng) for _ in range(copies)]
            y, tasks = torch.zeros(rows, size), torch.arange(rows) * (64 // rows)

            def call(
                bits: int, private: bool = private, xs: list[Tensor] = xs, y: Tensor = y, tasks: Tensor = tasks
            ) -> Callable[[int], Tensor]:
                none = torch.empty(0, size)
                ends = (none[:, :64], own[0], none[:, :64], own[1]) if private else (left, none, right, none)
                counts = [(0, 0, 0, 16) if private else (16, 0, 0, 0)] * 64
                cores = Cores.of(counts, torch.ones(64 * 16), *(held(e.contiguous(), bits) for e in ends))
                bases = [b if isinstance(b, Packed) else b.T.contiguous() for b in (held(v, bits), held(u, bits))]

                def run(turn: int) -> Tensor:
                    return shared_lora_(y.zero_(), xs[turn % len(xs)], bases[0], bases[1], cores, tasks)

                return run

            yield beside(f"shared_lora, {rows} rows, {'private' if private else 'shared'}", call, rounds)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="error,pack,reconstruct,shared_lora", help="parts, by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = options.only.split(",")
    limits = roofline.measure(options.threads) if "pack" in parts else None
    makers: dict[str, Callable[[], Iterator[Record]]] = {
        "error": errors,
        "pack": lambda: packing(options.size, options.rounds, limits.read if limits else torch.nan),
        "reconstruct": lambda: rebuilding(options.size, options.rounds),
        "shared_lora": lambda: serving(options.size, options.rounds),
    }
    here, records = machine(), []
    with torch.no_grad():
        for part in parts:
            mine = list(makers[part]())
            records += [record | here for record in mine]
            print(table(mine, [key for key in mine[0] if key != "bench"]), flush=True)
    for record in records:
        print(json.dumps(record))
    write_lines(options.json, records)


if __name__ == "__main__":
    main()

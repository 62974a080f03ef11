"""Time IncrementalSVD beside the incremental PCAs of scikit-learn and torch, block by block of one stream.

    python benches/incremental_svd.py [--rows 1024] [--columns 65536] [--rank 32] [--block 64] [--json FILE]

All run in one process and take turns at every block, so that they meet the same disturbances. The default takes some
minutes: the cost per row does not depend on what came before (first and last quarter are printed), so 10000 rows take
as much longer as they are more. ``outside`` is the energy of the centred rows outside the components, over what the
best ones leave, less 1; components are taken as each gives them. ``share`` is of the multiply-add ceilings of this
machine, measured in the same run: what the compressions would take at them, over what the updates took. ``read`` is
one reading of the basis, which the others work out in every update. ``torch-incremental-pca`` 0.1.0 is installed into
``--cache`` on first use; ``gram`` is its option for wide blocks, a float32 Gram.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.decomposition import IncrementalPCA as SklearnPCA

from _bench import machine, table, write_lines
from loraspan.linalg import IncrementalSVD
from loraspan.linalg.incremental_rows import capacity
from loraspan.ops import gram
from roofline import Ceilings, measure

PEER = "torch-incremental-pca==0.1.0"
GOAL = 4.0
# OpenBLAS's threads spin for some 30 ms after their work, and would take a core from whoever comes next.
REST = 0.06
# Blocks that fill our memory for the first time, which costs less than all later ones.
FILLING = 4


class Contender(NamedTuple):
    """``update`` takes a block ``[n, D]``; ``components`` gives ``[k, D]`` at the end; ``buffer`` is ours alone."""

    name: str
    update: Callable[[torch.Tensor], object]
    components: Callable[[], torch.Tensor]
    buffer: int | None = None


class Stream:
    """Rows with a mean: 200 directions of slowly falling strength, and noise. A block is made anew from its number."""

    def __init__(self, columns: int, block: int) -> None:
        self.columns, self.block = columns, block
        draw = torch.Generator().manual_seed(0)
        self.strength = 3 * torch.arange(1, 201) ** -0.7
        self.shared = torch.nn.functional.normalize(torch.randn(200, columns, generator=draw))
        self.mean = torch.randn(columns, generator=draw) * 0.05

    def rows(self, number: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1 + number)
        rows = (torch.randn(self.block, 200, generator=draw) * self.strength) @ self.shared
        return rows + torch.randn(self.block, self.columns, generator=draw).mul_(1 / self.columns**0.5) + self.mean


def contenders(rank: int, peers: Path) -> Iterator[Contender]:
    for name, buffer in (("loraspan", rank), ("loraspan, buffer 8", 8)):
        ours = IncrementalSVD(rank, buffer=buffer, center=True)
        yield Contender(name, ours.update, lambda ours=ours: ours.basis.T, buffer)  # type: ignore[misc]
    sklearn = SklearnPCA(n_components=rank)
    yield Contender(
        "scikit-learn",
        lambda x: sklearn.partial_fit(x.numpy()),
        lambda: torch.from_numpy(sklearn.components_),
    )
    peer = torch_incremental_pca(peers)
    for name, options in (("torch-incremental-pca", {}), ("torch-incremental-pca, gram", {"gram": True})):
        theirs = peer(n_components=rank, **options)
        yield Contender(name, theirs.partial_fit, lambda theirs=theirs: theirs.components_)  # type: ignore[misc]


def torch_incremental_pca(folder: Path) -> Any:
    """Import the peer from a folder of its own; all that it needs is torch."""
    if not (folder / "torch_incremental_pca").exists():
        print(f"incremental_svd: installing {PEER} into {folder}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
        subprocess.run(pip, check=True)
    sys.path.append(str(folder))
    from torch_incremental_pca import IncrementalPCA

    return IncrementalPCA


def race(all_: list[Contender], stream: Stream, blocks: int) -> dict[str, list[float]]:
    """Give the seconds of every update."""
    seconds: dict[str, list[float]] = {one.name: [] for one in all_}
    for number in range(blocks):
        rows = stream.rows(number)
        for one in all_:
            time.sleep(REST)
            start = time.perf_counter()
            one.update(rows)
            seconds[one.name].append(time.perf_counter() - start)
    return seconds


class Judge:
    """Gives the energy of centred rows outside components over the least possible, less 1; in float64."""

    def __init__(self, rows: torch.Tensor) -> None:
        # less the mean in float64, rounded once: nobody sees it finer
        self.rows = (rows - rows.mean(0, dtype=torch.float64)).float()
        self.inner = gram(self.rows, precision="f64")
        self.values = torch.linalg.eigvalsh(self.inner)

    def __call__(self, components: torch.Tensor) -> float:
        k = components.shape[0]
        products = gram([components.double(), self.rows], precision="f64")
        # a projector on what they span, were they not orthonormal
        inside = products[k:, :k] @ torch.linalg.solve(products[:k, :k], products[:k, k:])
        return float((self.inner.trace() - inside.trace()) / self.values[:-k].sum() - 1)


def by_block_size(rank: int) -> Iterator[dict[str, object]]:
    """Judge 512 rows of 8000 that come in blocks of several sizes; scikit-learn's first block has 64 rows always."""
    rows = Stream(8000, 512).rows(0)
    judge = Judge(rows)
    for block in (1, 8, 64, 256):
        ours, theirs = IncrementalSVD(rank, center=True), SklearnPCA(n_components=rank)
        for piece in rows.split(block):
            ours.update(piece)
        for piece in (rows[: max(64, block)], *rows[max(64, block) :].split(block)):
            theirs.partial_fit(piece.numpy())
        outside = {"ours": judge(ours.basis.T), "scikit-learn's": judge(torch.from_numpy(theirs.components_))}
        yield {"case": f"512 x 8000 in blocks of {block}, outside", **outside}


def share(one: Contender, columns: int, rank: int, block: int, limits: Ceilings, seconds: float) -> float | None:
    """Say what part of the time of a block its compressions would take at the ceilings."""
    if one.buffer is None:
        return None
    kept = rank + one.buffer
    rows = capacity(kept)
    ideal = rows * (rows + 1) * columns / limits.f64 + 2 * (kept + 1) * rows * columns / limits.f32
    return ideal / 1e9 * block / (rows - 1 - kept) / seconds


def single_rows(columns: int, rank: int) -> dict[str, object]:
    """Time updates of one row each: nearly all of it is Python."""
    rows = torch.randn(4000, columns).split(1)
    svd = IncrementalSVD(rank, center=True)
    svd.update(torch.cat(rows))
    seconds = []
    for row in rows:
        start = time.perf_counter()
        svd.update(row)
        seconds.append(time.perf_counter() - start)
    middle, mean = statistics.median(seconds) * 1e6, statistics.mean(seconds) * 1e6
    return {"case": f"one row, D = {columns}, rank {rank}", "us, median": middle, "us, mean": mean}


def report(
    all_: list[Contender], seconds: dict[str, list[float]], outside: dict[str, float], options: argparse.Namespace
) -> list[dict[str, object]]:
    limits = measure(options.threads)
    # every second or third block of ours compresses: quarters are means over an even number of blocks
    quarter = max(2, (len(seconds["loraspan"]) - FILLING) // 8 * 2)
    mean = {name: statistics.mean(times[FILLING:]) for name, times in seconds.items()}
    records = []
    for one in all_:
        times = seconds[one.name]
        start = time.perf_counter()
        if one.buffer is not None:
            one.update(torch.zeros(1, options.columns))
            start = time.perf_counter()
            one.components()
        record: dict[str, object] = {
            "bench": "incremental_svd",
            "contender": one.name,
            "rows": len(times) * options.block,
            "ms a block": mean[one.name] * 1e3,
            "first quarter": statistics.mean(times[FILLING : FILLING + quarter]) * 1e3,
            "last quarter": statistics.mean(times[-quarter:]) * 1e3,
            "read ms": (time.perf_counter() - start) * 1e3 if one.buffer is not None else None,
            "s for 10000": mean[one.name] * 10_000 / options.block,
            "x ours": mean[one.name] / mean["loraspan"],
            "outside": outside.get(one.name),
            "share": share(one, options.columns, options.rank, options.block, limits, mean[one.name]),
        }
        records.append(record)
    return records


def goals(records: list[dict[str, Any]]) -> Iterator[str]:
    ours = records[0]
    for record in records:
        if record["contender"] in ("scikit-learn", "torch-incremental-pca"):
            fast = record["x ours"] >= GOAL
            met = "met" if fast else "missed"
            yield f"{GOAL:g} times faster than {record['contender']}: {met}, {record['x ours']:.2f}"
            if record["outside"] is not None:
                yield f"at no larger error: {'met' if ours['outside'] <= record['outside'] else 'missed'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=65536)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--check-up-to", type=int, default=2048, metavar="ROWS", help="more rows go without errors")
    cache = Path.home() / ".cache" / "loraspan-bench" / "incremental"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where the peer is installed ({cache})")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stream, blocks = Stream(options.columns, options.block), max(8, options.rows // options.block)
    all_ = list(contenders(options.rank, options.cache))
    seconds = race(all_, stream, blocks)
    outside = {}
    if blocks * options.block <= options.check_up_to:
        judge = Judge(torch.cat([stream.rows(number) for number in range(blocks)]))
        outside = {one.name: judge(one.components()) for one in all_}
    records = report(all_, seconds, outside, options)
    print(
        f"{blocks * options.block} rows of {options.columns} in blocks of {options.block}, rank {options.rank}, centred"
    )
    print(table(records, list(records[0])[1:]))
    print(*goals(records), sep="\n")
    singles = [single_rows(columns, 8) for columns in (64, 4096)]
    print(table(singles, list(singles[0])))
    accuracy = list(by_block_size(options.rank))
    print(table(accuracy, list(accuracy[0])))
    here = machine()
    write_lines(options.json, [record | here for record in [*records, *singles, *accuracy]])


if __name__ == "__main__":
    main()

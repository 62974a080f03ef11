"""Time randomized_svd beside torch.svd_lowrank and scikit-learn, and say which error each leaves.

    python benches/randomized_svd.py [--only many-wide,square] [--rounds 3] [--json FILE]

``many-wide`` is 24 matrices of 100 x 65536 at rank 16, ``many-small`` 500 of 64 x 16384 at rank 8, ``square`` one of
4096 x 4096 at rank 64. Each is made of some directions with decaying weights and of noise. ``torch`` calls
``torch.svd_lowrank(x, rank, niter=2)`` in a loop, ``torch batched`` once for all where that fits; ``sklearn`` is
``randomized_svd`` at its defaults in a loop, timed on four members and taken times their number. Half precision goes
to ours only: nobody else takes it on a CPU.

Candidates take turns. Matrices of a call lie in memory one after the other and are together far past the last cache
(but for the square one, 64 MiB). ``excess`` is the Frobenius error over the smallest possible one, less 1, of the
worst of four members, from a full decomposition in float64. ``share`` counts the operations that the way taken needs,
R (R + 1) d + 2 R d k for a Gram of R rows and 2 R d l (2 + 2 q) for a sketch, as a share of the float32 ceiling;
``read`` is each entry once, as a share of the memory's rate. Both ceilings are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.utils.extmath import randomized_svd as scikit_learns
from torch import Tensor

from _bench import interleave, machine, table, write_lines
from loraspan.linalg import randomized_svd
from roofline import Ceilings, measure

# what is checked and, for scikit-learn, timed
SAMPLE = 4
# the defaults of randomized_svd that decide how much a sketch computes
OVERSAMPLE, POWER_ITERATIONS = 32, 1


class Case(NamedTuple):
    """A batch ``[count, rows, columns]`` to decompose at ``rank``, and by how much to be faster than whom."""

    count: int
    rows: int
    columns: int
    rank: int
    goals: dict[str, float]

    @property
    def operations(self) -> float:
        """Of the way that randomized_svd takes."""
        if self.rows <= 256:
            each = self.rows * (self.rows + 1) + 2 * self.rows * self.rank
        else:
            each = 2 * self.rows * (self.rank + OVERSAMPLE) * (2 + 2 * POWER_ITERATIONS)
        return float(self.count * each * self.columns)


CASES = {
    "many-wide": Case(24, 100, 65536, 16, {"torch": 4.0, "sklearn": 8.0}),
    "many-small": Case(500, 64, 16384, 8, {"torch": 5.0}),
    "square": Case(1, 4096, 4096, 64, {"torch": 1.5}),
}


def make(case: Case) -> Tensor:
    """Twice the rank of directions with weights over a decade, and noise."""
    rng = torch.Generator().manual_seed(20261122)
    x = torch.randn(case.count, case.rows, case.columns, generator=rng).mul_(0.3)
    width = 2 * case.rank
    weights = torch.logspace(0, -1, width) / width**0.5
    for member in x:
        left = torch.randn(case.rows, width, generator=rng) * weights
        member.addmm_(left, torch.randn(width, case.columns, generator=rng))
    return x


def excess(x: Tensor, rank: int, solve: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> float:
    """Give the worst error of some members over the best there is, less 1."""
    worst = 0.0
    for member in x[:SAMPLE]:
        wide = member.double()
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        values = torch.linalg.eigvalsh(gram).flip(0)
        u, s, vh = (t.double() for t in solve(member))
        error = (wide - (u * s) @ vh).norm()
        worst = max(worst, float(error / values[rank:].sum().clamp(min=0).sqrt()) - 1)
    return worst


def by_torch(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.svd_lowrank(x, rank, niter=2)
    return u, s, v.mT


def by_sklearn(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = scikit_learns(x.numpy(), rank, random_state=0)
    return tuple(torch.from_numpy(np.ascontiguousarray(t)) for t in (u, s, vh))  # type: ignore[return-value]


def run_case(name: str, case: Case, limits: Ceilings, rounds: int) -> list[dict[str, object]]:
    """Check a case, time everyone on it in turns, and say what it comes to."""
    x, rank = make(case), case.rank
    errors = {
        "ours": excess(x, rank, lambda m: randomized_svd(m, rank)[:3]),
        "torch": excess(x, rank, lambda m: by_torch(m, rank)),
        "sklearn": excess(x, rank, lambda m: by_sklearn(m, rank)),
    }
    if not errors["ours"] <= 1.02 * (1 + min(errors["torch"], errors["sklearn"])) - 1:
        raise SystemExit(f"{name}: our error is {errors}; not timed")
    few = x[:SAMPLE]
    theirs = {
        "torch": lambda _: [by_torch(m, rank) for m in x],
        "sklearn": lambda _: [by_sklearn(m, rank) for m in few],
    }
    if case.count * case.rows * case.columns < 1 << 28:
        theirs["torch batched"] = lambda _: by_torch(x, rank)
    kinds = {"float32": x, "float16": x.half(), "bfloat16": x.bfloat16()}
    ours = {kind: (lambda _, y=y: randomized_svd(y if case.count > 1 else y[0], rank)) for kind, y in kinds.items()}
    timings = interleave({**ours, **theirs}, rounds)
    records = []
    for kind, y in kinds.items():
        seconds = timings[kind].median
        record: dict[str, object] = {
            "bench": "randomized_svd",
            "case": name,
            "shape": [case.count, case.rows, case.columns],
            "rank": rank,
            "dtype": kind,
            "ms": seconds * 1e3,
            "low": timings[kind].low * 1e3,
            "high": timings[kind].high * 1e3,
            "share": case.operations / seconds / 1e9 / limits.f32,
            "read": y.nbytes / seconds / 1e9 / limits.read,
            "excess": errors["ours"] if kind == "float32" else None,
            "x float32": timings["float32"].median / seconds,
        }
        if kind == "float32":
            for who in theirs:
                scale = case.count / len(few) if who == "sklearn" else 1
                record[f"x {who}"] = timings[who].median * scale / seconds
                if who in errors:
                    record[f"excess of {who}"] = errors[who]
            record["goals"] = "; ".join(
                f"{who} >= {goal:g}: {'met' if record[f'x {who}'] >= goal else 'missed'}"
                for who, goal in case.goals.items()
            )
        records.append(record)
    return records


def main() -> None:
    """Run the cases, print the table and the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    limits = measure(torch.get_num_threads())
    where = machine() | {"ceilings": limits._asdict()}
    records = []
    for name in options.only.split(","):
        for record in run_case(name, CASES[name], limits, options.rounds):
            records.append(record | where)
            print(json.dumps(records[-1]), flush=True)
    columns = ["case", "dtype", "ms", "low", "high", "share", "read", "x torch", "x torch batched", "x sklearn"]
    columns += ["x float32", "excess", "excess of torch", "excess of sklearn", "goals"]
    print(table(records, columns))
    write_lines(options.json, records)


if __name__ == "__main__":
    main()

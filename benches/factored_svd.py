"""Time factored_svd and merged_svd beside the same mathematics in torch, and beside the dense SVD of the product.

    python benches/factored_svd.py [--rounds 9] [--dense 1] [--json FILE]

``qr + svd`` is what a torch user would write: batched ``torch.linalg.qr`` of both sides, ``torch.linalg.svd`` of the
product of the small factors, two batched products; half precision is widened first, which ``qr`` needs. ``dense`` is
``torch.linalg.svd(b @ a, full_matrices=False)``, what PEFT and kohya's scripts do for each matrix; it is timed on
``--dense`` matrices, once, and taken times their number. Candidates take turns, each turn with another copy of the
operands, together twice the last cache. Answers are checked first, on the first and the last member, against float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from _bench import copies_past_cache, interleave, machine, table, write_lines
from loraspan.linalg import factored_svd, merged_svd

# members, outputs, inputs, rank of an adapter
SIZE = (64, 4096, 4096, 16)
SCALE = 0.3
WEIGHTS = (0.7, -0.4, 0.5)
GOAL = 2.0


class Case(NamedTuple):
    """Factors ``b [N, n, R]``, ``a [N, R, d]`` in copies, and who decomposes them."""

    name: str
    dtype: torch.dtype
    copies: list[tuple[list[Tensor], list[Tensor], list[float]]]
    ours: Callable[[list[Tensor], list[Tensor], list[float]], object]


def cases(rounds: int) -> Iterator[Case]:
    """One adapter, and three to be merged, of one shape and many layers."""
    for name, weights, ours in (
        ("one", [SCALE], lambda b, a, w: factored_svd(b[0], a[0], scale=w[0])),
        ("merge 3", [SCALE * w for w in WEIGHTS], merged_svd),
    ):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            yield Case(name, dtype, _copies(dtype, weights, rounds), ours)


def _copies(
    dtype: torch.dtype, weights: list[float], rounds: int
) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    count, n, d, r = SIZE
    rng = torch.Generator().manual_seed(20261122)
    bs = [torch.randn(count, n, r, generator=rng).mul_(torch.logspace(0, -2, r)).to(dtype) for _ in weights]
    as_ = [torch.randn(count, r, d, generator=rng).to(dtype) for _ in weights]
    nbytes = sum(x.nbytes for x in (*bs, *as_))
    wanted = min(rounds + 1, copies_past_cache(nbytes))
    return [([b.clone() for b in bs], [a.clone() for a in as_], weights) for _ in range(wanted)]


def qr_and_svd(bs: list[Tensor], as_: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The same mathematics, batched, in float32."""
    b = torch.cat([w * b.float() for b, w in zip(bs, weights, strict=True)], -1)
    a = torch.cat([a.float() for a in as_], -2)
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT)
    return qb @ u, s, vh @ qa.mT


def dense(
    bs: list[Tensor], as_: list[Tensor], weights: list[float], members: int
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Seconds for the first members one by one, and the last answer."""
    start = time.perf_counter()
    for i in range(members):
        delta = sum(w * (b[i].float() @ a[i].float()) for b, a, w in zip(bs, as_, weights, strict=True))
        answer = torch.linalg.svd(delta, full_matrices=False)
    return time.perf_counter() - start, answer


def error(answer: tuple[Tensor, ...], bs: list[Tensor], as_: list[Tensor], weights: list[float]) -> float:
    """The worst of ``|x - u s vh|_2 / s_1`` and ``|u^T u - 1|_2`` over the first and the last member, in float64."""
    worst = 0.0
    for i in (0, -1):
        u, s, vh = (x[i].double() for x in answer[:3])
        delta = sum(w * (b[i].double() @ a[i].double()) for b, a, w in zip(bs, as_, weights, strict=True))
        rest = delta - (u * s) @ vh
        # the Frobenius norm is no less than the spectral one
        worst = max(
            worst, float(rest.norm() / s[0]), *(float((q.mT @ q - torch.eye(len(s))).norm()) for q in (u, vh.mT))
        )
    return worst


def run_case(case: Case, rounds: int, dense_members: int) -> dict[str, object]:
    """Check a case, time it, and say what it comes to."""
    first = case.copies[0]
    errors = {name: error(run(*first), *first) for name, run in (("ours", case.ours), ("qr + svd", qr_and_svd))}
    rank = sum(a.shape[-2] for a in first[1])
    # what the docstring allows: 8 r units of roundoff, in the spectral norm of a matrix of rank 2 r
    allowed = 8 * rank * 2.0**-24 * (2 * rank) ** 0.5
    if not errors["ours"] <= allowed:
        raise SystemExit(f"{case.name}, {case.dtype}: off by {errors['ours']:.2g}, {allowed:.2g} allowed; not timed")
    turn = lambda run: lambda i: run(*case.copies[i % len(case.copies)])  # noqa: E731
    timings = interleave({"ours": turn(case.ours), "qr + svd": turn(qr_and_svd)}, rounds)
    ours, theirs = timings["ours"], timings["qr + svd"]
    record: dict[str, object] = {
        "bench": "factored_svd",
        "case": f"{case.name}, {SIZE[0]} x {SIZE[1]} x {SIZE[2]}, r {SIZE[3]}",
        "dtype": str(case.dtype).removeprefix("torch."),
        "ms": ours.median * 1e3,
        "low": ours.low * 1e3,
        "high": ours.high * 1e3,
        "error": errors["ours"],
        "qr + svd ms": theirs.median * 1e3,
        "qr + svd error": errors["qr + svd"],
        "x qr + svd": theirs.median / ours.median,
    }
    if dense_members and case.dtype == torch.float32:
        seconds, _ = dense(*first, dense_members)
        record |= {"dense s each": seconds / dense_members, "x dense": seconds / dense_members * SIZE[0] / ours.median}
    reached = theirs.median / ours.median
    record["goal"] = f"x >= {GOAL:g}: {'met' if reached >= GOAL else f'missed, {reached:.2f}'}"
    return record


def main() -> None:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dense", type=int, default=1, help="matrices to decompose densely; some take a minute each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    here = machine()
    records = []
    for case in cases(options.rounds):
        records.append(run_case(case, options.rounds, options.dense) | here)
        print(json.dumps(records[-1]), flush=True)
    columns = ["case", "dtype", "ms", "low", "high", "error", "qr + svd ms", "qr + svd error", "x qr + svd"]
    print(table(records, [*columns, "dense s each", "x dense", "goal"]))
    write_lines(options.json, records)


if __name__ == "__main__":
    main()

"""The cases of ``benches/gpu.py`` for shared_lora: rows of many tasks beside one LoRA, a loop and a grouped product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import _gpu_costs as costs
from _gpu_cases import ROUNDOFF, SEED, U32, Goal, excess_of
from _gpu_device import DTYPES, Candidate
from loraspan.ops import Cores, shared_lora_

# a graph replays one call on each copy; together past the L2 cache, so that no call finds its operands there
FEWEST_COPIES, MOST_COPIES = 4, 64


class Batch(NamedTuple):
    """``rows`` rows of ``distinct`` tasks in a layer ``[size, size]``."""

    rows: int
    distinct: int
    size: int
    rank: int
    lora_rank: int
    dtype: str

    @property
    def shape(self) -> str:
        """In words."""
        return (
            f"{self.rows} rows of {self.distinct} tasks, {self.size} x {self.size}, k {self.rank}, r {self.lora_rank}"
        )

    @property
    def cost(self) -> costs.Cost:
        """Of one call."""
        return costs.shared_lora(*self)


def batches(small: bool) -> list[Batch]:
    """Give the cases."""
    if small:
        return [Batch(6, 6, 48, 8, 4, "f32"), Batch(6, 2, 48, 8, 4, "bf16")]
    layer = (4096, 64, 16)
    counts = ((64, 8), (1024, 64), (8192, 64), (1, 1))
    return [Batch(64, 64, *layer, dtype) for dtype in ("f16", "bf16", "f32")] + [
        Batch(rows, distinct, *layer, "bf16") for rows, distinct in counts
    ]


def goals(batch: Batch) -> tuple[Goal, ...]:
    """Give those of a batch: of 64 rows of 64 tasks, in a graph."""
    of_64 = (Goal("times plain", 1.5, most=True), Goal("x loop", 5.0))
    return of_64 if (batch.rows, batch.distinct) == (64, 64) else ()


class Operands(NamedTuple):
    """What one call reads and writes; ``a [D, r, d]`` and ``b [D, n, r]`` are the factors that make the same dW."""

    y: Tensor
    x: Tensor
    v: Tensor
    u: Tensor
    cores: Cores
    tasks: Tensor
    a: Tensor
    b: Tensor


def operands(batch: Batch, seed: int, device: torch.device) -> Operands:
    """Draw them; orthonormal bases up to rounding, tasks mixed over the rows."""
    rows, distinct, size, rank, lora_rank, dtype = batch
    here, kind = torch.Generator(device).manual_seed(seed), DTYPES[dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=here, device=device)

    v, u = ((normal(size, rank) / size**0.5).to(kind) for _ in range(2))
    left, right = (normal(distinct * lora_rank, rank).to(kind) for _ in range(2))
    weights, none = normal(distinct * lora_rank).abs() / lora_rank, normal(0, size).to(kind)
    cores = Cores.of([(lora_rank, 0, 0, 0)] * distinct, weights, left, none, right, none)
    tasks = torch.arange(rows, device=device) % distinct
    a = (right.float() @ v.float().T).view(distinct, lora_rank, size)
    b = (u.float() @ (left.float() * weights[:, None]).T).view(size, distinct, lora_rank).transpose(0, 1)
    y, x = (normal(rows, size).to(kind) for _ in range(2))
    return Operands(y, x, v, u, cores, tasks, a.to(kind), b.contiguous().to(kind))


def candidates(batch: Batch, backends: Sequence[str], copies: list[Operands]) -> dict[str, Candidate]:
    """Give who takes turns, each on the next copy: ours by backend, then the others."""
    on_left = [(one, one.v.T.contiguous()) for one in copies]
    groups = [(copies[0].tasks == i).nonzero()[:, 0] for i in range(batch.distinct)]

    def ours(turn: int, backend: str) -> object:
        one = copies[turn % len(copies)]
        return shared_lora_(one.y, one.x, one.v, one.u, one.cores, one.tasks, backend=backend)

    def plain(turn: int) -> object:
        one, v_rows = on_left[turn % len(copies)]
        return one.y.add_(linear(linear(one.x, v_rows), one.u))

    def loop(turn: int) -> object:
        one = copies[turn % len(copies)]
        for i, rows in enumerate(groups):
            one.y[rows] += linear(linear(one.x[rows], one.a[i]), one.b[i])
        return one.y

    def grouped(turn: int) -> object:
        one = copies[turn % len(copies)]
        z = torch.bmm(one.a[one.tasks], one.x[:, :, None])
        return one.y.add_(torch.bmm(one.b[one.tasks], z)[:, :, 0])

    found: dict[str, Candidate] = {name: partial(ours, backend=name) for name in backends}
    return found | {"plain": plain, "loop": loop, "grouped": grouped}


def excess(batch: Batch, run: Candidate, one: Operands, *, factors: bool) -> float:
    """Say how far a call on the first copy is off, as a multiple of the bound; ``y`` is as before afterwards.

    The operator's own bound is made of absolute values five products deep, some hundreds of times the answer where
    operands are drawn: it would pass over a column that is missing. This one takes the root mean square of each row
    for them, and six times that for its largest entry. ``factors`` tells those who multiply by ``a`` and ``b``, which
    are rounded to the dtype, as is what lies between.
    """
    before, exact = one.y.clone(), one.y.double()
    v, u, left, right = (t.double() for t in (one.v, one.u, one.cores.left, one.cores.right))
    shape = (batch.distinct, batch.lora_rank, batch.rank)
    weighted = (one.cores.weights.double()[:, None] * left).view(shape)[one.tasks]
    meets = torch.einsum("trk,tk->tr", right.view(shape)[one.tasks], one.x.double() @ v)
    change = torch.einsum("trk,tr->tk", weighted, meets) @ u.T
    size = 6 * change.square().mean(dim=1, keepdim=True).sqrt()
    exact = exact + change
    unit = ROUNDOFF[batch.dtype]
    # float32: a sum over d, one over each basis, one over the columns, weight and share; then a, b, what lies between,
    # what is added and y, each rounded to the dtype
    steps = batch.size + 2 * batch.rank + batch.lora_rank + 8
    error = (steps * U32 + (5 * unit if factors else 0.0)) * size + 2 * U32 * before.double().abs()
    run(0)
    worst = excess_of(one.y, exact, error + unit * (exact.abs() + error) + 2.0**-25)
    one.y.copy_(before)
    return worst


def draw(batch: Batch, cache_bytes: int, device: torch.device) -> list[Operands]:
    """Give as many copies as the L2 cache asks for."""
    wanted = int(2 * cache_bytes / batch.cost.moved) + 1
    count = min(max(wanted, FEWEST_COPIES), MOST_COPIES)
    return [operands(batch, SEED + i, device) for i in range(count)]

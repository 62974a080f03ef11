"""What each operator of ``benches/gpu.py`` has to move and to compute at the least, and the floor that follows.

Each operand counts once, each result once; what a kernel reads again or keeps in a workspace is its own affair. Small
results are float64, 8 bytes. A product runs at the rate of a half-precision dtype where both sides have that dtype and
its float32 sums keep the operator's bound, at that of float32 with IEEE products else, at that of float64 where asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}


class Cost(NamedTuple):
    """Bytes to and from memory, and operations (a multiply-add counts as two) by the rate at which they run."""

    moved: float
    operations: dict[str, float]

    def times(self, count: int) -> Cost:
        """Give the cost of ``count`` of these."""
        return Cost(count * self.moved, {kind: count * number for kind, number in self.operations.items()})

    def floor(self, ceilings: Mapping[str, float]) -> float:
        """Give the seconds below which nothing can do it; ``ceilings`` has ``copy`` in bytes/s, rates by dtype."""
        computing = sum(number / ceilings[kind] for kind, number in self.operations.items())
        return max(self.moved / ceilings["copy"], computing)


def gram(rows: int, columns: int, dtype: str, precision: str = "f32") -> Cost:
    """``X X^T``, one triangle of it computed and both written."""
    kind = "f64" if precision == "f64" else dtype
    return Cost(BYTES[dtype] * rows * columns + 8 * rows**2, {kind: rows * (rows + 1) * columns})


def sketch(rows: int, columns: int, width: int, dtype: str) -> Cost:
    """``X Omega``: signs are exact in any dtype and are not read."""
    return Cost(BYTES[dtype] * rows * columns + 8 * rows * width, {dtype: 2 * rows * columns * width})


def power(rows: int, columns: int, width: int, dtype: str) -> Cost:
    """``X (X^T Q)``: Q and ``X^T Q`` are float32, so both products are."""
    return Cost(BYTES[dtype] * rows * columns + 16 * rows * width, {"f32": 4 * rows * columns * width})


def combine(rows: int, columns: int, rank: int, dtype: str) -> Cost:
    """``V = X^T W`` in float32, with ``X V`` and one triangle of ``V^T V``."""
    moved = BYTES[dtype] * rows * columns + 4 * columns * rank + 8 * (2 * rows * rank + rank**2)
    return Cost(moved, {"f32": 4 * rows * columns * rank + rank * (rank + 1) * columns})


def reconstruct(lengths: Sequence[int], tasks: int, rank: int, lora_rank: int, dtype: str) -> Cost:
    """Every task on bases of these lengths: a basis is read once, loadings and results are each task's own."""
    size, length = BYTES[dtype], sum(lengths)
    loadings = rank * lora_rank * len(lengths) * tasks
    out = length * lora_rank * tasks
    return Cost(size * (length * rank + loadings + out), {dtype: 2 * out * rank})


def shared_lora(rows: int, distinct: int, size: int, rank: int, lora_rank: int, dtype: str) -> Cost:
    """``y += (x V) C U^T`` for ``[size, size]``: x once, y twice, both bases, the loadings of the tasks that occur.

    ``x V`` has both sides in one dtype; what follows starts from float32 sums.
    """
    entries = 3 * rows * size + 2 * size * rank + 2 * distinct * lora_rank * rank
    first, rest = 2 * rows * size * rank, 4 * rows * rank * lora_rank + 2 * rows * size * rank
    operations = {"f32": first + rest} if dtype == "f32" else {dtype: first, "f32": rest}
    return Cost(BYTES[dtype] * entries + 4 * distinct * lora_rank, operations)

"""The cases of ``benches/ops.py``: operands, what is timed, what it is compared with, what it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from _bench import copies_past_cache
from loraspan import _native
from loraspan.ops.combine import combine
from loraspan.ops.gram import gram
from loraspan.ops.reconstruct import Piece, reconstruct_many
from loraspan.ops.sketch import power, signs, sketch

SHAPES = [(1600, 4096), (128, 65536)]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]
RANKS = [32, 64]
OVERSAMPLE = 10
U32, U64 = 2.0**-24, 2.0**-53


@dataclass
class Case:
    """One line of the table. ``ours`` and ``theirs`` get the number of the round."""

    name: str
    dtype: str
    precision: str
    operations: float
    bytes_read: float
    bytes_written: float
    ours: Callable[[int], object]
    theirs: dict[str, Callable[[int], object]]
    excess: Callable[[], float]  # the largest error, as a multiple of the bound
    goals: dict[str, float] = field(default_factory=dict)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copies(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(20261122)
    first = torch.randn(shape, generator=rng).to(dtype)
    return [first, *(first.clone() for _ in range(copies_past_cache(first.nbytes) - 1))]


def _excess(actual: Tensor, exact: Tensor, bound: Tensor) -> float:
    return float(((actual.double() - exact).abs() / bound).max())


def _as_f32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 else x.float()


def gram_cases() -> Iterator[Case]:
    """X X^T in both precisions."""
    for rows, columns in SHAPES:
        for dtype in [*DTYPES, torch.float64]:
            xs = _copies((rows, columns), dtype)
            for precision in ["f64"] if dtype == torch.float64 else ["f32", "f64"]:
                yield _gram_case(xs, precision)


def _gram_case(xs: list[Tensor], precision: str) -> Case:
    (rows, columns), dtype = xs[0].shape, xs[0].dtype

    def excess() -> float:
        wide = xs[0].double()
        exact = wide @ wide.T
        scale = exact.diagonal().sqrt()
        bound = (3e-7 if precision == "f32" else columns * U64) * scale[:, None] * scale
        return _excess(gram(xs[0], precision=precision), exact, bound)

    theirs: dict[str, Callable[[int], object]] = {}
    prefix = {torch.float32: "x", torch.float64: "x"}.get(dtype, "x.float()")
    if dtype != torch.float64:
        theirs[f"({prefix}) @ .T f32"] = lambda i: (y := _as_f32(xs[i % len(xs)])) @ y.T
    theirs["x.double() @ .T"] = lambda i: (y := xs[i % len(xs)].double()) @ y.T
    if dtype == torch.bfloat16:
        theirs["x @ x.T bf16"] = lambda i: xs[i % len(xs)] @ xs[i % len(xs)].T
    goals = {"share": 0.55, "x x.double() @ .T": 3.5 if precision == "f64" else 6.0}
    if precision == "f32":
        goals[f"x ({prefix}) @ .T f32"] = 2.5
    if precision == "f32" and dtype == torch.bfloat16 and _native.BEST == "avx512bf16":
        # the processor multiplies pairs of such numbers
        wide = _copies((rows, columns), torch.float32)
        theirs["gram of float32"] = lambda i: gram(wide[i % len(wide)])
        goals["x gram of float32"] = 1.6
    return Case(
        f"gram {rows}x{columns}",
        _name(dtype),
        precision,
        rows * (rows + 1) * columns,
        xs[0].nbytes,
        8 * rows * rows,
        lambda i: gram(xs[i % len(xs)], precision=precision),
        theirs,
        excess,
        goals,
    )


def sketch_cases() -> Iterator[Case]:
    """X Omega."""
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            xs = _copies((rows, columns), dtype)
            for width in [*(k + OVERSAMPLE for k in RANKS), 64]:
                yield _sketch_case(xs, width)


def _sketch_case(xs: list[Tensor], width: int) -> Case:
    rows, columns = xs[0].shape

    def excess() -> float:
        wide = xs[0].double()
        bound = 130 * U32 * wide.abs().sum(1, keepdim=True)
        return _excess(sketch(xs[0], width, seed=7), wide @ torch.from_numpy(signs(columns, width, 7)), bound)

    theirs: dict[str, Callable[[int], object]] = {
        "x @ torch.randn(d, l)": lambda i: _as_f32(xs[i % len(xs)]) @ torch.randn(columns, width)
    }
    if xs[0].dtype == torch.bfloat16:
        theirs["bf16 product"] = lambda i: xs[i % len(xs)] @ torch.randn(columns, width, dtype=torch.bfloat16)
    return Case(
        f"sketch {rows}x{columns} l={width}",
        _name(xs[0].dtype),
        "f32",
        2 * rows * columns * width,
        xs[0].nbytes,
        8 * rows * width,
        lambda i: sketch(xs[i % len(xs)], width, seed=i),
        theirs,
        excess,
        {"share": 0.7, "x x @ torch.randn(d, l)": 2.0},
    )


def power_cases() -> Iterator[Case]:
    """X (X^T Q)."""
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            xs = _copies((rows, columns), dtype)
            for width in [*(k + OVERSAMPLE for k in RANKS), 64]:
                yield _power_case(xs, width)


def _power_case(xs: list[Tensor], width: int) -> Case:
    rows, columns = xs[0].shape
    q = torch.linalg.qr(torch.randn(rows, width, dtype=torch.float64)).Q
    narrow = q.float()

    def excess() -> float:
        wide = xs[0].double()
        bound = (rows + 132) * U32 * (wide.abs() @ (wide.abs().T @ q.abs()))
        return _excess(power(xs[0], q), wide @ (wide.T @ q), bound)

    theirs: dict[str, Callable[[int], object]] = {
        "x @ (x.T @ q)": lambda i: (y := _as_f32(xs[i % len(xs)])) @ (y.T @ narrow)
    }
    if xs[0].dtype == torch.bfloat16:
        half = q.bfloat16()
        theirs["bf16 product"] = lambda i: (y := xs[i % len(xs)]) @ (y.T @ half)
    return Case(
        f"power {rows}x{columns} l={width}",
        _name(xs[0].dtype),
        "f32",
        4 * rows * columns * width,
        xs[0].nbytes,
        8 * rows * width,
        lambda i: power(xs[i % len(xs)], q),
        theirs,
        excess,
        {"share": 0.5, "x x @ (x.T @ q)": 2.0},
    )


def combine_cases() -> Iterator[Case]:
    """V = X^T W with X V and V^T V."""
    for rows, columns in SHAPES:
        for dtype in DTYPES:
            xs = _copies((rows, columns), dtype)
            for k in RANKS:
                yield _combine_case(xs, k)


def _combine_case(xs: list[Tensor], k: int) -> Case:
    (rows, columns), dtype = xs[0].shape, xs[0].dtype
    w = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64)).Q
    narrow = w.float()

    def excess() -> float:
        wide = xs[0].double()
        v, xv, vtv = combine(xs[0], w)
        stored = v.double()
        return max(
            _excess(v, wide.T @ w, (rows + 3) * U32 * (wide.abs().T @ w.abs())),
            _excess(xv, wide @ stored, 130 * U32 * (wide.abs() @ stored.abs())),
            _excess(vtv, stored.T @ stored, 130 * U32 * (stored.abs().T @ stored.abs())),
        )

    def three(x: Tensor, weights: Tensor) -> object:
        v = x.T @ weights
        return x @ v, v.T @ v

    theirs: dict[str, Callable[[int], object]] = {
        "v = x.T @ w; x @ v; v.T @ v": lambda i: three(_as_f32(xs[i % len(xs)]), narrow)
    }
    if dtype == torch.bfloat16:
        half = w.bfloat16()
        theirs["bf16 product"] = lambda i: three(xs[i % len(xs)], half)
    least = 1.8 if dtype == torch.float32 else 2.5
    goals = {"share": 0.5, "x v = x.T @ w; x @ v; v.T @ v": least} if k == 64 else {}
    return Case(
        f"combine {rows}x{columns} k={k}",
        _name(dtype),
        "f32",
        4 * rows * columns * k + k * (k + 1) * columns,
        xs[0].nbytes,
        4 * columns * k,
        lambda i: combine(xs[i % len(xs)], w),
        theirs,
        excess,
        goals,
    )


def reconstruct_cases() -> Iterator[Case]:
    """All slots of one task, and of 100 tasks: q, k, v of four blocks, 4096 wide, 1024 for k and v."""
    for tasks in [1, 100]:
        for k in RANKS:
            for dtype in DTYPES:
                yield _reconstruct_case(tasks, k, dtype)


def _reconstruct_case(tasks: int, k: int, dtype: torch.dtype, p: int = 16) -> Case:
    rng = torch.Generator().manual_seed(20261122)
    # both sides of a slot: lora_A is [p, 4096] row-major, lora_B is [n, p]
    sides = [side for n in (4096, 1024, 1024) for side in ((4096, True), (n, False))] * 4
    sets = 1 if tasks > 1 else copies_past_cache(sum(m * k * dtype.itemsize for m, _ in sides))
    bases = [[torch.randn(m, k, generator=rng).to(dtype) for m, _ in sides] for _ in range(sets)]
    batches = []
    for own in bases:
        batch = []
        for _ in range(tasks):
            for basis, (m, turned) in zip(own, sides, strict=True):
                loadings = torch.randn(p, k, generator=rng).T
                # written once: else whoever comes first would wait for new pages
                out = torch.ones(p, m, dtype=dtype).T if turned else torch.ones(m, p, dtype=dtype)
                batch.append(Piece(basis, loadings, out, 0.3))
        batches.append(batch)

    def excess() -> float:
        reconstruct_many(batches[0])
        u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype, U32)
        worst = 0.0
        for basis, loadings, out, scale in batches[0][: len(sides)] + batches[0][-len(sides) :]:
            assert loadings is not None
            size = scale * (basis.double().abs() @ loadings.double().abs())
            exact = scale * (basis.double() @ loadings.double())
            worst = max(worst, _excess(out, exact, (k + 2) * U32 * size * (1 + u) + u * exact.abs() + 2.0**-25))
        return worst

    def theirs(i: int) -> None:
        for basis, loadings, out, scale in batches[i % sets]:
            assert loadings is not None
            out.copy_(scale * (_as_f32(basis) @ loadings))

    outputs = sum(m for m, _ in sides) * p * tasks
    return Case(
        f"reconstruct tasks={tasks} k={k}",
        _name(dtype),
        "f32",
        2 * outputs * k,
        sum(m for m, _ in sides) * k * dtype.itemsize,
        outputs * dtype.itemsize,
        lambda i: reconstruct_many(batches[i % sets]),
        {"basis @ loadings": theirs},
        excess,
        {"write or ceiling": 1.0},
    )


MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "gram": gram_cases,
    "sketch": sketch_cases,
    "power": power_cases,
    "combine": combine_cases,
    "reconstruct": reconstruct_cases,
}

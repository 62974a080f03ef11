"""The cases of ``benches/gpu.py`` for gram, sketch, power, combine and reconstruct: operands, answers, rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import _gpu_costs as costs
from _gpu_device import DTYPES, Candidate
from loraspan.ops import Piece, combine_many, gram_many, power_many, reconstruct_many, sketch_many
from loraspan.ops.sketch import signs

U32 = 2.0**-24
ROUNDOFF = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": U32}
# float32 sums of 128 products, each of factors rounded at most once: the bound of the operators
SUM = 130 * U32
SEED = 20261122


class Sizes(NamedTuple):
    """What is measured, and what a run on the CPU makes do with."""

    matrices: tuple[tuple[int, int, int], ...]  # (members, R, d)
    width: int
    rank: int
    sides: tuple[tuple[int, bool], ...]  # the two sides of each slot: length, whether lora_A's [p, m]
    tasks: tuple[int, ...]
    lora_rank: int


FULL = Sizes(
    # one call's matrix of 100 adapters of rank 16, a wide one, and all slots of a model in one call
    ((1, 1600, 4096), (1, 128, 65536), (24, 1600, 4096)),
    74,
    64,
    tuple(side for n in (4096, 1024, 1024) for side in ((4096, True), (n, False))) * 4,
    (1, 100),
    16,
)
SMALL = Sizes(((1, 9, 300), (2, 20, 130)), 10, 8, ((96, True), (60, False)), (1, 3), 4)


class Goal(NamedTuple):
    """What a figure of a record has to reach on a GPU: at least ``bound`` or, where it is ``most``, no more."""

    figure: str
    bound: float
    most: bool = False

    def judge(self, reached: float) -> str:
        """Say whether it is met."""
        met = reached <= self.bound if self.most else reached >= self.bound
        sign = "<=" if self.most else ">="
        return f"{self.figure} {reached:.3g}, goal {sign} {self.bound:g}: {'met' if met else 'missed'}"


OF_FLOOR = (Goal("share", 0.8),)


@dataclass
class Case:
    """One shape of one operator. ``ours`` runs a backend, ``excess`` how far it is off, as a multiple of its bound.

    ``theirs`` get the number of the round, and leave their results where ours are.
    """

    operator: str
    shape: str
    dtype: str
    precision: str
    cost: costs.Cost
    ours: Callable[[str], object]
    excess: Callable[[str], float]
    theirs: dict[str, Candidate]
    goals: tuple[Goal, ...]


Plan = tuple[str, Callable[[], Case]]


def excess_of(actual: Tensor, exact: Tensor, bound: Tensor) -> float:
    """Give the largest error as a multiple of its bound; NaN if there is one in ``actual``."""
    if actual.shape != exact.shape:
        return float("inf")
    return float(((actual.double() - exact).abs() / bound).max())


def worst_of(found: Iterable[float]) -> float:
    """Give the largest, or NaN if there is one: ``max`` would pass over it."""
    return float(torch.tensor(list(found)).max())


class Data(NamedTuple):
    """The members ``[R, d]`` of a call; the first and the last of them are checked."""

    xs: list[Tensor]
    dtype: str
    generator: torch.Generator

    @property
    def checked(self) -> dict[int, Tensor]:
        """Some members in float64."""
        return {i: self.xs[i].double() for i in sorted({0, len(self.xs) - 1})}

    def orthonormal(self, width: int) -> Tensor:
        """Give a float64 block ``[R, width]`` with orthonormal columns, on the CPU."""
        rows = self.xs[0].shape[0]
        drawn = torch.randn(rows, width, generator=self.generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q if width <= rows else drawn

    def ready(self, block: Tensor) -> dict[torch.dtype, Tensor]:
        """Give a block on the device, in the dtypes that torch multiplies in."""
        return {kind: block.to(self.xs[0].device, kind) for kind in (DTYPES[self.dtype], torch.float32)}


def _data(matrices: tuple[int, int, int], dtype: str, device: torch.device) -> Data:
    members, rows, columns = matrices
    here = torch.Generator(device).manual_seed(SEED)
    xs = [torch.randn(rows, columns, generator=here, device=device).to(DTYPES[dtype]) for _ in range(members)]
    return Data(xs, dtype, torch.Generator().manual_seed(SEED))


def _rivals(data: Data, expression: Callable[[Tensor, torch.dtype], Sequence[Tensor]]) -> dict[str, Candidate]:
    """Give torch's expression in the dtype of the data and, if that is a half, in float32; results come to the CPU."""
    wide = torch.float32

    def own(_: int) -> object:
        return [[t.double().cpu() for t in expression(x, x.dtype)] for x in data.xs]

    def widened(_: int) -> object:
        return [[t.double().cpu() for t in expression(x.to(wide), wide)] for x in data.xs]

    return {"torch": own} if data.dtype == "f32" else {"torch": own, "torch f32": widened}


def _shape(matrices: tuple[int, int, int], rest: str = "") -> str:
    members, rows, columns = matrices
    return f"{members} x {rows} x {columns}{rest}"


def gram_case(matrices: tuple[int, int, int], dtype: str, precision: str, device: torch.device) -> Case:
    """Of all members in one call."""
    data = _data(matrices, dtype, device)
    members, rows, columns = matrices
    unit = SUM if precision == "f32" else (columns + 1) * 2.0**-52

    def excess(backend: str) -> float:
        found = gram_many(data.xs, precision=precision, backend=backend)
        return worst_of(
            excess_of(found[i], (x @ x.T).cpu(), (unit * (x.abs() @ x.abs().T)).cpu()) for i, x in data.checked.items()
        )

    theirs = _rivals(data, lambda x, _: [x @ x.T])
    if precision == "f64":
        theirs = {"torch": lambda _: [(y @ y.T).cpu() for y in (x.double() for x in data.xs)]}
    cost = costs.gram(rows, columns, dtype, precision).times(members)
    ours = partial(_ours, gram_many, data.xs, precision=precision)
    return Case("gram", _shape(matrices), dtype, precision, cost, ours, excess, theirs, OF_FLOOR)


def _ours(operator: Callable[..., object], batch: object, backend: str, **options: object) -> object:
    return operator(batch, backend=backend, **options)


def sketch_case(matrices: tuple[int, int, int], dtype: str, width: int, device: torch.device) -> Case:
    """Of all members in one call; torch draws normal numbers, as one does there."""
    data = _data(matrices, dtype, device)
    members, rows, columns = matrices

    def excess(backend: str) -> float:
        found = sketch_many([(x, width) for x in data.xs], seed=7, backend=backend)
        omega = torch.from_numpy(signs(columns, width, 7)).to(device)
        return worst_of(
            excess_of(found[i], (x @ omega).cpu(), (SUM * x.abs().sum(1, keepdim=True)).cpu())
            for i, x in data.checked.items()
        )

    theirs = _rivals(data, lambda x, kind: [x @ torch.randn(columns, width, dtype=kind, device=device)])
    cost = costs.sketch(rows, columns, width, dtype).times(members)
    ours = partial(_ours, sketch_many, [(x, width) for x in data.xs], seed=7)
    return Case("sketch", _shape(matrices, f", l {width}"), dtype, "f32", cost, ours, excess, theirs, OF_FLOOR)


def power_case(matrices: tuple[int, int, int], dtype: str, width: int, device: torch.device) -> Case:
    """Of all members in one call."""
    data = _data(matrices, dtype, device)
    members, rows, columns = matrices
    q = data.orthonormal(width)

    def excess(backend: str) -> float:
        found, there = power_many([(x, q) for x in data.xs], backend=backend), q.to(device)
        unit = (rows + 132) * U32
        return worst_of(
            excess_of(found[i], (x @ (x.T @ there)).cpu(), (unit * (x.abs() @ (x.abs().T @ there.abs()))).cpu())
            for i, x in data.checked.items()
        )

    ready = data.ready(q)
    theirs = _rivals(data, lambda x, kind: [x @ (x.T @ ready[kind])])
    cost = costs.power(rows, columns, width, dtype).times(members)
    ours = partial(_ours, power_many, [(x, q) for x in data.xs])
    return Case("power", _shape(matrices, f", l {width}"), dtype, "f32", cost, ours, excess, theirs, ())


def combine_case(matrices: tuple[int, int, int], dtype: str, rank: int, device: torch.device) -> Case:
    """Of all members in one call, V in float32."""
    data = _data(matrices, dtype, device)
    members, rows, columns = matrices
    w = data.orthonormal(rank)

    def excess(backend: str) -> float:
        found, there, worst = combine_many([(x, w) for x in data.xs], backend=backend), w.to(device), []
        for i, x in data.checked.items():
            v, xv, vtv = found[i]
            stored, size = v.double(), v.double().abs()
            worst += [
                excess_of(v, x.T @ there, (rows + 3) * U32 * (x.abs().T @ there.abs())),
                excess_of(xv, (x @ stored).cpu(), (SUM * (x.abs() @ size)).cpu()),
                excess_of(vtv, (stored.T @ stored).cpu(), (SUM * (size.T @ size)).cpu()),
            ]
        return worst_of(worst)

    ready = data.ready(w)

    def three(x: Tensor, kind: torch.dtype) -> Sequence[Tensor]:
        v = x.T @ ready[kind]
        return [x @ v, v.T @ v]

    cost = costs.combine(rows, columns, rank, dtype).times(members)
    ours = partial(_ours, combine_many, [(x, w) for x in data.xs])
    shape = _shape(matrices, f", k {rank}")
    return Case("combine", shape, dtype, "f32", cost, ours, excess, _rivals(data, three), OF_FLOOR)


def reconstruct_case(tasks: int, sizes: Sizes, dtype: str, device: torch.device) -> Case:
    """Both factors of every slot of some tasks in one call; each written to its place."""
    kind, rank, p = DTYPES[dtype], sizes.rank, sizes.lora_rank
    here = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=here, device=device).to(kind)

    bases = [normal(length, rank) for length, _ in sizes.sides]
    pieces = []
    for _ in range(tasks):
        for basis, (length, turned) in zip(bases, sizes.sides, strict=True):
            out = torch.empty(p, length, dtype=kind, device=device).T if turned else normal(length, p)
            pieces.append(Piece(basis, normal(p, rank).T, out, 0.3))

    def excess(backend: str) -> float:
        for piece in pieces:
            piece.out.fill_(torch.nan)
        reconstruct_many(pieces, backend=backend)
        worst, u = [], ROUNDOFF[dtype]
        for basis, loadings, out, scale in {id(p): p for p in (*pieces[: len(bases)], *pieces[-len(bases) :])}.values():
            assert loadings is not None
            exact = scale * (basis.double() @ loadings.double())
            size = scale * (basis.double().abs() @ loadings.double().abs())
            before = (rank + 2) * U32 * size
            # and half a subnormal step of float16, of which the others have less
            worst.append(excess_of(out, exact, before + u * (exact.abs() + before) + 2.0**-25))
        return worst_of(worst)

    def theirs(_: int) -> None:
        for basis, loadings, out, scale in pieces:
            assert loadings is not None
            out.copy_(scale * (basis @ loadings))

    cost = costs.reconstruct([length for length, _ in sizes.sides], tasks, rank, p, dtype)
    shape = f"{tasks} tasks x {len(bases)}, k {rank}, r {p}"
    ours = partial(_ours, reconstruct_many, pieces)
    return Case("reconstruct", shape, dtype, "f32", cost, ours, excess, {"torch": theirs}, OF_FLOOR)


def plans(operator: str, sizes: Sizes, device: torch.device) -> list[Plan]:
    """Give the cases of an operator, each by name with what makes it."""
    found: list[Plan] = []
    for dtype in ("f16", "bf16", "f32"):
        if operator == "reconstruct":
            for tasks in sizes.tasks:
                found.append((f"{tasks} tasks {dtype}", partial(reconstruct_case, tasks, sizes, dtype, device)))
            continue
        for matrices in sizes.matrices:
            made = {
                "gram": partial(gram_case, matrices, dtype, "f32", device),
                "sketch": partial(sketch_case, matrices, dtype, sizes.width, device),
                "power": partial(power_case, matrices, dtype, sizes.width, device),
                "combine": partial(combine_case, matrices, dtype, sizes.rank, device),
            }
            found.append((f"{_shape(matrices)} {dtype}", made[operator]))
    if operator == "gram":
        matrices = sizes.matrices[-1]
        found.append((f"{_shape(matrices)} f32 in f64", partial(gram_case, matrices, "f32", "f64", device)))
    return found

"""A range for one side of a slot: orthonormal directions that hold most of the energy of the weighted rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from loraspan.collection.stack import Stack
from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.roots import gram_root, orthonormalize
from loraspan.ops import combine, gram, power, sketch, sparse_sketch
from loraspan.ops.blocks import CPU
from loraspan.ops.dense import eigh
from loraspan.ops.product import inner, product
from loraspan.ops.stream import held
from loraspan.ops.whiten import whiten_

# Energies below this share of the largest are rounding: a Gram squares the condition number (float32 sums flushed to
# float64 resolve 3e-4 sigma_1, float64 sums 1e-8 sigma_1).
_FLOOR = {"f32": 1e-7, "f64": 1e-15}
# What one multiply-add of the sketch costs against one of the Gram, measured: its tiles are narrower.
_SKETCH_COST = 1.3
# A wide sketch is so many times as wide as the range. Power steps take these shares of its columns: what the first
# leaves out comes with the second.
_WIDER, _STEPS = 8, (1 / 2, 1)
# How far from orthonormal directions may be that only float32 passes follow on.
_DEFECT = 1e-8


class Formed(NamedTuple):
    """What the last pass of a range has formed already.

    Attributes:
        w: ``[R, m]``, float64: what it combined the factors with.
        v: ``[d, m]``, float32: ``X^T w`` as rounded.
        xv: ``[R, m]``, float64: the factors times ``v``.
        lengths: ``[m]``, float64: of the columns of ``v``.
        turn: ``[m, l]``, float64: ``v @ turn`` are the directions of the range.
    """

    w: Tensor
    v: Tensor
    xv: Tensor
    lengths: Tensor
    turn: Tensor


class Range(NamedTuple):
    """``l`` orthonormal directions ``X^T w`` of one side.

    Attributes:
        energies: ``[l]``, descending: squared singular values of the weighted rows.
        combined: ``[R, l]``, float64: the directions as combinations of the factors; None where ``formed`` tells.
        xv: ``[R, l]``, float64: the factors times the directions, ``X X^T w``.
        formed: the directions themselves, where they were asked for and a float32 pass has made them.
    """

    energies: Tensor
    combined: Tensor | None
    xv: Tensor
    formed: Formed | None = None

    @property
    def w(self) -> Tensor:
        """``combined``, made where it is not there: hardly anyone asks for it then."""
        if self.formed is not None:
            return product(self.formed.w, self.formed.turn)
        assert self.combined is not None
        return self.combined


def find_range(stack: Stack, width: int, *, precision: str, seed: int, form: bool = False) -> Range:
    """Give the leading ``width`` directions, or as many as are above the rounding of ``precision``.

    By the Gram of all rows, or by a sketch and power steps, whichever takes fewer operations.

    Args:
        stack: factors and weights.
        width: how many directions are wanted.
        precision: of the operators, ``"f32"`` or ``"f64"``.
        seed: of the sketch.
        form: whether to keep what the last pass forms, ``m`` columns as long as a row of ``x``: where float32 sums are
            those of the compiled kernels.

    Source:
        Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011, algorithms 4.4 and 5.3.
    """
    with held([stack.x]):
        return _find_range(stack, width, precision, seed, form)


def _find_range(stack: Stack, width: int, precision: str, seed: int, form: bool) -> Range:
    rows = stack.x.shape[0]
    if (rows + 1) / 2 <= 5 * width * _SKETCH_COST and stack.vectors.total > rows:
        return _by_rows(stack, width, precision)
    # multiply-adds per column of X: half a Gram, or a dense sketch and two power steps of twice its work. A wide sketch
    # takes less, and rows that are not many more than this stay with what is exact
    if (rows + 1) / 2 > 5 * width * _SKETCH_COST:
        return _by_sketch(stack, width, precision, seed, form)
    values, vectors, image = _by_gram(stack, width, precision)
    kept = _resolved(values, precision)
    inverse = values[:kept].rsqrt()
    return Range(values[:kept], vectors[:, :kept] * inverse, image[:, :kept] * inverse)


def _resolved(values: Tensor, precision: str) -> int:
    """Say how many of the energies, descending, are above rounding."""
    return int((values > _FLOOR[precision] * values[:1]).sum()) if values.numel() else 0


def _by_rows(stack: Stack, width: int, precision: str) -> Range:
    """Where the vectors of all tasks are more than the rows that they are made of: in coordinates of the rows."""
    rows = gram(stack.x, precision=precision)
    root = gram_root(rows)
    weighted = gram([stack.weigh(root.r.T.contiguous()).T], precision="f64")
    values, vectors = top_eigenpairs(weighted, width)
    kept = _resolved(values, precision)
    w = root.inverse @ vectors[:, :kept]
    return Range(values[:kept], w, product(rows, w))


def _by_gram(stack: Stack, width: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = gram(stack.x, precision=precision)
    weighted = stack.weigh(stack.weigh(rows).T.contiguous())
    values, vectors = top_eigenpairs((weighted + weighted.T) / 2, width)
    w = stack.weigh_transposed(vectors)
    return values, w, product(rows, w)


def _by_sketch(stack: Stack, width: int, precision: str, seed: int, form: bool) -> Range:
    v = None
    on_cpu = precision == "f32" and stack.x.plain and stack.x.device == CPU
    # a GPU multiplies faster than it adds up, and few columns are no longer than their sketch
    is_long = on_cpu and stack.x.shape[1] > _WIDER * width
    w = _by_wide_sketch(stack, width, seed) if is_long else _by_power(stack, width, precision, seed)
    # what runs of 128 rows are off by is known; other backends sum over all of them
    if form and on_cpu:
        v, image, held = combine(stack.x, w, precision=precision)
    else:
        image = power(stack.x, w, precision=precision)
        held = inner(w, image)
        held = (held + held.T) / 2
    values, vectors = eigh(held)
    kept = _resolved(values, precision)
    values, turn = values[:kept], vectors[:, :kept] * values[:kept].rsqrt()
    if v is None:
        return Range(values, product(w, turn), product(image, turn))
    return Range(values, None, product(image, turn), Formed(w, v, image, held.diagonal().sqrt(), turn))


def _by_power(stack: Stack, width: int, precision: str, seed: int) -> Tensor:
    w = _orthonormal(stack, sketch(stack.x, width, seed=seed, precision=precision), precision)
    return _orthonormal(stack, power(stack.x, w, precision=precision), precision)


def _by_wide_sketch(stack: Stack, width: int, seed: int) -> Tensor:
    """Give what power steps find in a sketch many times as wide as the range, which stands for the factors.

    Its rows are to each other as theirs, up to an error that falls with its width, and are read from cache.
    """
    y = sparse_sketch(stack.x, _WIDER * width, seed=seed)
    w = _orthonormal(stack, y.view(-1, _WIDER, width).sum(1).double(), "f32")
    for share in _STEPS:
        some = y[:, : int(share * y.shape[1])]
        w = _orthonormal(stack, power(some, w, precision="f32"), "f32")
    return w


def _orthonormal(stack: Stack, block: Tensor, precision: str) -> Tensor:
    r"""Give ``D^T q [R, l]`` for orthonormal ``q`` that span the weighted ``D y``, ``y`` the block ``[R, l]``.

    From ``(D y)^T (D y) = y^T (D^T D y)`` in one round, without ``D`` and in the memory of the block, where ``q`` is
    then orthonormal far beyond the precision of the passes.
    """
    block = block.contiguous()
    if precision == "f32" and whiten_(block, stack.weigh_twice(block).contiguous(), _DEFECT):
        return block
    return stack.weigh_transposed(orthonormalize(stack.weigh(block)))

"""A range for one side of a slot: orthonormal directions that hold most of the energy of the weighted rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from loraspan.collection.stack import Stack
from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.roots import gram_root, orthonormalize
from loraspan.ops import gram, power, sketch
from loraspan.ops.dense import eigh, inner
from loraspan.ops.stream import held

# Energies below this share of the largest are rounding: a Gram squares the condition number (float32 sums flushed to
# float64 resolve 3e-4 sigma_1, float64 sums 1e-8 sigma_1).
_FLOOR = {"f32": 1e-7, "f64": 1e-15}
# What one multiply-add of the sketch costs against one of the Gram, measured: its tiles are narrower.
_SKETCH_COST = 1.3
# How far from orthonormal directions may be that only float32 passes follow on.
_ROUNDOFF, _DEFECT = 2.0**-53, 1e-8


class Range(NamedTuple):
    """``l`` orthonormal directions ``X^T w`` of one side.

    Attributes:
        energies: ``[l]``, descending: squared singular values of the weighted rows.
        w: ``[R, l]``, float64: the directions as combinations of the factors.
        xv: ``[R, l]``, float64: the factors times the directions, ``X X^T w``.
    """

    energies: Tensor
    w: Tensor
    xv: Tensor


def find_range(stack: Stack, width: int, *, precision: str, seed: int) -> Range:
    """Give the leading ``width`` directions, or as many as are above the rounding of ``precision``.

    By the Gram of all rows, or by a sketch and two fused power steps, whichever takes fewer operations.

    Args:
        stack: factors and weights.
        width: how many directions are wanted.
        precision: of the operators, ``"f32"`` or ``"f64"``.
        seed: of the sketch.

    Source:
        Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011, algorithms 4.4 and 5.3.
    """
    with held([stack.x]):
        return _find_range(stack, width, precision, seed)


def _find_range(stack: Stack, width: int, precision: str, seed: int) -> Range:
    rows = stack.x.shape[0]
    if (rows + 1) / 2 <= 5 * width * _SKETCH_COST and stack.vectors.total > rows:
        return _by_rows(stack, width, precision)
    # multiply-adds per column of X: half a Gram, or the sketch and two power steps of twice its work
    if (rows + 1) / 2 <= 5 * width * _SKETCH_COST:
        values, vectors, image = _by_gram(stack, width, precision)
    else:
        values, vectors, image = _by_sketch(stack, width, precision, seed)
    kept = int((values > _FLOOR[precision] * values[:1]).sum()) if values.numel() else 0
    values, vectors, image = values[:kept], vectors[:, :kept], image[:, :kept]
    inverse = values.rsqrt()
    return Range(values, vectors * inverse, image * inverse)


def _by_rows(stack: Stack, width: int, precision: str) -> Range:
    """Where the vectors of all tasks are more than the rows that they are made of: in coordinates of the rows."""
    rows = gram(stack.x, precision=precision)
    root = gram_root(rows)
    weighted = gram([stack.weigh(root.r.T.contiguous()).T], precision="f64")
    values, vectors = top_eigenpairs(weighted, width)
    kept = int((values > _FLOOR[precision] * values[:1]).sum()) if values.numel() else 0
    w = root.inverse @ vectors[:, :kept]
    return Range(values[:kept], w, rows @ w)


def _by_gram(stack: Stack, width: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    rows = gram(stack.x, precision=precision)
    weighted = stack.weigh(stack.weigh(rows).T.contiguous())
    values, vectors = top_eigenpairs((weighted + weighted.T) / 2, width)
    w = stack.weigh_transposed(vectors)
    return values, w, rows @ w


def _by_sketch(stack: Stack, width: int, precision: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    image = sketch(stack.x, width, seed=seed, precision=precision)
    for _ in range(2):
        w = _orthonormal(stack, image, precision)
        image = power(stack.x, w, precision=precision)
    held = inner(w, image)
    values, vectors = eigh((held + held.T) / 2)
    return values, w @ vectors, image @ vectors


def _orthonormal(stack: Stack, block: Tensor, precision: str) -> Tensor:
    r"""Give ``D^T q [R, l]`` for orthonormal ``q`` that span the weighted ``D y``, ``y`` the block ``[R, l]``.

    From ``(D y)^T (D y) = y^T (D^T D y)`` in one round, without ``D``, where ``q`` is then orthonormal far beyond the
    precision of the passes: the rounding of the product, which its asymmetry shows, grows with the square of the
    inverse root of columns made unit ones.
    """
    if precision == "f32":
        image = stack.weigh_twice(block)
        gram_ = inner(block, image)
        root = gram_root((gram_ + gram_.T) / 2)
        size = gram_.diagonal().clamp(min=0).sqrt()
        noise = _ROUNDOFF + ((gram_ - gram_.T) / size / size[:, None]).abs().amax()
        # a column of zeros makes it a NaN
        if bool(noise * (size[:, None] * root.inverse).abs().amax().square() <= _DEFECT):
            return image @ root.inverse
    return stack.weigh_transposed(orthonormalize(stack.weigh(block)))

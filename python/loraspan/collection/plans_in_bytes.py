"""Choose how a collection is stored in so many bytes: errors are looked for whose plans take as many, and built."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from loraspan.collection.budget import NEVER
from loraspan.collection.factors import SlotFactors
from loraspan.collection.plans import Options, Outcome, bytes_of, lines_of, worst_of
from loraspan.collection.rows import Widths
from loraspan.collection.within import Fitted, Fitters

# Relative errors between which one is looked for that fits a number of bytes, how finely, how often a fit is built for
# one, the share of the bytes from which on another is not worth it, and the number of times at which widths that took
# too many bytes again are given up until something fits. Then builds between one that fits and one that does not, at
# bytes to aim at, until a share of them is used.
_LEAST, _MOST, _HALVINGS, _BUILDS, _CLOSE, _OVER = 1e-6, 0.999, 11, 7, 0.99, 2
_BETWEEN, _AIM, _USED = 4, 0.999, 0.998


def fit_bytes(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    limit: int,
    measure: Callable[[list[Fitted], Widths], int],
    options: Options,
) -> Outcome | int:
    """Give the fit of the smallest worst error that takes at most ``limit`` bytes, or the least bytes that one takes.

    Args:
        slots: the factors.
        squares: ``[N]``: every task's ``|dW|_F^2``.
        limit: of all bytes on disk.
        measure: gives all bytes of a fit on disk: those that no plan counts included.
        options: see :class:`Options`.
    """
    candidates, seed, refine, report = options
    fitters = Fitters(slots, squares, coarse=False, seed=seed, refine=refine)
    curves = {widths: _Curve(fitters, widths) for widths in candidates}
    # what a fit takes beside what its plan counts, by widths: until one was built, as for the one that was built last
    beside: dict[Widths, int] = {}
    over: Counter[Widths] = Counter()
    given_up: dict[Widths, _Curve] = {}
    best: _Built | None = None
    least, last = NEVER, 0
    too_many: dict[Widths, _Built] = {}
    for _ in range(_BUILDS):
        widths, error = _least_error(curves, {w: limit - beside.get(w, last) for w in candidates})
        if error > _MOST and best is not None:
            break
        fitted = fitters.build(min(error, _MOST), widths, report)
        worst, nbytes = worst_of(slots, squares, fitted), measure(fitted, widths)
        least = min(least, nbytes)
        built = _Built(worst, error, nbytes, fitted)
        if nbytes > limit:
            too_many[widths] = max(too_many.get(widths, built), built, key=lambda one: one.error)
        elif best is None or worst < best.worst:
            best, chosen = built, widths
        missed = beside.get(widths)
        beside[widths] = last = nbytes - curves[widths].bytes_at(min(error, _MOST))
        if missed is not None and nbytes > limit:
            # still too many: what is beside moves along, so go twice as far
            beside[widths] += nbytes - limit
            over[widths] += 1
            if over[widths] == _OVER and len(curves) > 1 and best is None:
                # it does not take what its plans say: let others try
                given_up[widths] = curves.pop(widths)
                continue
        # rounding took more than the budget it was built for, or nothing moves any more
        if worst > error:
            curves[widths].rule_out(worst)
        elif missed is not None and limit * _CLOSE <= nbytes <= limit and not given_up:
            break
        if best is not None:
            # there is something to fall back on: what promised more may try again
            curves |= given_up
            given_up = {}
    if best is None:
        return least

    def build(error: float) -> _Built:
        fitted = fitters.build(error, chosen, report)
        return _Built(worst_of(slots, squares, fitted), error, measure(fitted, chosen), fitted)

    best = _closer(best, too_many.get(chosen), limit, build)
    return Outcome(best.fitted, chosen, best.worst, lines_of(fitters, candidates, best.error, chosen))


class _Built(NamedTuple):
    """A fit, the error that it was built for and the worst that came out, and its bytes on disk."""

    worst: float
    error: float
    nbytes: int
    fitted: list[Fitted]


def _closer(fits: _Built, other: _Built | None, limit: int, build: Callable[[float], _Built]) -> _Built:
    """Give a fit with a smaller error than one that fits, between it and ``other``, which takes too many bytes."""
    for _ in range(_BETWEEN):
        if other is None or other.error >= fits.error or fits.nbytes >= _USED * limit:
            break
        share = (_AIM * limit - fits.nbytes) / (other.nbytes - fits.nbytes)
        found = build(fits.error * (other.error / fits.error) ** share)
        if found.nbytes > limit:
            other = found
        elif found.worst < fits.worst:
            fits = found
        else:
            break
    return fits


def _least_error(curves: Mapping[Widths, _Curve], limits: Mapping[Widths, int]) -> tuple[Widths, float]:
    """Give the widths whose plan has the smallest error within their limit of bytes, and that error."""
    best, error = next(iter(curves)), math.inf
    # narrow ones first, which win where bytes are few: one count then says that most others cannot do better
    for widths, curve in reversed(list(curves.items())):
        if error <= _MOST and not curve.is_within(error, limits[widths]):
            continue
        found = curve.error_for(limits[widths])
        if found < error:
            best, error = widths, found
    return best, error


class _Curve:
    """Bytes over errors of the plans of one choice of widths, counted where they are asked for."""

    def __init__(self, fitters: Fitters, widths: Widths) -> None:
        self._fitters, self._widths = fitters, widths
        self._known: dict[float, int] = {}
        self._floor = _LEAST

    def bytes_at(self, error: float) -> int:
        if error not in self._known:
            self._known[error] = bytes_of(self._fitters.plan(error, self._widths))
        return self._known[error]

    def rule_out(self, error: float) -> None:
        """Keep to errors from this one on."""
        self._floor = min(error, _MOST)

    def is_within(self, error: float, limit: int) -> bool:
        """Say whether a plan of that error takes at most ``limit`` bytes."""
        return error > self._floor and self.bytes_at(error) <= limit

    def error_for(self, limit: int) -> float:
        """Give about the smallest error whose plan takes at most ``limit`` bytes, infinity if there is none."""
        low, high = self._floor, _MOST
        if self.bytes_at(high) > limit:
            return math.inf
        if self.bytes_at(low) <= limit:
            return low
        for _ in range(_HALVINGS):
            # on a fixed grid, so that another limit finds most of its points counted
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.bytes_at(middle) <= limit else (middle, high)
        return high

"""The picture of ``loraspan demo``: error and accuracy over bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraspan.cli.demo_compare import Point

# Okabe and Ito's colours, told apart by those who see fewer
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#555555"
_STYLE: Any = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}
_SHARES = (0.125, 0.25, 0.5, 1.0)
_TITLES = {
    "shared-seed": "One initialisation seed for all 12 adapters",
    "own-seed": "The same 12 tasks, each adapter its own seed",
}


@dataclass(frozen=True)
class Curves:
    """All points of one family, each list from many bytes to few.

    Attributes:
        original: the adapters as they came.
        base: the base model without them.
        within: by ``max_error``.
        shared: by ``rank``.
        plain_within: plain SVDs of the bytes of each of ``within``.
        plain_shared: likewise of ``shared``.
    """

    original: Point
    base: Point
    within: Sequence[Point]
    shared: Sequence[Point]
    plain_within: Sequence[Point]
    plain_shared: Sequence[Point]


def draw(families: Mapping[str, Curves], path: Path) -> None:
    """Write the picture: a column per family, mean error above mean accuracy."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context(_STYLE):
        figure, axes = plt.subplots(
            2, len(families), figsize=(10.5, 7.4), sharex=True, sharey="row", squeeze=False, layout="constrained"
        )
        for column, (name, curves) in enumerate(families.items()):
            for row, what in enumerate(("error", "accuracy")):
                _draw_curves(axes[row, column], curves, what)
            _draw_limits(axes[1, column], curves)
            axes[0, column].set_title(_TITLES.get(name, name), fontsize=12, loc="left", pad=10)
            axes[1, column].set_xlabel("bases and factors: share of the original bytes (log scale)")
        axes[0, 0].set_ylim(bottom=0)
        axes[0, 0].set_ylabel("relative error of dW (mean)")
        axes[1, 0].set_ylabel("accuracy on test images (mean)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_curves(axes: Any, curves: Curves, what: str) -> None:
    plain = sorted((*curves.plain_within, *curves.plain_shared), key=lambda point: point.nbytes)
    lines = (
        (plain, _GREY, "s--", "each adapter's own truncated SVD"),
        (curves.within, _BLUE, "o-", "loraspan --max-error"),
        (curves.shared, _ORANGE, "^:", "loraspan --rank (all shared)"),
    )
    for points, colour, form, label in lines:
        shares = [point.nbytes / curves.original.nbytes for point in points]
        values = [getattr(point, what) for point in points]
        axes.plot(shares, values, form, color=colour, label=label, markersize=5.5, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_SHARES, [f"{share:.3g}" for share in _SHARES])
    axes.set_xlim(0.9 * _SHARES[0], 1.08)
    axes.minorticks_off()


def _draw_limits(axes: Any, curves: Curves) -> None:
    axes.axhline(curves.original.accuracy, color="black", linewidth=0.9, linestyle=(0, (1, 2)))
    axes.annotate(
        f"original adapters {curves.original.accuracy:.2f}",
        (0.015, curves.original.accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.text(
        0.985,
        0.03,
        f"base model alone: {curves.base.accuracy:.2f}",
        transform=axes.transAxes,
        ha="right",
        fontsize=9,
    )

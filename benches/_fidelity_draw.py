"""What ``benches/fidelity.py`` draws: error over bytes, a panel a case, and accuracy where there are tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _fidelity_show import FAMILIES, OURS, Point, by_case_of, family_of, others_of, ours_of

GOAL_ACCURACY, GOAL_SHARE = 0.99, 0.08
_COLUMNS = 3
_STYLES: dict[str, dict[str, Any]] = {
    "SVD": {"color": "#0072b2", "marker": "s", "ms": 3, "lw": 1.2},
    "vlora": {"color": "#d55e00", "marker": "^", "ms": 3.5, "lw": 1.2},
    "lorashare": {"color": "#009e73", "marker": "v", "ms": 3.5, "lw": 1.2},
    "random basis": {"color": "#999999", "marker": "x", "ms": 4, "lw": 0.8},
    "mean": {"color": "#cc79a7", "marker": "*", "ms": 7, "lw": 0},
    "loraspan": {"color": "black", "marker": "o", "ms": 3.5, "lw": 1.8, "zorder": 5},
}


def draw(records: Sequence[Point], path: str | Path) -> None:
    """Draw of every way what no other point of it beats."""
    import matplotlib.pyplot as plt

    by_case = by_case_of(records)
    panels = [(case, "worst") for case in by_case]
    panels += [(case, "accuracy") for case, rows in by_case.items() if any("accuracy" in row for row in rows)]
    lines = len(panels) // _COLUMNS + 1
    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(lines, _COLUMNS, figsize=(12.5, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (case, what) in zip(axes.flat, panels, strict=False):
        (_draw_error if what == "worst" else _draw_accuracy)(axis, by_case[case])
        axis.set_title(case if what == "worst" else f"{case}: accuracy of the tasks", fontsize=11)
        _tidy(axis)
    labelled = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    axes.flat[-1].legend(handles.values(), handles.keys(), loc="center", frameon=False, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_error(axis: Any, rows: Sequence[Point]) -> None:
    for family in FAMILIES:
        _line(axis, [row for row in others_of(rows) if family_of(row) == family], "worst", family)
    _line(axis, ours_of(rows), "worst", OURS)
    axis.set(yscale="log", ylim=(3e-8, 3), ylabel="worst error on $dW$")


def _draw_accuracy(axis: Any, rows: Sequence[Point]) -> None:
    for family in FAMILIES:
        _line(axis, [row for row in others_of(rows) if family_of(row) == family], "accuracy", family)
    _line(axis, ours_of(rows), "accuracy", OURS)
    whole = next(row["accuracy"] for row in rows if row["way"] == "original")
    axis.axhline(GOAL_ACCURACY * whole, color="black", lw=0.6, ls=":")
    axis.axvline(GOAL_SHARE * rows[0]["factor_bytes"] / 1e3, color="black", lw=0.6, ls=":")
    axis.set(ylabel="mean accuracy")


def _line(axis: Any, rows: Iterable[Point], key: str, label: str) -> None:
    sign = -1 if key == "accuracy" else 1
    points = sorted((row["nbytes"] / 1e3, sign * row[key]) for row in rows)
    front = [(x, sign * y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)]
    if front:
        axis.plot(*zip(*front, strict=True), label=label, **_STYLES[label])


def _tidy(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda kb, _: f"{kb:g} kB" if kb < 1000 else f"{kb / 1000:g} MB"))
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)

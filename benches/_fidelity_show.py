"""What ``benches/fidelity.py`` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _bench import table

Point = dict[str, Any]
OURS = "loraspan"
FAMILIES = ("SVD", "vlora", "lorashare", "random basis", "mean")
_STYLES: dict[str, dict[str, Any]] = {
    "SVD": {"color": "#0072b2", "marker": "s", "ms": 3, "lw": 1.2},
    "vlora": {"color": "#d55e00", "marker": "^", "ms": 3.5, "lw": 1.2},
    "lorashare": {"color": "#009e73", "marker": "v", "ms": 3.5, "lw": 1.2},
    "random basis": {"color": "#999999", "marker": "x", "ms": 4, "lw": 0.8},
    "mean": {"color": "#cc79a7", "marker": "*", "ms": 7, "lw": 0},
}
FOLDERS, ONE_FILE = "folders", "SVD in one file"
# Both are then as good as float32 holds: what is left is the rounding of the last bits.
EXACT = 1e-6


def met(other: Point, mine: Sequence[Point], key: str = "nbytes") -> bool:
    """Say whether a point of ours has no more bytes and no more worst error; ``key``: which bytes, if it has those."""
    return any(one["nbytes"] <= other.get(key, other["nbytes"]) and _no_worse(one, other) for one in mine)


def _no_worse(ours: Point, other: Point) -> bool:
    return bool(ours["worst"] <= max(other["worst"], EXACT))


def ours_of(rows: Sequence[Point]) -> list[Point]:
    """Give our points."""
    return [row for row in rows if row["way"] == OURS and "nbytes" in row]


def others_of(rows: Sequence[Point]) -> list[Point]:
    """Give everyone else's points, those of the fewest bytes first."""
    found = [row for row in rows if row["way"] not in (OURS, "original") and "nbytes" in row]
    return sorted(found, key=lambda row: row["nbytes"])


def show(records: Sequence[Point]) -> None:
    """Print every way's points that no other of it beats, with the best of ours in as many bytes; how many are met."""
    by_case = _by_case(records)
    for case, rows in by_case.items():
        mine, others = ours_of(rows), others_of(rows)
        print(f"\n{case}: {rows[0]['adapters']} adapters, {rows[0]['factor_bytes']:,} bytes of factors in float32")
        print(table([_line(row, mine) for row in others if _at_front(row, others)], _columns(rows)))
        for row in rows:
            if "refused" in row:
                print(f"  {row['way']}{' at ' + str(row['asked']) if 'asked' in row else ''} refuses: {row['refused']}")
        _show_accuracy(rows, mine)
    print("\npoints that one of ours meets with no more bytes and no more worst error, of all")
    print(table([_counts(case, rows) for case, rows in by_case.items()], ("case", *FAMILIES, ONE_FILE)))
    for case, rows in by_case.items():
        _show_missed(case, others_of(rows), ours_of(rows))


def _by_case(records: Sequence[Point]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for record in records:
        if "case" in record:
            found.setdefault(record["case"], []).append(record)
    return found


def _family(row: Point) -> str:
    return next(family for family in FAMILIES if row["way"].startswith(family))


def _at_front(row: Point, others: Sequence[Point]) -> bool:
    same = [one for one in others if _family(one) == _family(row) and one is not row]
    return not any(one["nbytes"] <= row["nbytes"] and one["worst"] <= row["worst"] for one in same)


def _line(row: Point, mine: Sequence[Point]) -> Point:
    best = _best(mine, row["nbytes"]) or {}
    return {
        **row,
        "bytes": f"{row['nbytes']:,}",
        "our bytes": f"{best['nbytes']:,}" if best else None,
        **{f"our {key}": best.get(key) for key in ("worst", "mean", "accuracy", "widths")},
        "met": "yes" if met(row, mine) else "in folders" if met(row, mine, FOLDERS) else "NO",
    }


def _columns(rows: Sequence[Point]) -> list[str]:
    each = ["worst", "mean", *(["accuracy"] if any("accuracy" in row for row in rows) else [])]
    return ["way", "bytes", *each, "our bytes", *(f"our {key}" for key in each), "our widths", "met"]


def _best(mine: Sequence[Point], nbytes: int) -> Point | None:
    return min((one for one in mine if one["nbytes"] <= nbytes), key=lambda one: one["worst"], default=None)


def _counts(case: str, rows: Sequence[Point]) -> Point:
    mine, others = ours_of(rows), others_of(rows)
    groups = {family: [row for row in others if _family(row) == family] for family in FAMILIES}
    found = {name: (sum(met(row, mine, FOLDERS) for row in group), len(group)) for name, group in groups.items()}
    found[ONE_FILE] = (sum(met(row, mine) for row in groups["SVD"]), len(groups["SVD"]))
    return {"case": case, **{name: f"{count} of {size}" if size else None for name, (count, size) in found.items()}}


def _show_missed(case: str, others: Sequence[Point], mine: Sequence[Point]) -> None:
    in_one_file = []
    for row in others:
        if not met(row, mine, FOLDERS):
            nbytes = row.get(FOLDERS, row["nbytes"])
            best = _best(mine, nbytes)
            ours = f"ours {best['worst']:.3g} in {best['nbytes']:,}" if best else "ours refuses"
            print(
                f"  not met: {case}: {row['way']}: {row['worst']:.3g} in {nbytes:,}; {ours}{_more(row, mine, nbytes)}"
            )
        elif not met(row, mine):
            in_one_file.append(row["way"])
    if in_one_file:
        print(f"  not met in one file: {case}: {'; '.join(in_one_file)}")


def _more(row: Point, mine: Sequence[Point], nbytes: int) -> str:
    enough = [one["nbytes"] for one in mine if _no_worse(one, row)]
    return f", no worse with {min(enough) / nbytes - 1:.1%} more bytes" if enough else ""


def _show_accuracy(rows: Sequence[Point], mine: Sequence[Point]) -> None:
    original = next((row["accuracy"] for row in rows if row["way"] == "original" and "accuracy" in row), None)
    for row in sorted(mine, key=lambda row: row["nbytes"]):
        if original is not None and "accuracy" in row:
            share = row["nbytes"] / row["factor_bytes"]
            print(f"  ours in {share:.1%} of the bytes keeps {row['accuracy'] / original:.1%} of the accuracy")


def draw(records: Sequence[Point], path: str) -> None:
    """Draw worst error over bytes, a panel a case; of every way what no other point of it beats."""
    import matplotlib.pyplot as plt

    by_case = _by_case(records)
    figure, axes = plt.subplots(-(-len(by_case) // 3), 3, figsize=(13, 3.4 * -(-len(by_case) // 3)), squeeze=False)
    for axis in axes.flat[len(by_case) :]:
        axis.set_axis_off()
    for axis, (case, rows) in zip(axes.flat, by_case.items(), strict=False):
        _draw_case(axis, others_of(rows), ours_of(rows))
        axis.set_title(case, fontsize=11)
    for axis in axes[-1]:
        axis.set_xlabel("kB on disk")
    for axis in axes[:, 0]:
        axis.set_ylabel("worst relative error on $dW$")
    handles = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(handles.values(), handles.keys(), ncols=len(handles), loc="lower center", frameon=False)
    figure.savefig(path)


def _draw_case(axis: Any, others: Sequence[Point], mine: Sequence[Point]) -> None:
    for family in FAMILIES:
        points = [(row["nbytes"] / 1e3, row["worst"]) for row in others if _family(row) == family]
        front = [(x, y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)]
        if front:
            axis.plot(*zip(*front, strict=True), label=family, **_STYLES[family])
    points = sorted((row["nbytes"] / 1e3, row["worst"]) for row in mine)
    front = [(x, y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)]
    if front:
        axis.plot(*zip(*front, strict=True), label=OURS, color="black", marker="o", ms=3.5, lw=1.8, zorder=5)
    axis.set(xscale="log", yscale="log", ylim=(3e-8, 2))
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)

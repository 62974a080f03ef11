"""What ``benches/fidelity.py`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _bench import table

Point = dict[str, Any]
OURS = "loraspan"
FAMILIES = ("SVD", "vlora", "lorashare", "random basis", "mean")
FOLDERS, ONE_FILE = "folders", "SVD in one file"
# Both are then as good as float32 holds: what is left is the rounding of the last bits.
EXACT = 1e-6


def met(other: Point, mine: Sequence[Point], key: str = "nbytes") -> bool:
    """Say whether a point of ours has no more bytes and no more worst error; ``key``: which bytes, if it has those."""
    return any(one["nbytes"] <= other.get(key, other["nbytes"]) and _no_worse(one, other) for one in mine)


def _no_worse(ours: Point, other: Point) -> bool:
    return bool(ours["worst"] <= max(other["worst"], EXACT))


def is_open(other: Point, rows: Sequence[Point], key: str = "nbytes") -> bool:
    """Say whether loraspan has not been asked for a point's bytes yet, and no other point of ours meets it."""
    asked = {row.get("asked") for row in rows}
    return not met(other, ours_of(rows), key) and other.get(key, other["nbytes"]) not in asked


def ours_of(rows: Sequence[Point]) -> list[Point]:
    """Give our points."""
    return [row for row in rows if row["way"] == OURS and "nbytes" in row]


def others_of(rows: Sequence[Point]) -> list[Point]:
    """Give everyone else's points, those of the fewest bytes first."""
    found = [row for row in rows if row["way"] not in (OURS, "original") and "nbytes" in row]
    return sorted(found, key=lambda row: row["nbytes"])


def show(records: Sequence[Point]) -> None:
    """Print every way's points that no other of it beats, with the best of ours in as many bytes; how many are met."""
    by_case = by_case_of(records)
    for case, rows in by_case.items():
        mine, others = ours_of(rows), others_of(rows)
        print(f"\n{case}: {rows[0]['adapters']} adapters, {rows[0]['factor_bytes']:,} bytes of factors in float32")
        print(table([_line(row, rows) for row in others if _at_front(row, others)], _columns(rows)))
        for row in rows:
            if "refused" in row:
                print(f"  {row['way']}{' at ' + str(row['asked']) if 'asked' in row else ''} refuses: {row['refused']}")
        _show_accuracy(rows, mine)
    print("\npoints that one of ours meets with no more bytes and no more worst error, of all")
    print(table([_counts(case, rows) for case, rows in by_case.items()], ("case", *FAMILIES, ONE_FILE)))
    for case, rows in by_case.items():
        _show_missed(case, rows)


def by_case_of(records: Sequence[Point]) -> dict[str, list[Point]]:
    """Give the points of every case."""
    found: dict[str, list[Point]] = {}
    for record in records:
        if "case" in record:
            found.setdefault(record["case"], []).append(record)
    return found


def family_of(row: Point) -> str:
    """Say whose point it is."""
    return next(family for family in FAMILIES if row["way"].startswith(family))


def _at_front(row: Point, others: Sequence[Point]) -> bool:
    same = [one for one in others if family_of(one) == family_of(row) and one is not row]
    return not any(one["nbytes"] <= row["nbytes"] and one["worst"] <= row["worst"] for one in same)


def _line(row: Point, rows: Sequence[Point]) -> Point:
    mine = ours_of(rows)
    no = "not asked yet" if is_open(row, rows) else "NO"
    best = _best(mine, row["nbytes"]) or {}
    return {
        **row,
        "bytes": f"{row['nbytes']:,}",
        "our bytes": f"{best['nbytes']:,}" if best else None,
        **{f"our {key}": best.get(key) for key in ("worst", "mean", "accuracy", "widths")},
        "met": "yes" if met(row, mine) else "in folders" if met(row, mine, FOLDERS) else no,
    }


def _columns(rows: Sequence[Point]) -> list[str]:
    each = ["worst", "mean", *(["accuracy"] if any("accuracy" in row for row in rows) else [])]
    return ["way", "bytes", *each, "our bytes", *(f"our {key}" for key in each), "our widths", "met"]


def _best(mine: Sequence[Point], nbytes: int) -> Point | None:
    return min((one for one in mine if one["nbytes"] <= nbytes), key=lambda one: one["worst"], default=None)


def _counts(case: str, rows: Sequence[Point]) -> Point:
    mine, others = ours_of(rows), others_of(rows)
    groups = {family: [row for row in others if family_of(row) == family] for family in FAMILIES}
    judged = [(name, group, FOLDERS) for name, group in groups.items()] + [(ONE_FILE, groups["SVD"], "nbytes")]
    counts: Point = {"case": case}
    for name, group, key in judged:
        met_of = sum(met(row, mine, key) for row in group)
        open_of = sum(is_open(row, rows, key) for row in group)
        counts[name] = f"{met_of} of {len(group)}" if group else None
        counts[name] = f"{counts[name]}, {open_of} open" if open_of else counts[name]
    return counts


def _show_missed(case: str, rows: Sequence[Point]) -> None:
    mine, in_one_file = ours_of(rows), []
    for row in others_of(rows):
        if not met(row, mine, FOLDERS) and not is_open(row, rows, FOLDERS):
            nbytes = row.get(FOLDERS, row["nbytes"])
            best = _best(mine, nbytes)
            ours = f"ours {best['worst']:.4g} in {best['nbytes']:,}" if best else "ours refuses"
            print(
                f"  not met: {case}: {row['way']}: {row['worst']:.4g} in {nbytes:,}; {ours}{_more(row, mine, nbytes)}"
            )
        elif not met(row, mine) and not is_open(row, rows):
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

"""The tables of ``benches/compress.py``, and whether its goals are met."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
# how much slower per byte the largest collection may be before it counts as more than linear: the runs' own spread
SPREAD = 1.05


def show_table(records: list[Record]) -> None:
    """Print one line per contender, dtype and size, with our share of its time, memory and bytes."""
    rows = [record for record in records if record["bench"] == "compress"]
    if not rows:
        return
    head = ["contender", "data", "load", "fit", "save", "in all, s (range)", "x ours", "MB", "x ours", "disk MB"]
    print("{:<11}{:<9}{:>7}{:>8}{:>7}{:>23}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}".format(*head, "worst", "mean"))
    for row in rows:
        ours = _find(records, "loraspan", row["dtype"], row["adapters"])
        stages = [row["stages"].get(stage, 0.0) for stage in ("load", "fit", "save")]
        times = f"{row['total']:.3f} ({min(row['totals']):.2f}-{max(row['totals']):.2f})"
        slower = f"{row['total'] / ours['total']:.1f}" if ours else "-"
        bigger = f"{row['memory'] / ours['memory']:.1f}" if ours and ours["memory"] else "-"
        print(
            f"{row['contender']:<11}{row['dtype'] + ' ' + str(row['adapters']):<9}"
            f"{stages[0]:7.2f}{stages[1]:8.2f}{stages[2]:7.2f}{times:>23}{slower:>8}"
            f"{row['memory'] / 1e6:8.0f}{bigger:>8}{row['disk'] / 1e6:9.1f}{row['worst']:8.4f}{row['mean']:8.4f}"
        )


def show_inside(records: list[Record]) -> None:
    """Print what our own time goes to."""
    for record in records:
        if record["bench"] != "compress inside":
            continue
        seconds = dict(record["seconds"])
        total = seconds.pop("in all")
        seconds["everything else"] = total - sum(seconds.values())
        print(f"\ninside loraspan, {record['dtype']}, {record['adapters']} adapters, slot after slot: {total:.3f} s")
        for label, took in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"  {label:<28} {took:7.3f} s {took / total:6.1%}")
        passes = sum(took for label, took in seconds.items() if label.startswith(("pass", "top-k")))
        print(f"  passes and top-k together    {passes:7.3f} s {passes / total:6.1%}")


def show_scaling(records: list[Record]) -> None:
    """Print our time per byte over the number of adapters."""
    rows = _scaling(records)
    if len(rows) > 1:
        print("\nadapters     MB       s   ns per byte   against the fewest")
        for row in rows:
            each, first = row["total"] / row["source_bytes"], rows[0]["total"] / rows[0]["source_bytes"]
            print(
                f"{row['adapters']:8d} {row['source_bytes'] / 1e6:6.0f} {row['total']:7.3f} "
                f"{1e9 * each:13.3f} {each / first:20.2f}"
            )


def show_goals(records: list[Record]) -> None:
    """Print every goal that the records can decide."""
    for index, (goal, got, met) in enumerate(_goals(records)):
        if not index:
            print()
        print(f"{'met   ' if met else 'MISSED'}  {goal}: {got}")


def _goals(records: list[Record]) -> Iterator[tuple[str, str, bool]]:
    ours = _find(records, "loraspan", "f32")
    if ours is None:
        return
    for name, times in (("vlora", 20.0), ("lorashare", 150.0), ("torch mock", 1.5)):
        peer = _find(records, name, "f32", ours["adapters"])
        if peer is None:
            continue
        faster = peer["total"] / ours["total"]
        yield f"at least {times:g} times faster than {name}", f"{faster:.1f} times", faster >= times
        if name == "torch mock":
            continue
        share = ours["memory"] / peer["memory"]
        yield f"anonymous memory at most a quarter of {name}'s", f"{share:.2f} of it", share <= 0.25
        got = f"{ours['worst']:.3f} in {ours['disk'] / 1e6:.1f} MB, {peer['worst']:.3f} in {peer['disk'] / 1e6:.1f} MB"
        met = ours["worst"] <= peer["worst"] and ours["disk"] <= peer["disk"]
        yield f"no larger dW error than {name}, in no more bytes", got, met
    for dtype in ("f16", "bf16"):
        half = _find(records, "loraspan", dtype, ours["adapters"])
        if half is not None:
            share = half["total"] / ours["total"]
            yield f"{dtype} not slower than f32", f"{share:.2f} of its time", share <= 1.0
    rows = _scaling(records)
    if len(rows) > 1:
        each = [row["total"] / row["source_bytes"] for row in rows]
        grown = max(later / earlier for earlier, later in itertools.pairwise(each))
        yield "time per byte does not grow with the number of adapters", f"at most {grown:.2f} a step", grown <= SPREAD


def _scaling(records: list[Record]) -> list[Record]:
    rows = [row for row in records if row["bench"] == "compress" and row["contender"] == "loraspan"]
    first = rows[0]["dtype"] if rows else ""
    by_count = {row["adapters"]: row for row in rows if row["dtype"] == first}
    return [by_count[count] for count in sorted(by_count)]


def _find(records: list[Record], name: str, dtype: str, adapters: int | None = None) -> Record | None:
    """Give the last record of a contender: a file may hold several sessions."""
    return next(
        (
            row
            for row in reversed(records)
            if row["bench"] == "compress"
            and (row["contender"], row["dtype"]) == (name, dtype)
            and adapters in (None, row["adapters"])
        ),
        None,
    )

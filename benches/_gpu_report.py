"""What a run of ``benches/gpu.py`` has found: lines as they come, tables and a word on goals at the end."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from _bench import table
from loraspan.errors import BackendError

COLUMNS = ("operator", "case", "dtype", "precision", "backend", "status", "ms", "low", "high", "kernels ms", "graph ms")
Record = dict[str, object]


class Report:
    """The records of a run, each printed and written as it comes: a job that is stopped leaves what it has.

    Args:
        here: where the figures come from; part of every line.
        path: of the file of lines; None for none.
    """

    def __init__(self, here: Mapping[str, object], path: Path | None) -> None:
        self.here, self.path = dict(here), path
        self.records: list[Record] = []
        self.add({"operator": None, "status": "begun"})

    def add(self, record: Record) -> None:
        """Take a record."""
        record = {"bench": "gpu", **record}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a") as lines:
                lines.write(json.dumps(record | self.here) + "\n")

    def guarded(self, name: Record, make: Callable[[], Sequence[Record]]) -> None:
        """Take what ``make`` gives, or why it gives nothing: the rest goes on."""
        try:
            records = make()
        except BackendError as refusal:
            records = [name | {"status": "refused", "reason": reason_of(refusal)}]
        except torch.cuda.OutOfMemoryError as error:
            records = [name | {"status": "too large", "reason": str(error).splitlines()[0]}]
            torch.cuda.empty_cache()
        except Exception as error:
            # one kernel that fails is a finding, and no reason to lose the figures of the others
            traceback.print_exc()
            records = [name | {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}]
        for record in records:
            self.add(record)
            print(line_of(record), flush=True)

    @property
    def failed(self) -> list[Record]:
        """The records of wrong answers and of what failed."""
        return [record for record in self.records if record["status"] in ("wrong", "failed")]

    def show(self, operators: Sequence[str]) -> None:
        """Print a table for each operator, and what it comes to."""
        for operator in operators:
            rows = [r for r in self.records if r["operator"] == operator and "case" in r]
            against = dict.fromkeys(key for row in rows for key in row if "x " in key or key.startswith("times "))
            wanted = (*COLUMNS, "floor ms", "share", "share of call", *against, "dW error", "goals", "reason")
            if rows:
                print("\n" + table(rows, [c for c in wanted if any(row.get(c) is not None for row in rows)]))
        self._show_goals()
        if self.here["device"] == "cpu":
            print("\nAll of this ran on the CPU and says nothing of any GPU.")
        for record in self.failed:
            print(f"NOT RIGHT: {line_of(record)}")
        if self.path is not None:
            print(f"lines: {self.path}")

    def _show_goals(self) -> None:
        asked = [part for r in self.records for part in str(r.get("goals") or "").split("; ") if part]
        if asked:
            print(f"\n{sum(part.endswith(': met') for part in asked)} of {len(asked)} goals met")
        if any(r.get("share is of") == "calls" for r in self.records) and self.here["device"] != "cpu":
            print("the profiler told no times of kernels: some shares are of whole calls, launches and copies included")


def reason_of(refusal: BackendError) -> str:
    """Give what a backend says when it refuses."""
    return str(refusal).rpartition("refuses this call: ")[2]


def line_of(record: Record) -> str:
    """Give a record in a line."""
    first = [record.get(key) for key in ("operator", "case", "dtype", "precision", "backend", "status")]
    took = f"{record['ms']:.4g} ms" if "ms" in record else None
    return ", ".join(str(part) for part in (*first, took, record.get("reason"), record.get("goals")) if part)

"""Time the operators beside the expressions that a torch user would write, as shares of the machine's own ceilings.

    python benches/ops.py [--only gram,sketch] [--rounds 9] [--json FILE]

Every answer is checked against float64 before it is timed. Candidates take turns, and each turn takes another copy of
the operands, together twice the last cache, so that figures are cold. ``share`` is of the multiply-add ceiling,
``roof`` of what the ceiling and the memory traffic (each operand once) allow together; both ceilings are measured in
the same run. ``gram`` counts R (R + 1) D operations, ``sketch`` 2 R D l, ``power`` and ``combine`` 4 R D l (and
k (k + 1) D), ``reconstruct`` 2 m k p.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator

import torch

import _ops_cases as cases
from _bench import interleave, machine, table, write_lines
from roofline import Ceilings, measure


def run_case(case: cases.Case, limits: Ceilings, rounds: int) -> dict[str, object]:
    """Check a case, time it, and say what it comes to."""
    excess = case.excess()
    if not excess <= 1:
        raise SystemExit(f"{case.name}: {excess:.2f} times the error it may have; not timed")
    timings = interleave({"ours": case.ours, **case.theirs}, rounds)
    ours = timings["ours"]
    ceiling = limits.f64 if case.precision == "f64" else limits.f32
    roof = max(
        case.operations / ceiling,
        case.bytes_read / limits.read,
        case.bytes_written / max(limits.write, limits.stream),
    )
    record: dict[str, object] = {
        "bench": "ops",
        "case": case.name,
        "dtype": case.dtype,
        "precision": case.precision,
        "state": "cold",
        "ms": ours.median * 1e3,
        "low": ours.low * 1e3,
        "high": ours.high * 1e3,
        "gflops": case.operations / ours.median / 1e9,
        "share": case.operations / ours.median / 1e9 / ceiling,
        "roof": roof / 1e9 / ours.median,
        "error": excess,
    }
    for name, timing in timings.items():
        if name != "ours":
            record[f"x {name}"] = timing.median / ours.median
    record["goals"] = "; ".join(_goals(case, record, limits)) or "-"
    return record


def _goals(case: cases.Case, record: dict[str, object], limits: Ceilings) -> Iterator[str]:
    """Say for every goal of a case whether it is met, and by how much it is missed."""
    for figure, least in case.goals.items():
        if figure == "write or ceiling":
            # half the ceiling or 60 % of the write bandwidth, whichever takes longer
            allowed = max(
                case.operations / (0.5 * limits.f32), case.bytes_written / (0.6 * max(limits.write, limits.stream))
            )
            reached = allowed / 1e6 / float(str(record["ms"]))
            least = 1.0
        else:
            reached = float(str(record[figure]))
        yield f"{figure} >= {least:g}: {'met' if reached >= least else f'missed, {reached:.2f}'}"


def main() -> None:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gram,sketch,power,combine,reconstruct", help="operators, by commas")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write JSON lines here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    limits = measure(options.threads)
    here = machine()
    print(json.dumps({"bench": "roofline", **limits._asdict(), **here}))
    records = []
    makers: dict[str, Callable[[], Iterator[cases.Case]]] = cases.MAKERS
    for operator in options.only.split(","):
        for case in makers[operator]():
            record = run_case(case, limits, options.rounds)
            records.append(record | here)
            print(json.dumps(records[-1]), flush=True)
        mine = [r for r in records if str(r["case"]).startswith(operator)]
        ratios = list(dict.fromkeys(key for r in mine for key in r if key.startswith("x ")))
        columns = ["case", "dtype", "precision", "ms", "low", "high", "gflops", "share", "roof", *ratios, "goals"]
        print(table(mine, columns), flush=True)
    write_lines(options.json, [{"bench": "roofline", **limits._asdict(), **here}, *records])


if __name__ == "__main__":
    main()

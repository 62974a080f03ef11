"""Test the operators on a GPU and time them there, beside what the card can do at most and what torch does.

    bash benches/gpu.sh [--out FOLDER] [--only gram,shared_lora] [--rounds 15] [--no-tests]
    bash benches/gpu.sh --small --device cpu

``benches/README.md`` says what the figures mean. Ends with 1 on a wrong answer or a failed test, with 2 if there is no
GPU. ``--small`` is for seeing that the script works: its figures are of no use.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch

import _gpu_cases
import _gpu_shared_lora
import _gpu_whole
from _gpu_device import Clock, ceilings, clock_of, facts, missing
from _gpu_report import Record, Report
from _gpu_runs import case_records, shared_lora_records
from loraspan.ops import Cores, combine, gram, power, reconstruct, shared_lora, sketch

ROOT = Path(__file__).resolve().parents[1]
OPERATORS = ("gram", "combine", "sketch", "power", "reconstruct", "shared_lora")
WHOLE = ("randomized_svd", "compress")


def run_tests(device: str) -> list[Record]:
    """Run the operators' tests on the device, on all cores if pytest-xdist is there; without one, the tables' tests."""
    record: Record = {"operator": "tests", "case": "tests/ops"}
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        reason = "pytest or hypothesis is missing: pip install 'loraspan[test]'"
        return [record | {"status": "not run", "reason": reason}]
    on_gpu = device == "cuda"
    chosen = ["tests/ops", "-k", "cuda or triton"] if on_gpu else ["tests/ops/test_backends.py"]
    with tempfile.TemporaryDirectory() as made:
        listing = Path(made) / "tests.xml"
        # reasons of skips are told below, each once
        options = ["-q", "-rfE", "-p", "no:cacheprovider", f"--junitxml={listing}"]
        if on_gpu and importlib.util.find_spec("xdist") is not None:
            # most of the time goes into compiling Triton's kernels, each on one core
            options += ["-n", str(min(torch.get_num_threads(), 16)), "--dist", "worksteal"]
        command = [sys.executable, "-m", "pytest", *options, *chosen]
        status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
        cases = list(ElementTree.parse(listing).iter("testcase")) if listing.exists() else []
    skips = Counter(re.sub(r"^\w+: ", "", skip.get("message", "")) for case in cases for skip in case.iter("skipped"))
    for reason, count in skips.most_common():
        print(f"{count} tests skipped: {reason}")
    record |= {"case": " ".join(chosen), "skipped": sum(skips.values()), "passed": len(cases) - sum(skips.values())}
    if status:
        return [record | {"status": "failed", "reason": f"pytest ends with {status}; see above", "passed": None}]
    if not record["passed"]:
        return [record | {"status": "not run", "reason": "every test was skipped: no backend runs on this device"}]
    return [record | {"status": "passed", "reason": f"{record['passed']} passed, {record['skipped']} skipped"}]


def able(clock: Clock, report: Report) -> dict[str, list[str]]:
    """Give the backends of each operator that take a small call on the device; the others say why not."""
    x, q = torch.ones(3, 4, device=clock.device), torch.ones(3, 1, dtype=torch.float64)
    none, tasks = x[:0], torch.zeros(3, dtype=torch.int64, device=clock.device)
    cores = Cores.of([(1, 0, 0, 0)], none.new_ones(1), x[:1, :1], none, x[:1, :1], none)
    calls: dict[str, Callable[[str], object]] = {
        "gram": lambda name: gram(x, backend=name),
        "combine": lambda name: combine(x, q, backend=name),
        "sketch": lambda name: sketch(x, 2, backend=name),
        "power": lambda name: power(x, q, backend=name),
        "reconstruct": lambda name: reconstruct(x, x.T, backend=name),
        "shared_lora": lambda name: shared_lora(x, x, x[0, :, None], x[0, :, None], cores, tasks, backend=name),
    }
    found: dict[str, list[str]] = {}
    for operator in OPERATORS:
        for name in clock.backends:
            record: Record = {"operator": operator, "backend": name}

            def probe(operator: str = operator, name: str = name, record: Record = record) -> list[Record]:
                calls[operator](name)
                clock.wait()
                return [record | {"status": "runs"}]

            report.guarded(record, probe)
        mine = [r for r in report.records if r["operator"] == operator and r["status"] == "runs"]
        found[operator] = [str(r["backend"]) for r in mine]
    return found


def measure(report: Report, clock: Clock, options: argparse.Namespace) -> None:
    """Run the benches that are asked for."""
    rounds, small = options.rounds, options.small
    copied, size = (4 << 20, 256) if small else (1 << 30, 8192)
    limits = ceilings(clock, copied, size, rounds)
    report.add({"operator": "ceilings", "status": "measured", "clock": clock.name, "rates": limits})
    rates = [f"{kind} {rate / 1e12:.4g} Tflop/s" for kind, rate in limits.items() if kind != "copy"]
    print(", ".join(["measured here: copy " + f"{limits['copy'] / 1e9:.4g} GB/s", *rates]))
    runs = able(clock, report)
    sizes = _gpu_cases.SMALL if small else _gpu_cases.FULL
    for operator in [name for name in OPERATORS if name in options.only and runs[name]]:
        if operator == "shared_lora":
            for batch in _gpu_shared_lora.batches(small):
                name: Record = {"operator": operator, "case": batch.shape, "dtype": batch.dtype}
                report.guarded(name, partial(shared_lora_records, batch, runs[operator], clock, limits, rounds))
            continue
        for case, build in _gpu_cases.plans(operator, sizes, clock.device):
            make = partial(case_records, build, runs[operator], clock, limits, rounds)
            report.guarded({"operator": operator, "case": case}, make)
    few = min(rounds, 5)
    if "randomized_svd" in options.only:
        for stack in _gpu_whole.STACKS[small]:
            name = {"operator": "randomized_svd", "case": str(tuple(stack))}
            report.guarded(name, partial(_gpu_whole.svd_records, stack, clock, few))
    if "compress" in options.only:
        make = partial(_gpu_whole.compress_records, _gpu_whole.ADAPTERS[small], clock, few)
        report.guarded({"operator": "compress"}, make)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = "CUDA_VISIBLE_DEVICES chooses among several GPUs"
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=chosen)
    parser.add_argument("--small", action="store_true", help="tiny shapes, no use but to see that all of it runs")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the JSON lines (benches/results; none if small)")
    parser.add_argument("--only", default=",".join((*OPERATORS, *WHOLE)), help="what to bench, by commas")
    parser.add_argument("--rounds", type=int, help="15, or 2 if small")
    parser.add_argument("--no-tests", action="store_true", help="benches alone")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu goes with --small; benches/ops.py is what measures a CPU")
    options.only = options.only.split(",")
    if unknown := set(options.only) - {*OPERATORS, *WHOLE}:
        parser.error(f"--only is of {', '.join((*OPERATORS, *WHOLE))}; got {', '.join(sorted(unknown))}")
    options.rounds = options.rounds or (2 if options.small else 15)
    return options


def _path(options: argparse.Namespace, here: Record) -> Path | None:
    """Give the file of lines, by the card (or the CPU) and the date."""
    if options.out is None and options.small:
        return None
    folder = options.out or ROOT / "benches" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{here['card']}" if here["card"] else f"cpu-{here['cpu']}"
    return Path(folder, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + f"-{here['date']}.jsonl").resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of it; give the exit code."""
    options = _options(arguments)
    if (reason := missing(options.device)) is not None:
        print(f"gpu.sh: {reason}", file=sys.stderr)
        return 2
    if options.device == "cpu":
        # two threads of tiny work wait for each other where others are at work
        torch.set_num_threads(1)
    here = facts(options.device)
    print("\n".join(f"{key:<18}{value}" for key, value in here.items()), flush=True)
    report = Report(here, _path(options, here))
    if not options.no_tests:
        report.guarded({"operator": "tests"}, partial(run_tests, options.device))
    with torch.no_grad():
        measure(report, clock_of(options.device), options)
    report.show(options.only)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())

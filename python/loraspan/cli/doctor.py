"""``loraspan doctor``: what this machine runs, and why the rest refuses."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from loraspan import _native, ops
from loraspan._dispatch import Backend
from loraspan.cli.output import add_row, put, put_json, table
from loraspan.errors import BackendError

Probe = Callable[[str, str], Tensor]

_REQUIRED = ("loraspan", "torch", "numpy", "safetensors", "filelock", "click", "rich")
_OPTIONAL = {
    "scikit-learn": "pip install 'loraspan[demo]'",
    "matplotlib": "pip install 'loraspan[demo]'",
    "huggingface_hub": "pip install 'loraspan[hub]'",
    "triton": "pip install 'loraspan[gpu]'",
    "peft": "only for those who load the exported adapters",
}
_X = torch.linspace(-1, 1, 6 * 40, device="cpu").reshape(6, 40)
_W = torch.linspace(-1, 1, 6 * 3, dtype=torch.float64, device="cpu").reshape(6, 3)


def _shared_lora(backend: str, device: str) -> Tensor:
    ends, none = _W.float().T.contiguous().to(device), torch.empty(0, 1, device=device)
    cores = ops.Cores.of([(3, 0, 0, 0)], ends[:, 0].abs(), ends, none, ends, none)
    x, basis, tasks = _X.to(device), _X.T.contiguous().to(device), torch.tensor([0, -1, 0, 0, -1, 0], device=device)
    return ops.shared_lora(x, x, basis, basis, cores, tasks, backend=backend)


# operator -> the module of its table, the table, and a small call of a backend on a device; its answer is compared with
# the reference
_PROBES: dict[str, tuple[str, str, Probe]] = {
    "gram": ("gram", "BACKENDS", lambda backend, at: ops.gram(_X.to(at), backend=backend)),
    "sketch": ("sketch", "BACKENDS", lambda backend, at: ops.sketch(_X.to(at), 3, seed=7, backend=backend)),
    "power": ("sketch", "POWER_BACKENDS", lambda backend, at: ops.power(_X.to(at), _W, backend=backend)),
    "combine": ("combine", "BACKENDS", lambda backend, at: ops.combine(_X.to(at), _W, backend=backend).xv),
    "reconstruct": (
        "reconstruct",
        "BACKENDS",
        lambda backend, at: ops.reconstruct(_X.T.to(at), _W.to(at), backend=backend),
    ),
    "shared_lora": ("shared_lora", "BACKENDS", _shared_lora),
}
# the backends that want tensors on a GPU, where there is one
_ON_A_GPU = ("cuda", "triton")
_RUNS = "runs"
# float32 sums of 40 products of numbers up to 1
_TOLERANCE = 1e-4


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine runs: versions, threads, instruction sets, and each operator's backends.

    Every backend gets a small call, and its answer is compared with that of plain torch. Where a backend refuses, its
    reason is printed. Exits with 1 if a backend gives a wrong answer.

    \b
    Examples:
      loraspan doctor
      loraspan doctor --json
    """
    report = examine()
    if as_json:
        put_json(report)
    else:
        _put_report(report)
    ctx.exit(1 if any(not row["well"] for row in report["backends"]) else 0)


def examine() -> dict[str, Any]:
    """Give all that ``doctor`` prints, as plain values."""
    sets = [{"name": name, "built": built, "supported": can} for name, built, can in _native.INSTRUCTION_SETS]
    return {
        "versions": {name: _version(name) for name in _REQUIRED},
        "optional": {name: _version(name) for name in _OPTIONAL},
        "platform": {"python": platform.python_version(), "system": platform.platform(), "machine": platform.machine()},
        "threads": {"torch": _native.threads(), "openmp_libraries": _openmp_libraries()},
        "devices": _devices(),
        "instruction_sets": sets,
        "widest": _native.BEST,
        "backends": [row for operator in _PROBES for row in _operator(operator)],
    }


def _operator(operator: str) -> list[dict[str, Any]]:
    module, attribute, probe = _PROBES[operator]
    backends: Sequence[Backend[Any]] = getattr(importlib.import_module(f"loraspan.ops.{module}"), attribute)
    want = probe("reference", "cpu")
    rows = []
    for backend in backends:
        try:
            at = "cuda" if backend.name in _ON_A_GPU and torch.cuda.is_available() else "cpu"
            wrong = float((probe(backend.name, at).cpu() - want).abs().max())
        except BackendError as refusal:
            rows.append({"operator": operator, "backend": backend.name, "well": True, "says": _reason(str(refusal))})
        else:
            well = wrong <= _TOLERANCE
            says = _RUNS if well else f"is off by {wrong:.3g} from the reference"
            rows.append({"operator": operator, "backend": backend.name, "well": well, "says": says})
    return rows


def _reason(refusal: str) -> str:
    return "refuses: " + refusal.rpartition("refuses this call: ")[2]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _openmp_libraries() -> list[str] | None:
    """Give the OpenMP libraries in this process; more than one means two pools. None where that cannot be read."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if "omp" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _devices() -> list[str]:
    found = ["cpu"]
    found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _put_report(report: dict[str, Any]) -> None:
    for name, found in report["versions"].items():
        put(f"{name:<16}{found}")
    for name, found in report["optional"].items():
        put(f"{name:<16}{found or 'not installed: ' + _OPTIONAL[name]}")
    put(f"{'python':<16}{report['platform']['python']} on {report['platform']['system']}")
    put(f"{'threads':<16}{report['threads']['torch']}, torch's: torch.set_num_threads changes them here too")
    for path in report["threads"]["openmp_libraries"] or []:
        put(f"{'OpenMP':<16}{path}")
    put(f"{'torch sees':<16}{', '.join(report['devices'])}")
    sets = table("instruction set", "in this build", "in this processor", "")
    for isa in report["instruction_sets"]:
        used = "used where no other is named" if isa["name"] == report["widest"] else ""
        add_row(sets, isa["name"], "yes" if isa["built"] else "no", "yes" if isa["supported"] else "no", used)
    put(sets)
    put(_backend_table(report["backends"]))


def _backend_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Give a table with one row per backend and what it says, and the operators that this holds for."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    started: set[str] = set()
    for row in rows:
        says = row["says"]
        if says == _RUNS and row["operator"] not in started:
            started.add(row["operator"])
            says = f"{_RUNS}, the default"
        found.setdefault((row["backend"], says, row["well"]), []).append(row["operator"])
    made = table("backend", "", "operators")
    for (backend, says, well), operators in found.items():
        style = "red" if not well else "bold" if "default" in says else None if says == _RUNS else "dim"
        add_row(made, backend, says, ", ".join(operators), style=style)
    return made

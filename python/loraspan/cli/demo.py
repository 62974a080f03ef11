"""``loraspan demo``: twenty-four small adapters, really trained, through everything."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch
from rich.table import Table

from loraspan import subspace
from loraspan.cli.demo_compare import IMAGES, Family, Point
from loraspan.cli.demo_data import FAMILIES, TASKS, check_extra
from loraspan.cli.demo_picture import Curves, draw
from loraspan.cli.output import Report, add_row, bars, put, shown, size, table

WITHIN = (0.05, 0.15, 0.3, 0.5)
RANKS = (32, 16, 8)
# what the table by task shows, and is kept
HEADLINE = 0.15
# how often all tasks of a family are measured: every setting, a plain SVD beside it, the originals, the base model
_ROUNDS = 2 * (len(WITHIN) + len(RANKS)) + 2
# below this share of bytes or error, neither side wins
_NOTEWORTHY = 0.02

_ABOUT = {
    "shared-seed": "every lora_A started from the same seed",
    "own-seed": "the same tasks, each adapter with a seed of its own",
}


@click.command(short_help="Compress 24 small trained adapters and show what it costs.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("loraspan-demo"),
    show_default=True,
    help="Where to write the stores and the picture.",
)
def demo(out: Path) -> None:
    """Compress 24 small trained adapters and show what it costs: bytes, error on dW, accuracy.

    A tiny transformer reads scikit-learn's 8 x 8 digits; twelve LoRA adapters teach it tasks that it cannot do, once
    with one initialisation seed for all and once with a seed for each. Needs the extra loraspan[demo].

    \b
    Examples:
      loraspan demo
      loraspan demo -o /tmp/demo
    """
    check_extra()
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with bars() as progress:
        count = _Count(progress, _ROUNDS * len(TASKS) * len(FAMILIES))
        families = {name: Family(name, count) for name in FAMILIES}
        curves = _measure_all(families, out)
    picture = out / "demo.png"
    draw(curves, picture)
    _put_introduction()
    for name, family in families.items():
        _put_family(family, curves[name], out)
    _put_ending(out, picture, time.perf_counter() - start)


class _Count:
    """Counts measurements for the bar."""

    def __init__(self, progress: Report, total: int) -> None:
        self._progress, self._total, self._done = progress, total, itertools.count(1)

    def __call__(self) -> None:
        self._progress("measuring", next(self._done), self._total)


def _measure_all(families: Mapping[str, Family], out: Path) -> dict[str, Curves]:
    """Measure the families side by side, a thread each: their matrices are too small to be worth sharing out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(families)) as pool:
            found = pool.map(lambda family: _measure(family, out), families.values())
            return dict(zip(families, found, strict=True))
    finally:
        torch.set_num_threads(threads)


def _measure(family: Family, out: Path) -> Curves:
    within = []
    for error in WITHIN:
        space, point = family.compress(max_error=error)
        within.append(point)
        if error == HEADLINE:
            space.save(_store(out, family.name), overwrite=True)
    shared = [family.compress(rank=rank)[1] for rank in RANKS]
    plain_within = [family.plain(point.nbytes) for point in within]
    plain_shared = [family.plain(point.nbytes) for point in shared]
    return Curves(family.original(), family.base(), within, shared, plain_within, plain_shared)


def _store(out: Path, name: str) -> Path:
    return out / f"{name}.span"


def _put_introduction() -> None:
    put(
        f"Twelve tasks on scikit-learn's digits, each a LoRA adapter that was really trained, in float16.\n"
        f"Stored in float16 (--dtype f16). Beside it, SVD: every adapter's own truncated SVD in float16, ranks chosen\n"
        f"freely per module, all adapters together in the same bytes.\n"
        f"Bytes: of bases and factors, the bases in equal parts. Error: |dW - dW'| / |dW|.\n"
        f"Accuracy: on {IMAGES} test images; base: with the task's head and no dW.\n"
    )


def _put_family(family: Family, curves: Curves, out: Path) -> None:
    put(_task_table(family, curves))
    put(_setting_table(curves))
    at = WITHIN.index(HEADLINE)
    stored = subspace.open(_store(out, family.name)).nbytes
    put(f"{family.name}, on disk, all counted: {size(family.file_nbytes)} of PEFT folders became {size(stored)}.")
    put(f"--max-error {HEADLINE:g}: {_by_bytes(curves.within[at].nbytes, family.plain_nbytes(HEADLINE))}.")
    put(f"--rank shares everything; {_by_error(curves.shared, curves.plain_shared)}\n")


def _task_table(family: Family, curves: Curves) -> Table:
    at = WITHIN.index(HEADLINE)
    original, ours, plain = curves.original, curves.within[at], curves.plain_within[at]
    made = table(
        *("task", ">rank", ">bytes", ">stored", ">error", ">SVD", ">base", ">original", ">rebuilt", ">SVD"),
        title=f"{family.name}: {_ABOUT[family.name]} (--max-error {HEADLINE:g})",
    )
    for i, (task, adapter) in enumerate(family.adapters.items()):
        rank = max(slot.lora_rank for slot in adapter.slots.values())
        sizes = (f"{original.task_nbytes[i]:,.0f}", f"{ours.task_nbytes[i]:,.0f}")
        errors = [f"{point.errors[i]:.3f}" for point in (ours, plain)]
        accuracies = [f"{point.accuracies[i]:.3f}" for point in (curves.base, original, ours, plain)]
        add_row(made, task, str(rank), *sizes, *errors, *accuracies)
    made.add_section()
    sizes = (f"{original.nbytes:,}", f"{ours.nbytes:,}")
    errors = [f"{point.error:.3f}" for point in (ours, plain)]
    accuracies = [f"{point.accuracy:.3f}" for point in (curves.base, original, ours, plain)]
    add_row(made, "all, mean", "", *sizes, *errors, *accuracies, style="bold")
    return made


def _setting_table(curves: Curves) -> Table:
    made = table("setting", ">bytes", ">share", ">error", ">SVD", ">accuracy", ">SVD")
    pairs = [*zip(curves.within, curves.plain_within, strict=True)]
    pairs += [*zip(curves.shared, curves.plain_shared, strict=True)]
    for ours, plain in pairs:
        share = f"{ours.nbytes / curves.original.nbytes:.0%}"
        errors = (f"{ours.error:.3f}", f"{plain.error:.3f}")
        accuracies = (f"{ours.accuracy:.3f}", f"{plain.accuracy:.3f}")
        add_row(made, ours.setting, f"{ours.nbytes:,}", share, *errors, *accuracies)
    return made


def _by_bytes(ours: int, plain: int) -> str:
    """Say who needs fewer bytes for the same error."""
    saved = 1 - ours / plain
    if saved > _NOTEWORTHY:
        return f"{size(ours)}, where plain SVDs of that error take {size(plain)}: sharing saves {saved:.0%}"
    if saved < -_NOTEWORTHY:
        return f"{size(ours)}, where plain SVDs of that error take {size(plain)}: sharing loses {-saved:.0%}"
    return f"{size(ours)}, as much as plain SVDs of that error ({size(plain)}): there is little to share"


def _by_error(shared: Sequence[Point], plain: Sequence[Point]) -> str:
    """Say how sharing everything compares with plain SVDs of the same bytes."""
    lines = ["error beside plain SVDs of the same bytes"]
    for rank, ours, other in zip(RANKS, shared, plain, strict=True):
        ratio = ours.error / other.error
        verdict = "wins" if ratio < 1 - _NOTEWORTHY else "loses" if ratio > 1 + _NOTEWORTHY else "does as well"
        lines.append(f"  --rank {rank}: {ours.error:.2f} and {other.error:.2f}, sharing {verdict}")
    return "\n".join(lines)


def _put_ending(out: Path, picture: Path, seconds: float) -> None:
    stores = [_store(out, name) for name in FAMILIES]
    put(f"Wrote {shown(str(picture))}, {', '.join(shown(str(store)) for store in stores)} in {seconds:.1f} s. Next:")
    put(f"  loraspan info {stores[0]} --tasks")
    put(f"  loraspan export {stores[0]} {FAMILIES[0]}-parity -o restored")

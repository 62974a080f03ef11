"""``loraspan demo``: twenty-four small adapters, really trained, through everything."""

from __future__ import annotations

import time
from pathlib import Path

import click

from loraspan.cli.demo_compare import IMAGES, Family, Point
from loraspan.cli.demo_data import FAMILIES, TASKS, check_extra
from loraspan.cli.demo_picture import Curves, draw
from loraspan.cli.output import Report, add_row, bars, put, shown, size, table

HEADLINE = 0.3
FORCED = 16
WITHIN = (0.05, 0.15, HEADLINE, 0.45, 0.6)
RANKS = (32, FORCED, 8)
# how often all tasks of a family are measured: the three curves, original and base, two plain SVDs beside the tables
_ROUNDS = 2 * len(WITHIN) + len(RANKS) + 2 + 2
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
        found = {name: _run(Family(name, count), out) for name in FAMILIES}
    curves = {name: part for name, (part, _) in found.items()}
    picture = out / "demo.png"
    draw(curves, picture)
    _put_introduction()
    for name, (part, lines) in found.items():
        _put_family(name, part, lines)
    _put_ending(out, picture, time.perf_counter() - start)


class _Count:
    """Counts measurements for the bar."""

    def __init__(self, progress: Report, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress("measuring", self._done, self._total)


class _Lines:
    """What the tables of one family say beside its curves."""

    def __init__(self, family: Family, plain: Point, forced_plain: Point, disk_nbytes: int) -> None:
        self.ranks = [max(slot.lora_rank for slot in adapter.slots.values()) for adapter in family.adapters.values()]
        self.file_nbytes = family.file_nbytes
        self.plain, self.forced_plain, self.disk_nbytes = plain, forced_plain, disk_nbytes


def _run(family: Family, out: Path) -> tuple[Curves, _Lines]:
    within, disk_nbytes = [], 0
    for error in WITHIN:
        space, point = family.compress(max_error=error)
        within.append(point)
        if error == HEADLINE:
            space.save(out / f"{family.name}.span", overwrite=True)
            disk_nbytes = space.nbytes
    shared = [family.compress(rank=rank)[1] for rank in RANKS]
    plain = [family.plain(error) for error in WITHIN]
    curves = Curves(family.original(), family.base(), within, shared, plain)
    same_bytes = family.plain_of_bytes(within[WITHIN.index(HEADLINE)].nbytes)
    forced_plain = family.plain_of_bytes(shared[RANKS.index(FORCED)].nbytes)
    return curves, _Lines(family, same_bytes, forced_plain, disk_nbytes)


def _put_introduction() -> None:
    put(
        f"Twelve tasks on scikit-learn's digits, each a LoRA adapter that was really trained, in float16.\n"
        f"Stored with --max-error {HEADLINE:g} --dtype f16. SVD: every adapter's own truncated SVD in float16, ranks\n"
        f"chosen freely per module, all adapters together in the same bytes.\n"
        f"Bytes: of bases and factors, the bases in equal parts. Error: |dW - dW'| / |dW|.\n"
        f"Accuracy: on {IMAGES} test images; base: with the task's head and no dW.\n"
    )


def _put_family(name: str, curves: Curves, lines: _Lines) -> None:
    ours, original = curves.within[WITHIN.index(HEADLINE)], curves.original
    shown_table = table(
        "task", ">rank", ">bytes", ">stored", ">error", ">SVD", ">base", ">original", ">rebuilt", ">SVD",
        title=f"{name}: {_ABOUT[name]}",
    )  # fmt: skip
    for i, task in enumerate(TASKS):
        errors = [f"{point.errors[i]:.3f}" for point in (ours, lines.plain)]
        accuracies = [f"{p.accuracies[i]:.3f}" for p in (curves.base, original, ours, lines.plain)]
        sizes = (f"{original.task_nbytes[i]:,.0f}", f"{ours.task_nbytes[i]:,.0f}")
        add_row(shown_table, task, str(lines.ranks[i]), *sizes, *errors, *accuracies)
    errors = [f"{point.error:.3f}" for point in (ours, lines.plain)]
    accuracies = [f"{point.accuracy:.3f}" for point in (curves.base, original, ours, lines.plain)]
    shown_table.add_section()
    add_row(shown_table, "all", "", f"{original.nbytes:,}", f"{ours.nbytes:,}", *errors, *accuracies, style="bold")
    put(shown_table)
    for line in _verdicts(curves, lines):
        put(line)
    put("")


def _verdicts(curves: Curves, lines: _Lines) -> list[str]:
    """Say who wins: at the same error in bytes, and where everything has to be shared, at the same bytes in error."""
    at = WITHIN.index(HEADLINE)
    ours, plain = curves.within[at], curves.plain[at]
    saved = 1 - ours.nbytes / plain.nbytes
    if saved > _NOTEWORTHY:
        first = f"sharing saves {saved:.0%} against plain SVDs of that error ({size(plain.nbytes)})"
    elif saved >= -_NOTEWORTHY:
        first = f"as much as plain SVDs of that error ({size(plain.nbytes)}): there is little to share"
    else:
        first = f"{-saved:.0%} more than plain SVDs of that error ({size(plain.nbytes)}): sharing loses"
    forced = curves.shared[RANKS.index(FORCED)]
    ratio = forced.error / lines.forced_plain.error
    second = "sharing wins" if ratio < 1 - _NOTEWORTHY else "sharing loses" if ratio > 1 + _NOTEWORTHY else "a draw"
    return [
        f"On disk, all counted: {size(lines.file_nbytes)} of PEFT folders became {size(lines.disk_nbytes)}.",
        f"--max-error {HEADLINE:g}: {size(ours.nbytes)}, {first}.",
        f"--rank {FORCED} shares everything: {size(forced.nbytes)}, mean error {forced.error:.2f}, accuracy "
        f"{forced.accuracy:.3f}; plain SVDs of the same bytes {lines.forced_plain.error:.2f}, "
        f"{lines.forced_plain.accuracy:.3f}: {second}.",
    ]


def _put_ending(out: Path, picture: Path, seconds: float) -> None:
    stores = [out / f"{name}.span" for name in FAMILIES]
    put(f"Wrote {shown(str(picture))}, {', '.join(shown(str(store)) for store in stores)} in {seconds:.1f} s. Next:")
    put(f"  loraspan info {stores[0]} --tasks")
    put(f"  loraspan export {stores[0]} {FAMILIES[0]}-parity -o restored")

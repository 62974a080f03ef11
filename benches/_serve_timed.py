"""The timed parts of ``benches/serve.py``: adapters alone, whole models, and how cost grows with tasks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from _bench import Timing
from _gpu_cases import ROUNDOFF, U32, Goal, excess_of, worst_of
from _gpu_device import WARM_UP, Candidate, summary, take_turns
from _gpu_report import Record
from _serve_contenders import FEW, PEERS, Batch, Contender, Place, build, contenders, gathered, whole
from _serve_peers import told
from _serve_space import Layers, exact

OF_PEERS = (Goal("x PEFT", 8.0), Goal("x vlora", 50.0))
OF_BASE = (Goal("x base", 1.15, most=True),)
# what a row may be off, root mean square, in errors of the base model's worst row; 1.05 is the median of small models
SLACK = 2.0
# ours and the base model take up to so many times the rounds, for so many seconds
MORE, SECONDS = 4, 20.0


class Way(NamedTuple):
    """One way to run: who takes turns, and what each makes of the batch."""

    runs: dict[str, Candidate]
    answers: Mapping[str, Callable[[], Any]]


# how far who is off with an answer, as a multiple of the error it may have
Judge = Callable[[str, Any], float]


def adapter_records(size: int, layers: int, batch: Batch, at: Place, *, goals: Sequence[Goal] = ()) -> list[Record]:
    """Time layers whose base products are there already; give a record for each contender."""
    base = Layers(size, layers, at.clock.device, at.kind)
    xs = at.normal(layers, batch.rows, size)
    built = build(base, batch, at, PEERS if goals else ("PEFT",))
    found = contenders(built, xs, 1, batch)
    factors = [slot.factors(batch.ids, at.sizes.lora_rank) for slot in built.drawn.values()]
    if goals:
        found["gathered"] = gathered(base, xs, factors, at)

    def judge(_: str, answer: Any) -> float:
        parts = zip(base.layers, xs, answer, factors, strict=True)
        return worst_of(_excess(layer, x, out, a, b, at.dtype) for layer, x, out, (a, b) in parts)

    name: Record = {"case": f"{layers} x {size} x {size}, {batch}", "dtype": at.dtype, "layers": layers}
    name |= {"rows": batch.rows, "distinct": batch.distinct, "resident": batch.resident, "size": size}
    return [*built.left_out, *_timed(name, found, judge, at, goals)]


def model_records(
    shape: tuple[int, int, int],
    tokens: int,
    batch: Batch,
    at: Place,
    compiler: str | None,
    peers: Sequence[str] = PEERS,
) -> list[Record]:
    """Time a whole model beside itself without adapters; give a record for each contender."""
    built = whole(*shape, batch, at, peers)
    base, x = built.base, at.normal(batch.rows, tokens, shape[0])
    found = contenders(built, x, 0, batch)
    found["base"] = Contender(lambda: base(x))
    few = min(FEW, batch.rows)
    plain, ours = (exact(base, x[:few], built.drawn, tasks, at.sizes) for tasks in (None, batch.ids[:few]))
    allowed = SLACK * _worst_row(base(x)[:few].double() - plain)
    assert _worst_row(ours - plain) > 10 * allowed, "the tasks change too little to tell a wrong answer"

    def judge(who: str, answer: Any) -> float:
        return _worst_row(answer[:few].double() - (plain if who == "base" else ours)) / allowed

    case = f"{shape[2]} layers of {shape[0]}, {tokens} token{'s' * (tokens > 1)} each, {batch}"
    name: Record = {"case": case, "dtype": at.dtype, "tokens": tokens, "layers": shape[2], "size": shape[0]}
    return [*built.left_out, *_timed(name, found, judge, at, OF_BASE, compiler)]


def _worst_row(off: Tensor) -> float:
    """Give the largest root mean square of rows ``[B, ...]``; NaN if there is one."""
    return float(off.flatten(1).square().mean(1).sqrt().max())


def resident_records(size: int, series: Sequence[Batch], at: Place) -> list[Record]:
    """Time one layer with more and more tasks resident, and more and more of them in the batch."""
    return [record for batch in series for record in adapter_records(size, 1, batch, at)]


def _excess(layer: nn.Module, x: Tensor, out: Tensor, a: Tensor, b: Tensor, dtype: str) -> float:
    """Say how far the first rows of a layer are off, as a multiple of the bound; see ``_gpu_shared_lora.excess``."""
    x, a, b = (t[: len(out)].to(x.device).double() for t in (x, a, b))
    change = torch.einsum("tnr,tr->tn", b, torch.einsum("trd,td->tr", a, x))
    exact = layer(x).double() + change
    size = 6 * change.square().mean(dim=1, keepdim=True).sqrt()
    # float32 sums over d, both bases and the columns; bases and ends, or factors and what lies between, and the scaled
    # sum each rounded to the dtype
    unit = ROUNDOFF[dtype]
    error = ((x.shape[1] + 256) * U32 + 6 * unit) * size
    return excess_of(out, exact, error + unit * (exact.abs() + error) + 2.0**-25)


def _timed(
    name: Record,
    found: Mapping[str, Contender],
    judge: Judge,
    at: Place,
    goals: Sequence[Goal],
    compiler: str | None = None,
) -> list[Record]:
    """Time everyone, way by way; one that fails is a finding, and no reason to lose the others."""
    records: list[Record] = []
    theirs: dict[str, float] = {}
    for way, make in _ways(found, at, compiler).items():
        try:
            records += _timed_way(name | {"way": way}, found, make(), judge, at, goals, theirs)
        except Exception as error:
            traceback.print_exc()
            records.append(name | {"way": way, "backend": "loraspan", "status": "failed", "reason": told(error)})
        if not any(record["status"] == "timed" for record in records):
            break
    return records


def _timed_way(
    name: Record,
    found: Mapping[str, Contender],
    way: Way,
    judge: Judge,
    at: Place,
    goals: Sequence[Goal],
    theirs: dict[str, float],
) -> list[Record]:
    """Time who is right, in turns; give their records, and those of who is not."""
    excess: dict[str, float] = {}
    records: list[Record] = []
    for who, run in way.answers.items():
        try:
            excess[who] = judge(who, run())
        except Exception as error:
            traceback.print_exc()
            records.append(name | {"backend": who, "status": "failed", "reason": told(error)})
            continue
        if not excess[who] <= 1:
            reason = f"{excess[who]:.3g} times the error it may have"
            records.append(name | {"backend": who, "status": "wrong", "reason": reason})
    wrong = {record["backend"] for record in records}
    runs = {who: run for who, run in way.runs.items() if who not in wrong}
    if "loraspan" not in runs:
        return records
    taken, beside = _turns(runs, at)
    timings = {who: Timing(*(took / found[who].part for took in timing)) for who, timing in taken.items()}
    # those that cannot be captured stay what they are
    theirs |= {peer: timings[peer].median for peer in PEERS if peer in timings}
    for who, timing in timings.items():
        record = name | {"backend": who, "status": "timed", "error": excess.get(who)}
        record |= {"ms": timing.median, "low": timing.low, "high": timing.high}
        if "base" in timings:
            ratio = beside.get(who) or Timing(*[timing.median / timings["base"].median] * 3)
            record |= {"x base": ratio.median, "x base low": ratio.low, "x base high": ratio.high}
        if who == "loraspan":
            record |= {f"x {peer}": took / timing.median for peer, took in theirs.items()}
            judged = [goal.judge(float(str(record[goal.figure]))) for goal in goals if goal.figure in record]
            record["goals"] = "; ".join(judged) or None
        records.append(record)
    return records


def _turns(runs: Mapping[str, Candidate], at: Place) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Time everyone in turns, and give what ours took over the base model, if there is one.

    These two keep away from peers, who leave gigabytes behind for the next to wait for. They are compared within a
    round, where both met the same machine, and by turns one or the other comes first.
    """
    warm_up = WARM_UP if at.clock.device.type == "cuda" else 1
    near = [who for who in runs if who not in PEERS and "base" in runs]
    timings = take_turns(at.clock, {who: run for who, run in runs.items() if who not in near}, at.rounds, warm_up)
    took: dict[str, list[float]] = {who: [] for who in near}
    start, turn = time.monotonic(), 0
    while near and (turn < warm_up + at.rounds or (turn < MORE * at.rounds and time.monotonic() - start < SECONDS)):
        for who in near if turn % 2 else reversed(near):
            took[who].append(at.clock.timed(partial(runs[who], turn)))
        turn += 1
    timings |= {who: summary(values[warm_up:]) for who, values in took.items()}
    rounds = {who: zip(values[warm_up:], took["base"][warm_up:], strict=True) for who, values in took.items()}
    return timings, {who: summary([own / base for own, base in pairs]) for who, pairs in rounds.items()}


def _ways(found: Mapping[str, Contender], at: Place, compiler: str | None) -> dict[str, Callable[[], Way]]:
    """Give who runs as it is; inside CUDA graphs, as engines run, where there are any; compiled; and both."""
    taken = {who: one.run for who, one in found.items() if one.captured}
    compiled: dict[str, Callable[[], Any]] = {}

    def turns(runs: Mapping[str, Callable[[], Any]]) -> dict[str, Candidate]:
        return {who: lambda _, run=run: run() for who, run in runs.items()}

    def eager() -> Way:
        plain = {who: one.run for who, one in found.items()}
        return Way(turns(plain), plain)

    def graphs(runs: Mapping[str, Callable[[], Any]]) -> Way:
        # a replay hands nothing back: the part ``graphs`` looks into one
        replays = {who: at.clock.captured(run) for who, run in runs.items()}
        return Way(turns({who: replay for who, replay in replays.items() if replay is not None}), {})

    def whole() -> Way:
        compiled.update({who: torch.compile(run, fullgraph=True, backend=compiler) for who, run in taken.items()})
        return Way(turns(compiled), compiled)

    ways: dict[str, Callable[[], Way]] = {"eager": eager, "graph": lambda: graphs(taken)}
    if compiler is not None:
        ways |= {"compiled": whole, "compiled graph": lambda: graphs(compiled)}
    return ways

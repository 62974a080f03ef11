"""Time shared_lora beside PEFT's mixed batch, a loop over adapters and one plain LoRA for the whole batch.

    python benches/shared_lora.py [--rounds 15] [--size 4096] [--json FILE]

The base product is left out everywhere: PEFT's layer gets a base that hands back what it has. ``plain rank k`` is
``y += (x V) U^T`` in torch, the floor of the shared form: a product with both bases and nothing between them. ``loop``
is what one writes without PEFT, two products per distinct task over its rows, with factors that lie ready. Candidates
take turns, each turn with another copy of the rows. Answers are checked first, on all rows, against float64. At the
end, what a call costs beside its work: the smallest possible one, on one thread, without and with a gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from _bench import interleave, machine, table, write_lines
from loraspan.ops import Cores, shared_lora, shared_lora_

K, R = 64, 16
COPIES = 16
GOALS = {"PEFT": 8.0, "plain rank k": 1 / 1.25}
OVERHEAD_GOALS = {"no gradient": 12.0, "gradient": 30.0}


class Case(NamedTuple):
    """A batch of ``rows`` rows of ``distinct`` tasks, of ``resident`` in the table."""

    rows: int
    distinct: int
    resident: int
    dtype: torch.dtype


CASES = (
    Case(64, 64, 64, torch.float32),
    Case(64, 64, 64, torch.bfloat16),
    Case(64, 64, 1000, torch.float32),
    Case(64, 64, 10_000, torch.float32),
    Case(64, 16, 64, torch.float32),
    Case(64, 4, 64, torch.float32),
    Case(64, 1, 64, torch.float32),
    Case(1, 1, 64, torch.float32),
    Case(8, 8, 64, torch.float32),
    Case(1024, 64, 64, torch.float32),
    Case(1024, 2, 64, torch.float32),
)


class Data(NamedTuple):
    """Bases, tasks, rows in copies, and the factors ``a [D, R, d]``, ``b [D, n, R]`` of the tasks in the batch."""

    v: Tensor
    u: Tensor
    cores: Cores
    tasks: Tensor
    xs: list[Tensor]
    ys: list[Tensor]
    a: Tensor
    b: Tensor


def make(case: Case, size: int) -> Data:
    """Draw it; tasks of the batch are spread over the table and mixed over the rows."""
    rng = torch.Generator().manual_seed(20261122)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    v, u = (torch.linalg.qr(normal(size, K))[0].contiguous() for _ in range(2))
    left, right = normal(case.resident * R, K), normal(case.resident * R, K)
    none = torch.empty(0, size)
    counts = [(R, 0, 0, 0)] * case.resident
    ends = [t.to(case.dtype) for t in (left, none, right, none)]
    cores = Cores.of(counts, torch.rand(case.resident * R, generator=rng) / R, *ends)
    ids = torch.arange(case.distinct) * (case.resident // case.distinct)
    tasks = ids[torch.arange(case.rows) % case.distinct]
    v, u = v.to(case.dtype), u.to(case.dtype)
    xs, ys = ([normal(case.rows, size).to(case.dtype) for _ in range(COPIES)] for _ in range(2))
    of = [slice(R * i, R * i + R) for i in ids.tolist()]
    a = torch.stack([ends[2][s].float() @ v.float().T for s in of]).to(case.dtype)
    b = torch.stack([(u.float() @ ends[0][s].float().T) * cores.weights[s] for s in of]).to(case.dtype)
    return Data(v, u, cores, tasks, xs, ys, a, b)


def peft_layer(data: Data, case: Case) -> Any:
    """Give PEFT's layer with an adapter per task of the batch, and a base that hands back ``y``."""
    from peft import LoraConfig, get_peft_model

    class Base(torch.nn.Linear):
        answer: Tensor

        def forward(self, _: Tensor) -> Tensor:
            return self.answer.clone()

    size = data.v.shape[0]
    model = torch.nn.Sequential(Base(size, size, bias=False, device="meta").to_empty(device="cpu").to(case.dtype))
    config = LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    wrapped = get_peft_model(model, config, adapter_name="task0", autocast_adapter_dtype=False)
    for i in range(1, case.distinct):
        wrapped.add_adapter(f"task{i}", config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0].eval()
    with torch.no_grad():
        for i in range(case.distinct):
            layer.lora_A[f"task{i}"].weight.copy_(data.a[i])
            layer.lora_B[f"task{i}"].weight.copy_(data.b[i])
    return layer


def candidates(data: Data, case: Case) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """Give who takes turns; each leaves the copy's ``y`` as it was, or adds to it without bound."""
    v_rows, u = data.v.T.contiguous(), data.u
    place = torch.arange(case.rows) % case.distinct
    groups = [(place == i).nonzero()[:, 0] for i in range(case.distinct)]
    linear = torch.nn.functional.linear

    def ours(turn: int) -> Tensor:
        x, y = data.xs[turn % COPIES], data.ys[turn % COPIES]
        return shared_lora_(y, x, data.v, data.u, data.cores, data.tasks)

    def plain(turn: int) -> Tensor:
        x, y = data.xs[turn % COPIES], data.ys[turn % COPIES]
        return y.add_(linear(linear(x, v_rows), u))

    def loop(turn: int) -> Tensor:
        x, y = data.xs[turn % COPIES], data.ys[turn % COPIES]
        for i, rows in enumerate(groups):
            y[rows] += linear(linear(x[rows], data.a[i]), data.b[i])
        return y

    yield "loraspan", ours
    yield "plain rank k", plain
    yield "loop", loop
    if case.resident <= 64:
        layer, names = peft_layer(data, case), [f"task{i}" for i in place.tolist()]

        def peft(turn: int) -> Tensor:
            layer.base_layer.answer = data.ys[turn % COPIES]
            return layer(data.xs[turn % COPIES], adapter_names=names)

        yield "PEFT", peft


def check(data: Data, case: Case, found: dict[str, Callable[[int], Tensor]]) -> None:
    """Compare everyone but ``plain``, who computes something else, with float64 on every row."""
    x, before = data.xs[0], data.ys[0].clone()
    place = torch.arange(case.rows) % case.distinct
    z = torch.einsum("trd,td->tr", data.a.double()[place], x.double()) if case.rows <= 64 else None
    if z is None:
        z = torch.stack([data.a[i].double() @ row.double() for i, row in zip(place.tolist(), x, strict=True)])
    exact = before.double() + torch.stack([data.b[i].double() @ row for i, row in zip(place.tolist(), z, strict=True)])
    # factors in bfloat16 are rounded once more than loadings are
    allowed = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[case.dtype] * exact.abs().max()
    for name, run in found.items():
        data.ys[0].copy_(before)
        if name != "plain rank k":
            worst = (run(0).double() - exact).abs().max()
            assert worst <= allowed, f"{name}: off by {worst:.3g}, allowed {allowed:.3g}"
    data.ys[0].copy_(before)


@torch.no_grad()
def time_case(case: Case, size: int, rounds: int) -> dict[str, object]:
    """Check and time one case; give its record."""
    data = make(case, size)
    found = dict(candidates(data, case))
    check(data, case, found)
    for y in data.ys:
        y.zero_()
    timings = interleave(found, rounds)
    ours = timings["loraspan"].median
    record: dict[str, object] = {
        "bench": "shared_lora",
        "rows": case.rows,
        "distinct": case.distinct,
        "resident": case.resident,
        "dtype": str(case.dtype).removeprefix("torch."),
        "size": size,
        "k": K,
        "r": R,
        "us": ours * 1e6,
        "quartiles_us": [timings["loraspan"].low * 1e6, timings["loraspan"].high * 1e6],
    }
    for name, timing in timings.items():
        if name != "loraspan":
            record[name] = timing.median / ours
    return record


class _Least(torch.autograd.Function):
    """The least that torch asks of a function with a gradient written in Python: a copy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:  # noqa: ARG004 (what has the gradient)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grad, grad


def overheads() -> dict[str, object]:
    """Give the microseconds of a call on one row of four numbers, one thread, and of the least that torch can do.

    In turns of some hundred microseconds, of which the least counts: on a machine with others, only such are quiet.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one, none = torch.ones(1, 2), torch.empty(0, 4)
    cores = Cores.of([(1, 0, 0, 0)], torch.ones(1), one, none, one, none)
    ends = (one.clone().requires_grad_(), none, one.clone().requires_grad_(), none)
    trained = Cores.of([(1, 0, 0, 0)], torch.ones(1, requires_grad=True), *ends)
    x, y, basis, tasks = torch.ones(1, 4), torch.ones(1, 4), torch.ones(4, 2), torch.zeros(1, dtype=torch.int64)
    wants = x.clone().requires_grad_()
    library: Any = torch.library.Library("loraspan_bench", "DEF")  # type: ignore[no-untyped-call]
    library.define("least(Tensor y, Tensor x) -> Tensor")
    library.impl("least", lambda y, _: y.clone(), "CPU")
    torch.library.register_autograd("loraspan_bench::least", lambda _, grad: (grad, grad), lib=library)
    operator = torch.ops.loraspan_bench.least.default
    calls: dict[str, Callable[[], object]] = {
        "no gradient": lambda: shared_lora_(y, x, basis, basis, cores, tasks),
        "gradient": lambda: shared_lora(y, wants, basis, basis, cores, tasks),
        "gradient of columns": lambda: shared_lora(y, wants, basis, basis, trained, tasks),
        "a copy": y.clone,
        "least autograd.Function": lambda: _Least.apply(y, wants),  # type: ignore[no-untyped-call]
        "least operator without a gradient": lambda: operator(y, x),
        "least operator with one": lambda: operator(y, wants),
    }
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(500):
        for name, call in calls.items():
            found[name] = min(found[name], _microseconds(call))
    torch.set_num_threads(threads)
    return {"bench": "shared_lora overhead", **{f"{name} us": value for name, value in found.items()}}


def _microseconds(call: Callable[[], object], repetitions: int = 40) -> float:
    start = time.perf_counter()
    for _ in range(repetitions):
        call()
    return (time.perf_counter() - start) / repetitions * 1e6


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    records = [time_case(case, arguments.size, arguments.rounds) for case in CASES]
    columns = ["rows", "distinct", "resident", "dtype", "us", "PEFT", "plain rank k", "loop"]
    print(table(records, columns))
    print("PEFT, plain rank k, loop: their time over ours; the goals for 64 rows of 64 tasks are", GOALS)
    beside = overheads()
    print(
        "a call beside its work:", {k: round(v, 1) for k, v in beside.items() if isinstance(v, float)}, OVERHEAD_GOALS
    )
    write_lines(arguments.json, [{"machine": machine()}, *records, beside])


if __name__ == "__main__":
    main()

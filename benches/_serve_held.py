"""The parts of ``benches/serve.py`` that are not a batch: memory, switching, and graphs that tasks change under."""

from __future__ import annotations

import gc
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import loraspan
from _bench import Timing
from _gpu_cases import Goal
from _gpu_device import summary
from _gpu_report import Record
from _serve_contenders import Batch, Place, whole
from _serve_space import SEED, Layers, Sizes, draw, names, slots_of, space_of
from peers.job import anonymous_bytes

OF_ADAPTERS = Goal("share", 0.03, most=True)
OF_SWITCH = Goal("us", 50.0, most=True)
# less than a pointer: nothing is left of a switch
OF_KEPT = Goal("B kept", 8.0, most=True)
# q, k, v and o of 32 layers
SLOTS_7B = 4 * 32
KIND = torch.bfloat16
SWITCHES = 1000


def memory_records(size: int, slots: int, tasks: int, at: Place) -> list[Record]:
    """Count what tables of many tasks take, and measure it on a slice: the slots of one layer, from a saved space."""
    shapes = {f"layers.{i}": (size, size) for i in range(slots)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "space.span")
        space_of(draw(shapes, tasks, at.sizes), tasks, at.sizes, KIND).save(path)
        if at.clock.device.type == "cuda":
            took = _attached_bytes(path, size, slots, "cuda")
        else:
            # a process of its own: this one keeps what it has freed
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                took = child.submit(_attached_bytes, path, size, slots, "cpu").result()
    slot_adapter = at.sizes.lora_rank * 2 * size * KIND.itemsize
    counted = counted_bytes(size, tasks, at.sizes)
    records = []
    for how, status, ours, theirs in (
        (f"a 7B model's {SLOTS_7B} slots", "counted", SLOTS_7B * counted, SLOTS_7B * tasks * slot_adapter),
        (f"{slots} slots attached", "measured", took, slots * tasks * slot_adapter),
    ):
        record: Record = {"case": f"{tasks} tasks, r {at.sizes.lora_rank}, k {at.sizes.rank}", "how": how}
        record |= {"status": status, "dtype": "bf16", "backend": "loraspan"}
        record |= {"MB": ours / 1e6, "adapters MB": theirs / 1e6, "share": ours / theirs}
        records.append(record | {"goals": OF_ADAPTERS.judge(ours / theirs)})
    return records


def counted_bytes(size: int, tasks: int, sizes: Sizes) -> int:
    """Give the bytes of one slot's tables: both bases and every task's ends in two bytes, a weight, a line of index."""
    return 2 * size * sizes.rank * 2 + tasks * (2 * sizes.lora_rank * sizes.rank * 2 + 4 * sizes.lora_rank + 10 * 8)


def _attached_bytes(path: Path, size: int, slots: int, device: str) -> int:
    """Give what opening a space and attaching it adds to the memory of a GPU, or to this process's anonymous memory."""
    here = torch.device(device)
    base = Layers(size, slots, here, KIND)
    # the first calls of all of it load libraries
    shapes, few = {"layers.0": (8, 8)}, Sizes(2, 1)
    loraspan.attach(Layers(8, 1, here, KIND), space_of(draw(shapes, 2, few), 2, few)).detach()
    gc.collect()
    before = torch.cuda.memory_allocated(here) if device == "cuda" else anonymous_bytes("self")
    served = loraspan.attach(base, loraspan.open(path))
    gc.collect()
    after = torch.cuda.memory_allocated(here) if device == "cuda" else anonymous_bytes("self")
    served.detach()
    return after - before


def switching_records(shape: tuple[int, int, int], batch: Batch, at: Place) -> list[Record]:
    """Time a change of tasks, before any row is computed, and see what it allocates."""
    built = whole(*shape, batch, at)
    served, space = built.served, built.space
    known, device = names(batch.resident), at.clock.device
    rows, rng = [known[i] for i in batch.ids], random.Random(SEED)
    lists = [rng.sample(rows, len(rows)) for _ in range(2 * SWITCHES + 9)]
    fresh = iter(lists)

    def entered(tasks: Any) -> None:
        with served.tasks(tasks):
            pass

    ready = [space.ids(each) for each in lists[:2]]
    switches: dict[str, Callable[[int], object]] = {
        f"tasks(), {len(rows)} ids that are there": lambda turn: entered(ready[turn % 2]),
        "tasks(), one name": lambda turn: entered(known[turn % 2]),
        f"tasks(), {len(rows)} names as before": lambda turn: entered(lists[turn % 2]),
        f"tasks(), {len(rows)} names anew": lambda _: entered(next(fresh)),
        f"space.ids(), {len(rows)} names": lambda turn: space.ids(lists[turn]).to(device),
    }
    case: Record = {"case": f"{shape[2]} layers of {shape[0]}, {batch.resident} tasks", "dtype": at.dtype}
    records = []
    for how, switch in switches.items():
        timing = _microseconds(switch, SWITCHES)
        record = case | {"backend": "loraspan", "how": how} | _us(timing) | _allocations(switch, at)
        # batches of names may be remembered, as many as there is room for: what a new one leaves is no loss
        goals = (OF_SWITCH,) if how.endswith("anew") else (OF_SWITCH, OF_KEPT)
        judged = [goal.judge(float(str(record[goal.figure]))) for goal in goals]
        records.append(record | {"goals": "; ".join(judged)})
    for peer, model in built.peers.items():
        told = _peft_switches if peer == "PEFT" else _vlora_switches
        for how, timing in told(model, known, at):
            records.append(case | {"backend": peer, "how": how} | _us(timing))
    return [*built.left_out, *records]


def _us(timing: Timing) -> Record:
    return {"status": "timed", "us": timing.median, "low us": timing.low, "high us": timing.high}


def _microseconds(switch: Callable[[int], object], times: int) -> Timing:
    took = []
    for turn in range(times):
        start = time.perf_counter()
        switch(turn)
        took.append((time.perf_counter() - start) * 1e6)
    return summary(took[max(1, times // 10) :])


def _allocations(switch: Callable[[int], object], at: Place) -> Record:
    """Give the kB that Python and torch take during a switch, and the bytes that are left of each of many."""
    tracemalloc.start()
    switch(0)
    switch(1)
    gc.collect()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    switch(0)
    peak = tracemalloc.get_traced_memory()[1] - before
    for turn in range(SWITCHES):
        switch(turn)
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (at.clock.device.type == "cuda")
    with profile(activities=activities, profile_memory=True) as record:
        switch(1)
    tensors = sum(
        max(0, event.self_cpu_memory_usage) + max(0, getattr(event, "self_device_memory_usage", 0))
        for event in record.events()
    )
    return {"kB of Python": peak / 1e3, "kB of tensors": tensors / 1e3, "B kept": max(0, kept) / SWITCHES}


def _peft_switches(mixed: Any, known: Sequence[str], at: Place) -> Sequence[tuple[str, Timing]]:
    found = [("set_adapter", _microseconds(lambda turn: mixed.set_adapter(known[turn % 2]), at.rounds + 2))]
    took = []
    with tempfile.TemporaryDirectory() as folder:
        mixed.save_pretrained(folder, selected_adapters=[known[1]])
        for turn in range(min(at.rounds, 5) + 1):
            start = time.perf_counter()
            mixed.load_adapter(str(Path(folder, known[1])), f"loaded {turn}", autocast_adapter_dtype=False)
            at.clock.wait()
            took.append((time.perf_counter() - start) * 1e6)
            mixed.delete_adapter(f"loaded {turn}")
    return [*found, ("load_adapter", summary(took[1:]))]


def _vlora_switches(switched: Any, known: Sequence[str], at: Place) -> Sequence[tuple[str, Timing]]:
    def switch(turn: int) -> None:
        switched.set_task(known[turn % 2])
        at.clock.wait()

    return [("set_task", _microseconds(switch, min(at.rounds, 5) + 2))]


def graph_records(size: int, batch: Batch, at: Place) -> list[Record]:
    """See that a captured graph serves the tasks its ids say now, and none that has left the space."""
    if at.clock.device.type != "cuda":
        return [{"backend": "loraspan", "status": "not run", "reason": "CUDA graphs are for a GPU"}]
    base = Layers(size, 1, at.clock.device, at.kind)
    xs = at.normal(1, batch.rows, size)
    space = space_of(draw(slots_of(base), batch.resident, at.sizes), batch.resident, at.sizes)
    served = loraspan.attach(base, space)
    ids = space.ids([names(batch.resident)[i] for i in batch.ids]).to(xs.device)
    out = torch.empty(batch.rows, size, dtype=at.kind, device=xs.device)
    replay = at.clock.captured(lambda: out.copy_(served(xs, task_ids=ids)[0]))
    assert replay is not None
    faults = []
    for what in ("other tasks", "another order", "the base model"):
        ids.copy_(torch.full_like(ids, -1) if what == "the base model" else ids.roll(1))
        replay()
        if not torch.equal(out, served(xs, task_ids=ids)[0]):
            faults.append(what)
    left = int(space.ids(names(batch.resident)[:1]))
    space.remove(names(batch.resident)[0])
    ids.fill_(left)
    replay()
    if not out.isnan().all():
        faults.append("a task that left")
    record: Record = {"case": f"a graph of {batch}", "dtype": at.dtype, "backend": "loraspan"}
    if faults:
        return [record | {"status": "wrong", "reason": f"a captured graph is wrong after: {', '.join(faults)}"}]
    return [record | {"status": "right", "reason": "it serves what its ids say, and NaN for a task that left"}]

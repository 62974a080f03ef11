"""What processes do that are at work on one store at the same time."""

import os
from multiprocessing import get_context

from faults.commands import digest, opened
from loraspan import store
from loraspan.errors import StoreError

PATIENCE = 240
# one process imports everything, and every other is a copy of it
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["faults.together"])


def started(target, *args):
    """Start a process with one thread."""
    process = CONTEXT.Process(target=target, args=args)
    before = dict(os.environ)
    tests = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120 (text)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([tests, before.get("PYTHONPATH", "")]))
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def write(folder, name, rounds, gate, results):
    """Each round: open, wait for the others, rename one's own task, and say who won."""
    for turn in range(rounds):
        space = opened(folder)
        gate.wait(PATIENCE)
        try:
            old = next(task for task in space.tasks if task.startswith(name))
            space.rename(old, f"{name} {turn}")
            results.put((name, turn, "won"))
        except StoreError as error:
            results.put((name, turn, str(error)))
        gate.wait(PATIENCE)


def read(folder, gate, stop, results):
    """Open again and again while somebody writes: always a whole generation, never an older one than before."""
    newest, opens, different = 0, 0, set()
    gate.wait(PATIENCE)
    while not stop.is_set():
        now = store.open_at(folder / "team.span")
        again = store.open(folder / "team.span", generation=now.generation)
        if now.generation < newest or digest(now.collection) != digest(again):
            results.put(f"generation {now.generation} after {newest}, or not the same twice")
            return
        newest, opens = now.generation, opens + 1
        different.add(newest)
    results.put((opens, len(different)))

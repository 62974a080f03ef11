"""What a run takes in memory is what it was allowed, and less than all at once would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WATCH = """
import json, sys, threading, time


def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])


def peak_of(call):
    before, most, over = anonymous(), [0], threading.Event()

    def watch():
        while not over.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    over.set()
    watcher.join()
    return most[0] - before
"""
CHILD = """
import torch
import loraspan
from loraspan.many.groups import IN_FLIGHT, standing

torch.set_num_threads(1)
root, out, count, group = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
memory = standing(count) + (IN_FLIGHT + 1) * group
peak = peak_of(lambda: loraspan.compress(root, out=out, max_error=0.1, memory=memory))
print(json.dumps({"peak": peak, "memory": memory}))
"""
GROUP = """
from pathlib import Path
import torch
from loraspan.collection.collection import SlotSpace
from loraspan.collection.fit import Goal
from loraspan.collection.rows import WIDTHS
from loraspan.many.census import take_census
from loraspan.many.groups import Tally, express_cost
from loraspan.many.ledger import Ledger
from loraspan.many.pieces import encode_bases
from loraspan.many.work import Work, express_group

torch.set_num_threads(1)
root, folder, dtype, max_error = sys.argv[1], Path(sys.argv[2]), WIDTHS[sys.argv[3]], float(sys.argv[4])
census = take_census([root], False, lambda *_: None)
goal = Goal(max_error=max_error, dtype=dtype)
ledger = Ledger(folder)
with ledger.held():
    none = {p: SlotSpace(torch.empty(m.n, 0), torch.empty(m.d, 0), m.kind, m.kernel) for p, m in census.slots.items()}
    ledger.write("bases.safetensors", encode_bases(none))


def express(count):
    origins = tuple(member.origin for member in census.members[:count])
    return express_group(Work(origins, goal, False), False, census.slots, str(folder / "bases.safetensors"))


express(2)
tally = Tally()
for member in census.members:
    tally.add(member.maps)
peak = peak_of(lambda: express(len(census.members)))
counted = express_cost(census.slots, dict.fromkeys(census.slots, 0), goal)(tally)
print(json.dumps({"peak": peak, "counted": counted}))
"""
COUNT = 160


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Adapters of rank 8 in one slot whose 48 shared directions on either side call for wide bases."""
    from many_runs import write

    root = tmp_path_factory.mktemp("adapters")
    write(root, count=COUNT, slots=1, shape=(320, 320), ranks=(8,), shared_out=48, shared_in=48, noise=0.01)
    return root


def peak_of(sources, out, group):
    return told_by(CHILD, sources, out, COUNT, group)


def told_by(script, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCH + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_anonymous_memory_stays_within_what_was_allowed(sources, tmp_path):
    import loraspan

    tight = peak_of(sources, tmp_path / "tight", 4_000_000)
    assert tight["peak"] <= tight["memory"]
    space = loraspan.open(tmp_path / "tight").collection
    assert len(space.segments) > 4
    assert all(max(slot.ranks) >= 48 for slot in space.slots.values())
    # it is the groups that keep it small: one of all takes more than the other may
    whole = peak_of(sources, tmp_path / "whole", 10**9)
    assert len(loraspan.open(tmp_path / "whole").collection.segments) == 1
    assert whole["peak"] > tight["memory"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Adapters that share nothing: every column is private."""
    from many_runs import write

    root = tmp_path_factory.mktemp("apart")
    write(root, count=300, slots=1, shape=(512, 512), ranks=(8,), shared_out=0, shared_in=0, noise=0.0, cond=2.0)
    return root


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(("dtype", "max_error"), [("f32", 1e-3), ("int8", 0.05), ("coded", 0.2), ("coded", 1e-3)])
def test_a_group_takes_no_more_than_is_counted(apart, tmp_path, dtype, max_error):
    """Also where ends are rounded to steps, which are tried one after another."""
    told = told_by(GROUP, apart, tmp_path / "pieces", dtype, max_error)
    assert told["peak"] <= told["counted"], told
    # nor is it half of all that could be
    assert told["peak"] > told["counted"] / 4, told

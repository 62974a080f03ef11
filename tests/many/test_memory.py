"""What a run takes in memory is what it was allowed, and less than all at once would take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys, threading, time
import torch
import loraspan
from loraspan.many.groups import IN_FLIGHT, standing

torch.set_num_threads(1)
root, out, count, group = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])


before, peak, over = anonymous(), 0, threading.Event()


def watch():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)


watcher = threading.Thread(target=watch)
watcher.start()
memory = standing(count) + (IN_FLIGHT + 1) * group
space = loraspan.compress(root, out=out, max_error=0.1, memory=memory)
over.set()
watcher.join()
print(json.dumps({"peak": peak - before, "memory": memory}))
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(sources), str(out), str(COUNT), str(group)]
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

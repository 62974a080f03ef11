"""Writers, a reader and a collector of garbage, each a process of its own, on one store."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from loraspan import store
from loraspan.collection.collection import Segment
from loraspan.errors import StoreError
from store.growing import WHOLE, part

TASKS = 6


def write(path, who):
    """Add tasks one by one, each as often as somebody else was faster."""
    for i in range(TASKS):
        while True:
            opened = store.open_at(path)
            new = part(i, i + 1)
            segment = Segment((replace(new.tasks[0], name=f"{who} {i}"),), dict(new.columns))
            try:
                store.commit(opened, replace(opened.collection, segments=(*opened.collection.segments, segment)))
                break
            except StoreError as error:
                if "another writer was faster" not in str(error):
                    raise


def read(path, _):
    """Read what is pinned, and see that tasks never become fewer."""
    seen = 0
    while seen < 2 * TASKS:
        with store.pin(path) as number:
            held = store.open(path, generation=number)
            assert len(held.tasks) >= seen
            seen = len(held.tasks)
            assert all(c.weights.isfinite().all() for s in held.segments for c in s.columns.values())


def collect(path, _):
    """Remove all but the current generation, again and again."""
    gone = 0
    while gone < 2 * TASKS:
        gone += len(store.gc(path, keep=0, grace=0).generations)
        time.sleep(0.01)


def test_nothing_is_lost_between_processes(tmp_path):
    path = tmp_path / "team.span"
    store.save(replace(WHOLE, segments=()), path)
    roles = [("write", "a"), ("write", "b"), ("read", ""), ("collect", "")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "store.test_processes", role, str(path), who],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for role, who in roles
    ]
    ends = [process.communicate(timeout=300) for process in processes]

    assert [process.returncode for process in processes] == [0] * 4, ends
    names = [task.name for task in store.open(path).tasks]
    assert sorted(names) == [f"{who} {i}" for who in "ab" for i in range(TASKS)]
    assert [name for name in names if name[0] == "a"] == [f"a {i}" for i in range(TASKS)]
    assert [entry.generation for entry in store.log(path)] == [1 + 2 * TASKS]
    assert store.verify(path) == []
    opened = store.open_at(path)
    files = {opened.basis.file, *(data.file for data in opened.segments), f"manifest-{opened.generation:06d}.json"}
    assert {entry.name for entry in path.iterdir()} == files | {"CURRENT", ".lock", ".pins"}


if __name__ == "__main__":
    {"write": write, "read": read, "collect": collect}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3])

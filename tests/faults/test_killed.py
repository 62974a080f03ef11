"""Every command, in a real process: killed at each step, on a full disk, on a broken one, in a folder to read only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults.commands import COMMANDS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forked processes")
SERVER = Path(__file__).parent / "server.py"
# what a full disk and a broken one meet beyond what every change of a store has in common
DISKS = ("compress", "compress in groups", "add", "gc", "export over an old one")
# of commands that are long and repeat themselves, one step in so many
STRIDE = {"compress": 3, "compress in groups": 8}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Ask the process that forks for all cases of a command."""
    shared = Path("/dev/shm")
    with_memory = shared.is_dir() and os.access(shared, os.W_OK)
    root = tmp_path_factory.mktemp("faults") if not with_memory else shared / f"loraspan-faults-{os.getpid()}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )

    def ask(command, do, *options):
        server.stdin.write(json.dumps({"command": command, "do": do, "with": options}) + "\n")
        server.stdin.flush()
        told = json.loads(server.stdout.readline())
        assert not told["failures"], "\n".join(told["failures"])
        print(command, do, *options, told["counts"], f"{len(told['steps'])} steps, {told['seconds']} s")  # noqa: T201
        return told["steps"], told["counts"]

    yield ask
    server.stdin.close()
    server.wait(60)
    subprocess.run(["rm", "-rf", str(root)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_before_any_step_leaves_the_old_or_the_new(faults, command):
    # beyond `save`, which is the same to the disk
    stride = 2 if command == "compress --overwrite" else 1
    steps, counts = faults(command, "every_step", "kill", stride)

    assert len(steps) >= COMMANDS[command].floor
    assert counts["cases"] == counts["killed"] == len(range(0, len(steps), stride))
    assert counts["old"]
    assert counts.get("new", 0) or command == "gc", "collecting garbage changes nothing that a reader sees"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_within_any_write_or_at_the_end_leaves_the_old_or_the_new(faults, command):
    steps, counts = faults(command, "torn_writes")

    # a file that is only renamed or removed takes no write
    assert counts["cases"] == counts["killed"] == steps.count("write") + 1
    assert counts["cases"] >= (1 if command == "gc" else 3)


@pytest.mark.parametrize("command", DISKS)
def test_a_disk_that_is_full_from_any_step_on(faults, command):
    """The command says so with an error of the list; the old one is there, and nothing beside it."""
    stride = STRIDE.get(command, 1)
    steps, counts = faults(command, "every_step", "full", stride)

    assert counts["cases"] == counts["refused"] + counts.get("done", 0) == len(range(0, len(steps), stride))
    assert counts["refused"] >= 3


@pytest.mark.parametrize("command", DISKS)
def test_a_step_that_fails(faults, command):
    stride = STRIDE.get(command, 1)
    steps, counts = faults(command, "every_step", "broken", stride)

    assert counts["cases"] == counts["refused"] + counts.get("done", 0) == len(range(0, len(steps), stride))
    assert counts["refused"] >= 3


@pytest.mark.parametrize("command", ["add", "compress --overwrite", "export over an old one"])
def test_a_file_that_may_not_grow(faults, command):
    """The kernel itself cuts a write short, and refuses the next: as on a disk with no more room than that."""
    sizes = [0, 1, 7, 8, 100, 500, 1000, 1500, 2000, 10**6]
    _, counts = faults(command, "file_sizes", sizes)

    assert counts["cases"] == counts["refused"] + counts["done"] == len(sizes)
    assert counts["refused"] >= 4
    assert counts["done"] >= 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "gc" and "export" not in name])
def test_a_folder_that_may_only_be_read(faults, command):
    _, counts = faults(command, "read_only")

    assert counts["refused"] == counts["cases"] == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a disk")
@pytest.mark.parametrize("command", ["add", "compress", "export over an old one"])
def test_a_disk_with_little_room(faults, command):
    """Real disks of a few pages: first there is room for nothing, in the end for all."""
    _, counts = faults(command, "small_disks")

    assert counts["cases"] == counts["refused"] + counts["done"]
    assert counts["refused"] >= 2
    assert counts["done"] >= 1

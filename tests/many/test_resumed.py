"""A run that is cut short goes on where it was, and ends with the bits of one that was not; another does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loraspan
from loraspan.errors import MismatchError, StoreError
from loraspan.many import run as runs
from loraspan.many import work
from many_runs import cut_by, files_of, run, write
from store.crash import Crash, Disk

RANK = {"rank": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    write(root, count=10, slots=1, shape=(24, 30))
    return root


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Five groups, and a tree of three levels over them."""
    cut_by(2, monkeypatch)
    monkeypatch.setattr(runs, "merge_arity", lambda *_: 2)
    # what would be lost with the power is in the hands of Disk here
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def progress_of(out):
    return Path(f"{out}.progress")


def is_over(out):
    """Whether a store is there and its ledger has no pieces: there is nothing to go on with."""
    left = [path for path in progress_of(out).iterdir() if path.name != ".lock"] if progress_of(out).exists() else []
    return out.exists() and not left


def cut_short(sources, out, stop, *, torn=False, **options):
    """A run that ends at a step of writing; what was not made to last is lost if it was ``torn``."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, stop, torn=torn)
        with pytest.raises(Crash):
            run(sources, out, **(options or RANK))
        disk.lose_power(names="all" if torn else "none", data=True)


@pytest.mark.parametrize("torn", [False, True], ids=["before", "after"])
def test_cut_short_at_any_step_it_goes_on_to_the_same_bits(torn, sources, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run(sources, tmp_path / "whole", **RANK)
    whole, steps = files_of(tmp_path / "whole"), len(disk.steps)
    assert steps > 120
    # a quarter of the steps, others with what is torn; all of the end, where the store appears
    cases = [stop for stop in range(steps) if stop % 4 == torn or stop > steps - 40]
    for stop in cases:
        out = tmp_path / f"out{stop}"
        cut_short(sources, out, stop, torn=torn)
        ended = is_over(out)
        if not ended:
            run(sources, out, **RANK)
        assert files_of(out) == whole, f"step {stop}"
        assert ended or not progress_of(out).exists()
        assert len(loraspan.open(out).tasks) == 10
        shutil.rmtree(out)
    assert len(cases) > 60


def test_what_is_done_is_not_done_again(sources, tmp_path, monkeypatch):
    done = []
    for name in ("summarize_group", "express_group"):
        honest = getattr(work, name)
        monkeypatch.setattr(runs, name, lambda *given, name=name, honest=honest: (done.append(name), honest(*given))[1])
    run(sources, tmp_path / "whole", **RANK)
    assert done == ["summarize_group"] * 5 + ["express_group"] * 5
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        run(sources, tmp_path / "counted", **RANK)
    for stop in range(0, len(disk.steps), 9):
        out = tmp_path / f"out{stop}"
        done.clear()
        cut_short(sources, out, stop)
        if not is_over(out):
            run(sources, out, **RANK)
        # at most the piece that was in hand
        assert len(done) <= 11


def test_other_arguments_are_refused_by_name(sources, tmp_path):
    out = tmp_path / "out"
    cut_short(sources, out, 90)
    for other, named in [
        ({"rank": 4}, "rank was 3 and is 4"),
        ({"max_error": 0.1}, "max_error was null and is 0.1"),
        ({"rank": 3, "memory": "2GB"}, "memory was 1000000000 and is 2000000000"),
        ({"rank": 3, "dtype": torch.float16}, 'dtype was "float32" and is "float16"'),
        ({"rank": 3, "seed": 1}, "seed was 0 and is 1"),
        ({"rank": 3, "overwrite": True}, "overwrite was false and is true"),
    ]:
        with pytest.raises(StoreError, match="begun with other arguments") as refused:
            run(sources, out, **other)
        assert named in str(refused.value)
    run(sources, out, **RANK)
    assert not progress_of(out).exists()


def test_changed_sources_are_refused_by_name(sources, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(sources, root)
    out = tmp_path / "out"
    cut_short(root, out, 90)
    weights = root / "004" / "adapter_model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(StoreError, match=r"since it began a file of .*004 has changed"):
        run(root, out, **RANK)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.move(root / "004", tmp_path / "004")
    with pytest.raises(StoreError, match=r"the source .*004 has gone"):
        run(root, out, **RANK)
    shutil.move(tmp_path / "004", root / "004")
    shutil.copytree(root / "004", root / "z")
    with pytest.raises(StoreError, match=r"the source .*z has come"):
        run(root, out, **RANK)
    shutil.rmtree(root / "z")
    folders = sorted(root.iterdir())
    with pytest.raises(StoreError, match="the order of the sources has changed"):
        run([*folders[1:], folders[0]], out, **RANK)
    run(folders, out, **RANK)
    run(sources, tmp_path / "whole", **RANK)
    assert [t.error for t in loraspan.open(out).collection.tasks] == [
        t.error for t in loraspan.open(tmp_path / "whole").collection.tasks
    ]


def test_a_source_that_changes_while_the_run_goes_stops_it(sources, tmp_path):
    root = tmp_path / "in"
    shutil.copytree(sources, root)

    def meddle(stage, done, _total):
        if stage == "express" and done == 0:
            config = root / "009" / "adapter_config.json"
            config.write_text(config.read_text() + " ")

    with pytest.raises(MismatchError, match="has changed since the run began"):
        run(root, tmp_path / "out", progress=meddle, on_error="skip", **RANK)
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_may_go_on_without_the_bad_one(sources, tmp_path):
    from safetensors.torch import load_file, save_file

    root = tmp_path / "in"
    shutil.copytree(sources, root)
    path = root / "007" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)][0, 0] = float("inf")
    save_file(tensors, path)
    for on_error in ("stop", "skip"):
        out = tmp_path / on_error
        if on_error == "stop":
            with pytest.raises(Exception, match="adapter '007'"):
                run(root, out, **RANK)
        run(root, out, on_error="skip", **RANK)
    assert files_of(tmp_path / "stop") == files_of(tmp_path / "skip")


def test_another_writer_in_the_meantime_is_told(sources, tmp_path):
    out = tmp_path / "out"

    def meddle(stage, done, total):
        if stage == "express" and done == total:
            loraspan.compress(sources, rank=1).save(out)

    with pytest.raises(StoreError, match="a store already"):
        run(sources, out, progress=meddle, **RANK)
    assert progress_of(out).exists()
    shutil.rmtree(out)
    run(sources, out, **RANK)
    assert len(loraspan.open(out).tasks) == 10


def test_two_runs_at_once_are_not(sources, tmp_path):
    told = []

    def second(stage, _done, _total):
        if stage == "express" and not told:
            with pytest.raises(StoreError, match="another run is at work") as refused:
                run(sources, tmp_path / "out", **RANK)
            told.append(refused.value)

    run(sources, tmp_path / "out", progress=second, **RANK)
    assert told


KILLED = """
import sys
from many_runs import cut_by, run
from loraspan.many import run as runs
import pytest
cut_by(2, pytest.MonkeyPatch())
runs.merge_arity = lambda *_: 2
run(sys.argv[1], sys.argv[2], rank=3, progress=lambda *step: print(*step, flush=True))
"""


@pytest.mark.parametrize("when", ["summarize", "express"])
def test_killed_it_goes_on(when, sources, tmp_path):
    """SIGKILL, from outside, in the middle of either pass."""
    out = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(sources), str(out)], stdout=subprocess.PIPE, text=True, env=environment
    )
    steps = 0
    for line in child.stdout:
        steps += line.startswith(when)
        if steps == 3:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert not out.exists()
    assert any(
        path.name.startswith("summary" if when == "summarize" else "tasks") for path in progress_of(out).iterdir()
    )
    run(sources, out, **RANK)
    run(sources, tmp_path / "whole", **RANK)
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not progress_of(out).exists()

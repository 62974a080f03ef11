"""What a run in groups takes and refuses, what it tells on its way, and what it leaves behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import loraspan
from loraspan import subspace
from loraspan.collection.fit import Goal
from loraspan.collection.rows import WIDTHS
from loraspan.errors import ArgumentError, StoreError
from loraspan.many.ledger import Ledger
from loraspan.many.run import Run
from many_runs import COUNT, cut_by, files_of, run


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    cut_by(5, monkeypatch)


@pytest.mark.parametrize("memory", [None, "1GB"], ids=["at-once", "groups"])
def test_either_way_a_space_comes_whose_changes_are_written(memory, shared, tmp_path):
    root, _ = shared
    space = loraspan.compress(root, max_error=0.05, memory=memory, out=tmp_path / "out")
    assert (space.path, space.generation, len(space.tasks)) == (tmp_path / "out", 1, COUNT)
    assert max(space.errors.values()) <= 0.05
    space.remove("003")
    assert loraspan.open(tmp_path / "out").tasks == space.tasks == [f"{i:03d}" for i in range(COUNT) if i != 3]


def test_written_at_once_is_what_saving_writes(shared, tmp_path):
    root, _ = shared
    loraspan.compress(root, rank=2, out=tmp_path / "out")
    with pytest.raises(StoreError, match="a store already"):
        loraspan.compress(root / "nowhere", rank=2, out=tmp_path / "out")
    loraspan.compress(root, rank=2).save(tmp_path / "saved")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "saved")
    assert loraspan.compress(root, rank=2, out=tmp_path / "out", overwrite=True).generation == 2


def test_an_executor_alone_calls_for_groups_within_1_gb(shared, tmp_path):
    seen = []

    def look(*_):
        seen.append(json.loads((tmp_path / "out.progress" / "run.json").read_text())["memory"])

    run(shared[0], tmp_path / "named", memory="1GB")
    with ThreadPoolExecutor(2) as threads:
        run(shared[0], tmp_path / "out", memory=None, executor=threads, progress=look)
    assert set(seen) == {10**9}
    assert files_of(tmp_path / "out") == files_of(tmp_path / "named")


def test_every_argument_reaches_the_groups(tmp_path, monkeypatch):
    asked = {}

    def groups(*given, **options):
        asked.update(options, given=given)
        raise KeyboardInterrupt

    monkeypatch.setattr(subspace, "compress_in_groups", groups)
    options = {"memory": 7, "executor": object(), "hash_files": True, "overwrite": True, "progress": print}
    goal = {"energy": 0.9, "dtype": "int8", "refine": 5, "seed": 3}
    with pytest.raises(KeyboardInterrupt):
        loraspan.compress(["a"], out=tmp_path / "out", on_error="skip", **goal, **options)
    meant = Goal(energy=0.9, dtype=WIDTHS["int8"], refine=5, seed=3)
    assert asked == {**options, "skip": True, "given": (["a"], tmp_path / "out", meant)}


@pytest.mark.parametrize("memory", [None, "1GB"], ids=["at-once", "groups"])
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_files_are_hashed_when_asked(memory, on_error, shared, tmp_path):
    root, _ = shared
    options = {"rank": 2, "memory": memory, "on_error": on_error}
    space = loraspan.compress(root / "000", hash_files=True, out=tmp_path / "out", **options)
    wanted = hashlib.sha256((root / "000" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert space.collection.task("000").source.sha256 == wanted
    without = loraspan.compress(root / "000", out=tmp_path / "without", **options)
    assert without.collection.task("000").source.sha256 is None


REFUSED = {
    "no-out": ({"memory": "1GB"}, "name the folder with out="),
    "executor-no-out": ({"executor": ThreadPoolExecutor(1)}, "name the folder with out="),
    "bytes": ({"memory": "1GB", "out": "out", "max_bytes": "1MB"}, r"max_bytes= does not go with .* Give max_error="),
    "device": ({"memory": "1GB", "out": "out", "device": "cpu"}, "device='cpu' does not go with"),
    "overwrite": ({"overwrite": True}, "overwrite= is for the store in out="),
    "root": ({"memory": "1GB", "out": "/"}, "a folder to be made in another; got '/'"),
    "on-error": ({"on_error": "ignore"}, "on_error is 'stop' or 'skip'; got 'ignore'"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused_by_name(options, words, shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    goal = {} if "max_bytes" in options else {"rank": 2}
    with pytest.raises(ArgumentError, match=words):
        loraspan.compress(shared[0], **goal, **options)
    assert list(tmp_path.iterdir()) == []


def test_sources_that_can_be_looked_through_once_are_gone_on_with(shared, tmp_path, monkeypatch):
    folders = sorted(shared[0].iterdir())

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "segments", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(iter(folders), tmp_path / "out", overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "drop", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(iter(folders), tmp_path / "out", overwrite=True)
    # all was done, and not cleared away: with other sources it is another run, which looks at them once more
    assert (tmp_path / "out.progress").exists()
    assert len(run(iter(folders[1:]), tmp_path / "out", overwrite=True).tasks) == COUNT - 1


def test_here_is_a_folder_too(shared, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    seen = []
    run(shared[0], ".", rank=2, progress=lambda *_: seen.append((tmp_path / "here.progress").exists()))
    assert all(seen)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert len(loraspan.open(tmp_path / "here").tasks) == COUNT


def test_files_are_closed_and_groups_forgotten(shared, tmp_path):
    """Not one descriptor stays open for a source, and no more maps than a group has."""
    root, _ = shared
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    seen = []

    def progress(_stage, _done, _total):
        mapped = Path("/proc/self/maps").read_text().count(str(root))
        seen.append((len(list(descriptors.iterdir())) - before, mapped))

    run(root, tmp_path / "out", progress=progress)
    assert max(more for more, _ in seen) <= 3
    # slots of a group hold on to it until its result is there
    assert max(mapped for _, mapped in seen) <= 5


def test_progress_counts_bytes(shared, tmp_path):
    root, adapters = shared
    seen = {}
    run(root, tmp_path / "out", progress=lambda *step: seen.setdefault(step[0], []).append(step[1:]))
    assert list(seen) == ["read", "summarize", "express"]
    total = sum(adapter.nbytes for adapter in adapters)
    for stage in ("summarize", "express"):
        done = [step[0] for step in seen[stage]]
        assert done[0] == 0
        assert done == sorted(set(done))
        assert seen[stage][-1] == (total, total)
        assert len(done) > 2


def test_memory_that_is_too_little_says_what_would_do(shared, tmp_path):
    root, _ = shared
    with pytest.raises(ArgumentError, match="the least is") as refused:
        run(root, tmp_path / "out", rank=4, memory=1)
    assert list(tmp_path.iterdir()) == []
    least = int(str(refused.value).rpartition(" ")[2].replace(",", ""))
    with pytest.raises(ArgumentError, match="the least is"):
        run(root, tmp_path / "out", rank=4, memory=least - 1)
    # with the widths known, the least may be more; what it says then is the last word
    try:
        run(root, tmp_path / "out", rank=4, memory=least)
    except ArgumentError as error:
        shutil.rmtree(tmp_path / "out.progress", ignore_errors=True)
        run(root, tmp_path / "out", rank=4, memory=int(str(error).rpartition(" ")[2].replace(",", "")))
    assert len(loraspan.open(tmp_path / "out").tasks) == COUNT


@pytest.mark.parametrize("memory", ["", "1 XB", "-1", 0, -5, True, 1.5, "GB"])
def test_a_memory_that_is_none_is_refused(memory, shared, tmp_path):
    with pytest.raises(ArgumentError, match=r"memory.* bytes"):
        run(shared[0], tmp_path / "out", memory=memory)
    assert list(tmp_path.iterdir()) == []


def test_adapters_in_memory_and_wrong_words_are_refused(shared, tmp_path):
    root, adapters = shared
    with pytest.raises(ArgumentError, match="'task 0', which is in memory already"):
        run(adapters, tmp_path / "out", on_error="skip")
    with pytest.raises(ArgumentError, match="on_error is 'stop' or 'skip'; got 'ignore'"):
        run(root, tmp_path / "out", on_error="ignore")
    with pytest.raises(ArgumentError, match="below what rounding"):
        run(root, tmp_path / "out", max_error=1e-5, dtype=torch.bfloat16)


def test_what_is_there_is_not_written_over(shared, tmp_path):
    root, _ = shared
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="is no store"):
        run(root, tmp_path / "other")
    run(root, tmp_path / "out", rank=2)
    with pytest.raises(StoreError, match="a store already"):
        run(root, tmp_path / "out", rank=3)
    run(root, tmp_path / "out", rank=3, overwrite=True)
    assert {s.u.shape[1] for s in loraspan.open(tmp_path / "out").collection.slots.values()} == {3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_single_adapter_is_enough(shared, tmp_path):
    root, _ = shared
    assert run(root / "000", tmp_path / "out", rank=2).tasks == ["000"]

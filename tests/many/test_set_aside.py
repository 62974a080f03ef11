"""Adapters that cannot be taken stop a compression, or are set aside by name, in memory as in groups."""

from __future__ import annotations

import re
import shutil

import planted
import pytest

import loraspan
from loraspan.adapters import peft
from loraspan.adapters.base import Adapter, Slot
from loraspan.errors import ArgumentError, FormatError, MismatchError
from many import spoilt
from many.spoilt import SPOILT
from many_runs import COUNT, cut_by, files_of, run, write


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    cut_by(5, monkeypatch)


@pytest.mark.parametrize(("spoil", "name", "kind", "reason"), SPOILT.values(), ids=SPOILT.keys())
def test_a_bad_adapter_stops_the_run_or_is_set_aside(spoil, name, kind, reason, tmp_path):
    write(tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(kind, match=reason):
        run(tmp_path / "in", tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    space = run(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert len(space.tasks) == COUNT - 1
    assert [one.source for one in space.aside] == [str(tmp_path / "in" / name)]
    assert re.search(reason, space.aside[0].reason)
    assert name not in space.tasks
    if spoil is not spoilt.nan:
        # who is not there from the beginning leaves no trace
        shutil.rmtree(tmp_path / "in" / name)
        run(tmp_path / "in", tmp_path / "without")
        assert files_of(tmp_path / "without") == files_of(tmp_path / "out")


@pytest.mark.parametrize(("spoil", "name", "kind", "reason"), SPOILT.values(), ids=SPOILT.keys())
def test_in_memory_the_same_are_set_aside_for_the_same_reasons(spoil, name, kind, reason, tmp_path):
    write(tmp_path / "in", count=12)
    spoil(tmp_path / "in")
    with pytest.raises(kind):
        loraspan.compress(tmp_path / "in", rank=3)
    space = loraspan.compress(tmp_path / "in", rank=3, on_error="skip", out=tmp_path / "out")
    assert space.aside == run(tmp_path / "in", tmp_path / "groups", rank=3, on_error="skip").aside
    assert re.search(reason, str(space.aside[0]))
    shutil.rmtree(tmp_path / "in" / name)
    loraspan.compress(tmp_path / "in", rank=3).save(tmp_path / "without")
    assert files_of(tmp_path / "without") == files_of(tmp_path / "out")


def test_adapters_without_files_are_set_aside_too():
    good = planted.adapters(count=6)
    slots = good[5].slots
    infinite = {path: Slot(slot.down, slot.up / 0, slot.scale) for path, slot in slots.items()}
    bad = [
        Adapter("infinite", infinite),
        Adapter("task 2", slots),
        Adapter("other", planted.adapters(count=1, shape=(40, 57))[0].slots),
    ]
    space = loraspan.compress([*good, *bad], rank=3, on_error="skip")
    assert space.tasks == [adapter.name for adapter in good]
    assert [one.name for one in space.aside] == ["task 2", "other", "infinite"]
    assert {one.source for one in space.aside} == {"an adapter without a file"}
    assert space.errors == loraspan.compress(good, rank=3).errors
    with pytest.raises(ArgumentError, match="there is no adapter to compress: 1 were set aside; the first reason: "):
        loraspan.compress(bad[0], rank=3, on_error="skip")


def test_sources_that_name_nothing_or_one_name_twice(shared, tmp_path):
    root, _ = shared
    sources = [root / "000", root / "nowhere", root / "001", root / "000"]
    with pytest.raises(FormatError, match="nowhere"):
        run(sources, tmp_path / "out")
    with pytest.raises(MismatchError, match="both be task '000'"):
        run([root / "000", root / "000"], tmp_path / "out")
    space = run(sources, tmp_path / "out", on_error="skip")
    assert len(space.tasks) == 2
    assert [one.reason.split(":")[0] for one in space.aside] == [
        str(root / "nowhere"),
        "two adapters would both be task '000'",
    ]
    named = run({"a": root / "000", "b": root / "nowhere"}, tmp_path / "named", on_error="skip")
    assert named.tasks == ["a"]


def test_nobody_left_is_an_error(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match="there is no adapter to compress: 1 were set aside"):
        run(tmp_path / "in", tmp_path / "out", on_error="skip")
    adapters = planted.adapters(count=1)
    slots = {path: Slot(slot.down * float("nan"), slot.up, 1.0) for path, slot in adapters[0].slots.items()}
    peft.write(Adapter("bad", slots), tmp_path / "bad")
    with pytest.raises(ArgumentError, match="there is no adapter to compress"):
        run(tmp_path / "bad", tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()

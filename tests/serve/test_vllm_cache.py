"""A bounded folder of exported adapters: what stays in it, what leaves, and who may write there."""

import os
from types import SimpleNamespace

import pytest

from loraspan.errors import StoreError
from loraspan.serve.vllm_cache import Cache
from serve.test_vllm import D, made


def age(folder, seconds):
    """Make a folder look as if it had been taken so long ago."""
    before = folder.stat().st_mtime - seconds
    os.utime(folder, (before, before))


def fill(cache, *keys, d=D):
    return [cache.take(key, lambda: made("x", 1, d)) for key in keys]


def left(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def test_what_was_taken_longest_ago_leaves(tmp_path):
    # 1.7 kB of factors each, 20 kB of the large ones, and 9.2 kB allowed for names
    cache = Cache(tmp_path, 36_000, hold=False)
    fill(cache, "a", "b", "c")
    for i, key in enumerate("abc"):
        age(tmp_path / key, 1000 - i)
    fill(cache, "a")
    assert left(tmp_path) == {"a", "b", "c"}
    fill(cache, "d", d=800)
    assert left(tmp_path) == {"a", "c", "d"}
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 36_000
    # what was taken within the grace may be being read: it stays, and then nothing else leaves in vain
    with pytest.raises(StoreError, match="no room"):
        fill(cache, "e", d=800)
    assert left(tmp_path) == {"a", "c", "d"}


def test_no_more_than_the_file_system_has(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 1_000_000)
    monkeypatch.setattr("loraspan.serve.vllm_cache.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StoreError, match="1000 are left"):
        fill(cache, "a")
    assert left(tmp_path) == set()


def test_what_a_killed_process_left_is_swept(tmp_path):
    for name in (".a.0123abcd.new", ".b.0123abcd.gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(10))
    fill(Cache(tmp_path, 100_000), "c")
    assert left(tmp_path) == {"c"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lost_a_file_is_made_again(tmp_path, name):
    """As where files of some age are swept."""
    (folder,) = fill(Cache(tmp_path, 100_000), "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / name).unlink()
    fill(Cache(tmp_path, 100_000), "a")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_else_lies_there_is_in_the_way_of_nothing(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "note").write_text("not a folder")
    fill(Cache(tmp_path, 100_000), "a")
    assert left(tmp_path) == {"a", "other"}


def test_what_was_released_may_leave(tmp_path):
    cache = Cache(tmp_path, 23_500, grace=0.0)
    fill(cache, "a", "b")
    with pytest.raises(StoreError, match="2 of its 2"):
        fill(cache, "c", d=400)
    cache.release("a")
    fill(cache, "c", d=400)
    assert left(tmp_path) == {"b", "c"}


def test_a_cache_that_others_may_write_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    Cache(tmp_path / "mine", 1, private=True)
    assert (tmp_path / "mine").stat().st_mode & 0o077 == 0
    for name in ("open", "link"):
        with pytest.raises(StoreError, match="this user's own"):
            Cache(tmp_path / name, 1, private=True)

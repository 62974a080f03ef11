"""Tasks of a store for vLLM, against a stand-in of its documented interface: vLLM itself needs a build for a GPU."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from importlib import metadata

import pytest
import torch

import oracles
from adapters.test_peft_models import CASES
from loraspan import compress, store
from loraspan.adapters import Adapter, Slot, Source
from loraspan.errors import ArgumentError, FormatError, StoreError, UnsupportedError
from loraspan.serve import vllm
from serve import vllm_stand_in
from serve.samples import space_of
from serve.vllm_stand_in import Server

U32 = oracles.UNIT_ROUNDOFF[torch.float32]
BASE = "tiny/base"
D, N, R = 40, 30, 3


def made(name, seed, d=D):
    rng = torch.Generator().manual_seed(seed)
    slots = {path: Slot(torch.randn(R, d, generator=rng), torch.randn(N, R, generator=rng), 0.7) for path in ("q", "v")}
    return Adapter(name, slots, source=Source(base_model=BASE))


TASKS = ("sql", "legal", "chat")


@pytest.fixture
def space(tmp_path):
    space = compress([made(name, i) for i, name in enumerate(TASKS)], max_error=1e-5, dtype=torch.float32)
    space.save(tmp_path / "team.span")
    return space


@pytest.fixture
def settings(space, tmp_path):
    return vllm.Settings(space.path, tmp_path / "cache", 1_000_000)


@pytest.fixture
def engine(monkeypatch, space, tmp_path):
    """Give a function that starts a server with the resolver, and settings given beside those of ``settings``."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("LORASPAN_VLLM_STORE", str(space.path))
    monkeypatch.setenv("LORASPAN_VLLM_CACHE", str(tmp_path / "cache"))

    def start(model=BASE, max_cpu_loras=2, **more):
        for name, value in more.items():
            monkeypatch.setenv(f"LORASPAN_VLLM_{name}", value)
        vllm.register()
        return Server(model, max_cpu_loras=max_cpu_loras)

    return start


def is_task(loaded, space, name):
    """Fail unless a worker runs with the ``dW`` of a task."""
    for path, slot in space.reconstruct(name).slots.items():
        down, up, scale = loaded[path]
        assert (scale * up @ down - slot.up @ slot.down).norm() <= 8 * U32 * slot.up.norm() * slot.down.norm()


def test_a_task_is_served_when_it_is_asked_for(engine, space, tmp_path):
    server = engine()
    assert not list((tmp_path / "cache").glob("*~*"))

    for name in TASKS:
        is_task(server.ask(name), space, name)

    assert server.ask("sqll") == 404
    assert len(list((tmp_path / "cache").glob("*~*"))) == 3


def test_a_worker_that_forgot_an_adapter_finds_it_again(engine, space):
    """However small the cache: what a server was given stays while it runs, and the rest is refused."""
    server = engine(max_cpu_loras=1, CACHE_BYTES="22kB")
    for name in ("sql", "legal", "sql", "legal"):
        is_task(server.ask(name), space, name)
    with pytest.raises(StoreError, match=r"no room.*2 of its 2 adapters"):
        server.ask("chat")
    for name in ("sql", "legal"):
        is_task(server.ask(name), space, name)


def test_what_is_set_is_done(engine, tmp_path):
    """The dtype of the factors, and that what a running server has may leave after a minute."""
    server = engine(DTYPE="bf16", HOLD="0", CACHE_BYTES="12kB")
    assert {factor.dtype for down, up, _ in server.ask("sql").values() for factor in (down, up)} == {torch.bfloat16}
    (first,) = (tmp_path / "cache").glob("sql~*")
    with pytest.raises(StoreError, match="no room"):
        server.ask("legal")
    os.utime(first, (0, 0))
    server.ask("legal")
    assert not first.exists()


def test_adapters_lie_in_memory_where_nothing_else_is_set(engine, monkeypatch, tmp_path):
    assert str(vllm._TMPFS) == "/dev/shm"
    monkeypatch.setattr(vllm, "_TMPFS", tmp_path / "memory")
    (tmp_path / "memory").mkdir()
    monkeypatch.delenv("LORASPAN_VLLM_CACHE")
    engine().ask("sql")
    (folder,) = (tmp_path / "memory").iterdir()
    assert folder.name == f"loraspan-vllm-{os.getuid()}"
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.glob("sql~*"))) == 1


def test_another_base_model_is_not_found(engine, space, caplog):
    server = engine(model="/models/base")
    with caplog.at_level(logging.WARNING):
        assert server.ask("sql") == 404
    assert "LORASPAN_VLLM_BASE_MODEL=/models/base" in caplog.text
    is_task(engine(model="/models/base", BASE_MODEL="/models/base").ask("sql"), space, "sql")


def test_without_a_store_nothing_is_registered(engine, monkeypatch):
    monkeypatch.delenv("LORASPAN_VLLM_STORE")
    engine()
    assert not vllm_stand_in.registry().resolvers


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"STORE": "nowhere.span"}, StoreError, "nowhere.span"),
        ({"CACHE_BYTES": "much"}, ArgumentError, "LORASPAN_VLLM_CACHE_BYTES.*'much'"),
        ({"DTYPE": "float16"}, ArgumentError, "LORASPAN_VLLM_DTYPE.*bf16.*'float16'"),
        ({"HOLD": "yes"}, ArgumentError, "LORASPAN_VLLM_HOLD.*'yes'"),
        ({"CACHE_SIZE": "1GB"}, ArgumentError, "LORASPAN_VLLM_CACHE_SIZE"),
    ],
)
def test_a_wrong_setting_is_an_error_at_the_start(engine, settings, error, words):
    with pytest.raises(error, match=words):
        engine(**settings)
    assert not vllm_stand_in.registry().resolvers


def test_the_entry_point_is_declared():
    (found,) = [each for each in metadata.entry_points(group="vllm.general_plugins") if each.name == "loraspan"]
    assert found.load() is vllm.register


def test_a_changed_task_is_another_adapter(settings, space):
    folders = vllm.TaskFolders(settings)
    before = {name: folders.resolve(BASE, name) for name in TASKS}
    space.replace([made("sql", 9)], max_error=1e-5)
    space.rename("chat", "talk")
    space.remove("legal")
    space.add([made("new", 5)], max_error=1e-5)

    after = {name: folders.resolve(BASE, name) for name in (*TASKS, "talk", "new")}
    again = {name: vllm.TaskFolders(settings).resolve(BASE, name) for name in after}

    assert after["legal"] is after["chat"] is None
    assert after["sql"].path != before["sql"].path
    assert after["sql"].number != before["sql"].number
    is_task(vllm_stand_in.load(after["sql"].path), space, "sql")
    is_task(vllm_stand_in.load(after["talk"].path), space, "talk")
    # stable: another process gets the same
    assert again == after
    space.add([made("newer", 6)], max_error=1e-5)
    assert {name: folders.resolve(BASE, name) for name in after} == after


def test_numbers_fit_in_32_bits_and_differ(settings, monkeypatch):
    folders = vllm.TaskFolders(settings)
    assert all(1 <= folders.resolve(BASE, name).number < 2**31 for name in TASKS)
    monkeypatch.setattr(vllm, "_LAST_ID", 3)
    crowded = vllm.TaskFolders(settings)
    numbers = [crowded.resolve(BASE, name).number for name in (*TASKS, *TASKS)]
    assert sorted(numbers[:3]) == [1, 2, 3]
    assert numbers[:3] == numbers[3:]
    assert [vllm.TaskFolders(settings)._number(f"{content:064x}") for content in (0, 2 << 192, 3 << 192)] == [1, 3, 1]


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "x" * 10_000, "\ud800", "a\nb", "SQL", "..", "~"])
def test_a_name_is_never_a_path(settings, space, name):
    space.rename("sql", name)
    found = vllm.TaskFolders(settings).resolve(BASE, name)
    assert found.path.parent == settings.cache
    is_task(vllm_stand_in.load(found.path), space, name)
    assert vllm.TaskFolders(settings).resolve(BASE, found.path.name) is None


def test_requests_at_once_make_one_folder_each(engine, monkeypatch):
    count = []
    rebuild = vllm.Fit.rebuild
    monkeypatch.setattr(vllm.Fit, "rebuild", lambda *args: count.append(args[2]) or rebuild(*args))
    engine()
    resolver = vllm_stand_in.registry().get_resolver("loraspan")

    async def ask():
        return await asyncio.gather(*(resolver.resolve_lora(BASE, name) for name in (*TASKS, *TASKS, "x")))

    *requests, none = asyncio.run(ask())
    assert none is None
    assert sorted(count) == sorted(TASKS)
    assert [request.lora_path for request in requests[:3]] == [request.lora_path for request in requests[3:]]
    assert [request.lora_name for request in requests] == [*TASKS, *TASKS]


def test_what_vllm_cannot_take_is_an_error_and_not_unknown(tmp_path, caplog, engine):
    space = space_of("llama", tmp_path / "in", {"sql": CASES["saved-module"][1]})
    space.save(tmp_path / "head.span")
    server = engine(STORE=str(tmp_path / "head.span"))
    with pytest.raises(UnsupportedError, match="modules_to_save"):
        server.ask("sql")
    assert "task 'sql' cannot be served" in caplog.text


def damaged_manifest(path):
    file = max(path.glob("manifest-*.json"))
    file.write_bytes(file.read_bytes()[:-40])


def missing_segment(path):
    next(iter(path.glob("tasks-*"))).unlink()


@pytest.mark.parametrize("damage", [damaged_manifest, missing_segment])
def test_a_damaged_store_is_an_error_and_not_unknown(engine, space, damage):
    damage(space.path)
    server = engine()
    with pytest.raises((StoreError, FormatError), match=r"team\.span"):
        server.ask("sql")


def test_what_is_open_is_served_while_its_files_leave(settings, space):
    """A generation that garbage collection has removed was mapped before."""
    folders = vllm.TaskFolders(settings)
    folders.resolve(BASE, "sql")
    for _ in range(2):
        space.refit(rank=2)
    before = folders._opened
    store.gc(space.path, keep=0, grace=0)
    folders._opened = before
    path = folders._cache.take("legal", lambda: folders._fit.rebuild(before.collection, "legal", None))
    assert vllm_stand_in.load(path)
    assert folders._current().generation == 3


OTHER = """
import sys
from pathlib import Path
from loraspan.serve import vllm
folders = vllm.TaskFolders(vllm.Settings(Path(sys.argv[1]), Path(sys.argv[2]), 22_000))
print(folders.resolve("tiny/base", "sql").path, flush=True)
sys.stdin.read()
"""


def test_processes_share_a_cache_and_hold_what_they_took(settings, space):
    """One process has a task; another one uses its folder, may not remove it, and may once the first was killed."""
    command = [sys.executable, "-c", OTHER, str(space.path), str(settings.cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            path = other.stdout.readline().strip()
            mine = vllm.TaskFolders(settings._replace(cache_bytes=22_000))
            mine._cache._grace = 0.0
            mine.resolve(BASE, "legal")
            with pytest.raises(StoreError, match="2 of its 2"):
                mine.resolve(BASE, "chat")
            is_task(vllm_stand_in.load(path), space, "sql")
        finally:
            other.send_signal(signal.SIGKILL)
            other.communicate(timeout=30)
    mine.resolve(BASE, "chat")
    assert not os.path.exists(path)  # noqa: PTH110 (it came as text)
    is_task(vllm_stand_in.load(mine.resolve(BASE, "legal").path), space, "legal")


def test_a_cache_too_small_for_one_task_says_so(settings):
    with pytest.raises(StoreError, match="may take 1 bytes"):
        vllm.TaskFolders(settings._replace(cache_bytes=1)).resolve(BASE, "sql")

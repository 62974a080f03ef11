import signal
import subprocess
import sys
import threading

import pytest

from loraspan import store
from loraspan.errors import ArgumentError, StoreError
from loraspan.store import files
from store.growing import DAY, age, generations, six_generations
from store.samples import listing, without


@pytest.fixture
def space(tmp_path):
    return six_generations(tmp_path)


def test_a_pinned_generation_stays(space):
    with store.pin(space, 2) as number, store.pin(space, 2), store.pin(space, 4):
        found = store.gc(space, keep=0)
        assert number == 2
        assert (found.generations, found.kept) == ((1, 3, 5), {2: "pinned", 4: "pinned"})
        assert generations(space) == [2, 4, 6]
        store.open(space, generation=2)

    assert store.gc(space, keep=0).generations == (2, 4)
    assert not [name for name in listing(space) if name.startswith(".pin-")]


def test_the_current_generation_is_pinned_unless_another_is_named(space):
    with store.pin(space) as number:
        opened = store.open_at(space, number)
        store.commit(opened, without(opened.collection, "task 0"))
        age(space, 10 * DAY)
        assert store.gc(space, keep=0).kept == {6: "pinned"}


PINNING = """
import sys, time
from loraspan import store
with store.pin(sys.argv[1], 3):
    print("pinned", flush=True)
    time.sleep(60)
"""


def test_a_pin_ends_with_its_process(space):
    """A process that is killed removes nothing; its lock goes with it."""
    with subprocess.Popen([sys.executable, "-c", PINNING, str(space)], stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"pinned\n"
        assert store.gc(space, keep=0).kept == {3: "pinned"}
        reader.send_signal(signal.SIGKILL)
        reader.wait(30)
    pins = [name for name in listing(space) if name.startswith(".pin-")]

    dry = store.gc(space, keep=0, dry_run=True)
    still = [name for name in listing(space) if name.startswith(".pin-")]
    found = store.gc(space, keep=0)

    assert len(pins) == 1
    assert (dry, still) == (found, pins)
    assert found.generations == (3,)
    assert not [name for name in listing(space) if name.startswith(".pin-")]


@pytest.mark.parametrize(
    ("generation", "error", "words"), [(7, ArgumentError, "from 1 to 6"), (2, StoreError, "no longer")]
)
def test_what_is_gone_cannot_be_pinned(space, generation, error, words):
    store.gc(space, keep=0)

    with pytest.raises(error, match=words), store.pin(space, generation):
        pass

    assert not [name for name in listing(space) if name.startswith(".pin-")]


def test_a_folder_that_may_only_be_read_cannot_be_pinned(space, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "create", refuse)

    with pytest.raises(StoreError, match=r"cannot be pinned: Permission denied.*open it without"), store.pin(space):
        pass


def test_a_pin_waits_for_garbage_and_then_sees_what_is_left(space, monkeypatch):
    """Between the look for pins and the removal no pin can come."""
    reached, go_on, told = threading.Event(), threading.Event(), []
    honest = files.remove

    def wait(path):
        reached.set()
        assert go_on.wait(30)
        honest(path)

    def late():
        try:
            with store.pin(space, 1):
                told.append("pinned")
        except StoreError as error:
            told.append(str(error))

    monkeypatch.setattr(files, "remove", wait)
    threads = [threading.Thread(target=lambda: store.gc(space, keep=0)), threading.Thread(target=late)]
    threads[0].start()
    assert reached.wait(30)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)

    assert len(told) == 1
    assert "generation 1 is no longer there" in told[0]

"""Slots side by side: what comes back, what is raised, and which threads are left behind."""

import threading
import time

import pytest
import torch

from loraspan.collection.abreast import abreast


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.usefixtures("four_threads")
def test_items_come_back_in_order_and_are_counted():
    counted = []
    assert abreast(lambda i: i * i, range(20), counted.append) == [i * i for i in range(20)]
    assert counted == list(range(20))


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("items", "workers", "each"), [(9, 4, 1), (2, 2, 2), (3, 3, 1), (1, 1, 4)])
def test_threads_are_shared_out(items, workers, each):
    together = threading.Barrier(workers)

    def work(i):
        if i < workers:
            # nobody comes through unless so many are at work at a time
            together.wait(timeout=30)
        return torch.get_num_threads(), threading.get_ident()

    found = abreast(work, range(items), lambda _: None)
    assert {threads for threads, _ in found} == {each}
    assert len({thread for _, thread in found}) == workers


@pytest.mark.usefixtures("four_threads")
def test_whoever_comes_meanwhile_and_afterwards_has_all_threads():
    def work(_):
        return in_another_thread(torch.get_num_threads)

    assert abreast(work, range(4), lambda _: None) == [4] * 4
    assert torch.get_num_threads() == 4
    assert in_another_thread(torch.get_num_threads) == 4


@pytest.mark.usefixtures("four_threads")
def test_the_first_error_in_order_is_raised_and_no_more_begun():
    begun, release = [], threading.Event()

    def work(i):
        begun.append(i)
        if i == 1:
            # item 3 has failed by then
            release.wait(timeout=30)
        if i == 3:
            release.set()
        if i in (1, 3):
            raise ValueError(i)
        if i > 3:
            # time for the error to be seen
            time.sleep(0.01)
        return i

    with pytest.raises(ValueError, match=r"^1$"):
        abreast(work, range(1000), lambda _: None)
    assert len(begun) < 1000
    assert torch.get_num_threads() == 4


def test_one_at_a_time_stays_in_this_thread():
    here = threading.get_ident()
    assert abreast(lambda _: threading.get_ident(), range(3), lambda _: None, 1) == [here] * 3
    assert abreast(lambda _: 0, [], lambda _: None) == []


@pytest.mark.usefixtures("four_threads")
def test_where_no_thread_can_be_begun_nobody_waits(monkeypatch):
    """As under a limit on processes: whoever has begun must not wait for the others for ever."""
    honest, begun = threading.Thread.start, []

    def start(thread):
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        honest(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        abreast(lambda i: i, range(9), lambda _: None)
    for thread in begun:
        thread.join(timeout=30)
    assert [thread.is_alive() for thread in begun] == [False, False]
    assert torch.get_num_threads() == 4

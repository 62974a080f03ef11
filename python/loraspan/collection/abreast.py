"""Work on several slots side by side: what is too small for several threads at once is then no longer waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")

# Slots at once: the working memory of each is that of several passes.
_MOST = 8
# held while torch's default for new threads is another than it was
_DEFAULT = threading.Lock()


def abreast(
    work: Callable[[T], S], items: Sequence[T], done: Callable[[int], None], most: int | None = None
) -> list[S]:
    """Give ``work`` of every item, in order.

    torch's threads are shared out: eight items at most are at work, in threads of their own, each with as many for its
    operators. Those give the same bits whatever their number.

    Args:
        work: of one item; may run in another thread.
        items: what to work on.
        done: called in this thread with the number of those, in order, that are finished.
        most: how many may be at work at a time, if fewer.

    Raises:
        Exception: that of the first item that has one; no other is begun after it is known.
    """
    workers = min(_MOST if most is None else most, len(items), torch.get_num_threads())
    found: list[S] = []
    if workers <= 1:
        for i, item in enumerate(items):
            done(i)
            found.append(work(item))
        return found
    with _threads(workers) as pool:
        for i, future in enumerate([pool.submit(work, item) for item in items]):
            done(i)
            found.append(future.result())
    return found


def _set_own_threads(count: int) -> None:
    # torch keeps the number by thread, and the last that was set for those to come: asked for once, it takes that over
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextmanager
def _threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads that share out torch's, and nobody else's are fewer once they have begun."""
    begun = threading.Barrier(workers)
    with _DEFAULT:
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers, "loraspan", _set_own_threads, (threads // workers,))
        try:
            list(pool.map(lambda _: begun.wait(), range(workers)))
        except BaseException:
            # those that have begun would wait for the others for ever
            begun.abort()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)

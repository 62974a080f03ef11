"""Run pure functions through an executor, and take their results in the order in which they were asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")
Job = tuple[Callable[..., T], tuple[Any, ...]]


def in_order(executor: Executor | None, jobs: Iterable[Job[T]], most: int) -> Iterator[T]:
    """Give the results of jobs, at most ``most`` of which are at work or waiting to be taken.

    If one fails, or the caller stops asking, those that have not begun are cancelled.

    Args:
        executor: any of ``concurrent.futures``; None runs each job here when its result is asked for.
        jobs: functions and their arguments; both can be pickled.
        most: at least 1.

    Example:
        >>> list(in_order(None, ((pow, (2, i)) for i in range(4)), 2))
        [1, 2, 4, 8]
    """
    if executor is None:
        for function, arguments in jobs:
            yield function(*arguments)
        return
    waiting: deque[Future[T]] = deque()
    try:
        for function, arguments in jobs:
            if len(waiting) == most:
                yield waiting.popleft().result()
            waiting.append(executor.submit(function, *arguments))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def run(executor: Executor | None, function: Callable[..., T], *arguments: Any) -> T:
    """Give the result of one job."""
    return next(in_order(executor, [(function, arguments)], 1))

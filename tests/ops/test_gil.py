"""The kernels run without the interpreter's lock: other Python threads get on during a call."""

import sys
import threading
import time

import pytest
import torch

from loraspan import _core
from loraspan.ops import combine, gram, power, reconstruct, sketch
from oracles import F64

X = torch.ones(32, 4096)
W = torch.ones(32, 8, dtype=F64)
CALLS = {
    "gram": lambda: gram(X),
    "combine": lambda: combine(X, W),
    "sketch": lambda: sketch(X, 8),
    "power": lambda: power(X, W),
    "reconstruct": lambda: reconstruct(X.T, X[:, :32]),
}


@pytest.mark.parametrize("operator", CALLS)
def test_another_thread_gets_on(operator, monkeypatch):
    """Counted, not timed: nobody takes the lock from this thread, so the other one moves only if a call gives it up."""
    honest, calls = getattr(_core, operator), []
    monkeypatch.setattr(_core, operator, lambda *arguments: calls.append(arguments) or honest(*arguments))
    # the result is kept: the calls below write to its memory
    result = CALLS[operator]()
    [arguments] = calls
    ticks, done = 0, False

    def tick():
        nonlocal ticks
        while not done:
            ticks += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks
        # once would do, were the machine never busy
        for _ in range(1000):
            honest(*arguments)
            if ticks > before:
                break
        during = ticks
    finally:
        done = True
        sys.setswitchinterval(interval)
        thread.join()
    assert during > before
    assert result is not None

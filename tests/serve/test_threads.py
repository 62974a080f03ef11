"""Requests in flight at once, each with its own tasks: threads, coroutines, and a space that changes meanwhile."""

import asyncio
import threading
from contextvars import copy_context

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import loraspan
import oracles
import serving
from loraspan.errors import ArgumentError
from loraspan.serve import layer

REST = serving.adapters(noise=0.1)


class Meeting(serving.Tower):
    """Between its layers every caller waits for the others."""

    def __init__(self, wait):
        super().__init__()
        self.wait = wait

    def forward(self, x):
        for block in self.layers:
            x = block(x)
            self.wait()
        return x


def test_threads_do_not_see_each_others_tasks():
    space, x, names = serving.team(), serving.batch(1), ["task 0", "task 1", "task 2", None]
    barrier = threading.Barrier(2 * len(names), timeout=60)
    served = loraspan.attach(Meeting(barrier.wait), space)
    found = {}

    def ask(name, form):
        if form == "context":
            with served.tasks(name):
                found[name, form] = served(x)
        else:
            found[name, form] = served(x, task_ids=space.ids(name))

    threads = [threading.Thread(target=ask, args=(name, form)) for name in names for form in ("context", "tensor")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (name, _), y in found.items():
        serving.close(y, serving.expected(space, x, [name]))
    assert len(found) == len(threads)


def test_coroutines_do_not_see_each_others_tasks():
    space, x, names = serving.team(), serving.batch(1), ["task 0", "task 1", None, "task 3"]
    served = loraspan.attach(serving.Tower(), space)

    async def ask(name):
        with served.tasks(name):
            y = x
            for block in served.model.layers:
                await asyncio.sleep(0)
                y = block(y)
        return y

    async def ask_all():
        return await asyncio.gather(*map(ask, names))

    for name, y in zip(names, asyncio.run(ask_all()), strict=True):
        serving.close(y, serving.expected(space, x, [name]))


def test_contexts_nest_and_end_where_they_began():
    space, x = serving.team(), serving.batch(1)
    served = loraspan.attach(serving.Tower(), space)
    alone = {}
    for name in ("task 0", "task 1", None):
        with served.tasks(name):
            alone[name] = served(x)

    def inner():
        with served.tasks("task 1"):
            assert oracles.same_bits(served(x), alone["task 1"])
            with served.tasks(None):
                assert oracles.same_bits(served(x), alone[None])
            assert oracles.same_bits(served(x, task_ids=space.ids("task 0")), alone["task 0"])
            raise ZeroDivisionError

    with served.tasks("task 0"):
        with pytest.raises(ZeroDivisionError):
            inner()
        assert oracles.same_bits(served(x), alone["task 0"])
    assert oracles.same_bits(served(x), alone[None])


def test_a_block_that_is_left_elsewhere_than_it_was_entered_says_so():
    """A generator's steps run where the next one is asked for: its block is not around them there."""
    space, x = serving.team(), serving.batch(1)
    served = loraspan.attach(serving.Tower(), space)

    def steps(name):
        with served.tasks(name):
            yield served(x)
            yield served(x)

    stream = steps("task 0")
    copy_context().run(next, stream)
    with pytest.raises(ArgumentError, match="left elsewhere than it was entered"):
        list(stream)
    one, other = steps("task 0"), steps("task 1")
    next(one), next(other)
    for each in (one, other):
        with pytest.raises(ArgumentError, match="left elsewhere than it was entered"):
            each.close()


def test_what_was_named_while_inferring_serves_gradients_too():
    space, x = serving.team(), serving.batch(4)
    served = loraspan.attach(serving.Tower(), space)
    with torch.inference_mode(), served.tasks(["task 0", "task 1"]):
        served(x)
    x.requires_grad_()
    with served.tasks(["task 0", "task 1"]):
        served(x).sum().backward()
    assert (x.grad != 0).any()


def test_two_models_have_their_own_tasks():
    space, x = serving.team(), serving.batch(1)
    one, other = loraspan.attach(serving.Tower(), space), loraspan.attach(serving.Tower(), serving.team(seed=5))
    with one.tasks("task 0"), other.tasks("task 1"):
        serving.close(one(x), serving.expected(space, x, ["task 0"]))
    with one.tasks("task 0"):
        assert oracles.same_bits(other(x), serving.Tower()(x))


def test_a_space_may_change_while_others_are_served():
    space, x = serving.team(), serving.batch(1)
    served = loraspan.attach(serving.Tower(), space)
    wanted, stop, wrong, done = serving.expected(space, x, ["task 0"]), threading.Event(), [], [0]

    def ask():
        while not stop.is_set():
            try:
                with torch.no_grad():
                    serving.close(served(x, task_ids=torch.tensor([0])), wanted)
                done[0] += 1
            except BaseException as error:
                wrong.append(error)
                return

    thread = threading.Thread(target=ask)
    thread.start()
    for adapter in REST[4:]:
        space.add(adapter, max_error=0.05)
        space.remove(adapter.name)
        space.add(adapter, max_error=0.05)
    stop.set()
    thread.join()
    assert not wrong
    assert done[0]


def test_a_refit_between_two_lines_is_seen_and_the_new_tables_taken(monkeypatch):
    space, x = serving.team(), serving.batch(2)
    served, honest = loraspan.attach(serving.Tower(), space), layer.shared_lora_

    def late(*args, **options):
        monkeypatch.setattr(layer, "shared_lora_", honest)
        space.refit(rank=5)
        return honest(*args, **options)

    monkeypatch.setattr(layer, "shared_lora_", late)
    with torch.no_grad(), served.tasks(["task 0", None]):
        y = served(x)
    serving.close(y, serving.expected(space, x, ["task 0", None]))


def test_layers_that_are_computed_again_in_backward_know_their_tasks_or_refuse():
    class Kept(serving.Tower):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    space, x = serving.team(), serving.batch(2).requires_grad_()
    served = loraspan.attach(Kept(), space)
    with served.tasks(["task 0", "task 1"]):
        served(x).square().sum().backward()
    kept, x.grad = x.grad, None
    plain = loraspan.attach(serving.Tower(), space)
    plain(x, task_ids=space.ids(["task 0", "task 1"])).square().sum().backward()
    assert oracles.same_bits(kept, x.grad)
    y = served(x, task_ids=space.ids(["task 0", "task 1"]))
    with pytest.raises(ArgumentError, match="is computed again during backward"):
        y.sum().backward()

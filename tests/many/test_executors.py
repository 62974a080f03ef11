"""Whoever does the work, in whatever order it gets done, the store has the same bits; and memory is counted right."""

from __future__ import annotations

import itertools
import pickle
import shutil
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

from loraspan.errors import NotFiniteError
from loraspan.many.census import Map, Member, Origin
from loraspan.many.groups import IN_FLIGHT, Tally, cut, limit_of, sample, standing, summary_cost
from loraspan.many.in_order import in_order
from loraspan.many.tree import Tree
from many_runs import cut_by, files_of, run, write


class Backwards(Executor):
    """Does nothing until results are asked for, and then what was submitted last first."""

    def __init__(self, most):
        self.waiting, self.most, self.seen = [], most, 0

    def submit(self, function, /, *arguments):
        future = Lazy(self)
        # as another process would get them
        self.waiting.append((future, *pickle.loads(pickle.dumps((function, arguments)))))
        self.seen = max(self.seen, len(self.waiting))
        assert len(self.waiting) <= self.most
        return future

    def do_all(self):
        while self.waiting:
            future, function, arguments = self.waiting.pop()
            future.set_result(pickle.loads(pickle.dumps(function(*arguments))))


class Lazy(Future):
    def __init__(self, executor):
        super().__init__()
        self.executor = executor

    def result(self, timeout=None):
        if not self.done():
            self.executor.do_all()
        return super().result(timeout)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    write(root)
    return root


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    cut_by(3, monkeypatch)


@pytest.mark.parametrize("goal", [{"max_error": 0.05}, {"rank": 4}, {"energy": 0.95}], ids=["error", "rank", "energy"])
def test_results_do_not_depend_on_the_executor(goal, sources, tmp_path):
    run(sources, tmp_path / "here", **goal)
    expected = files_of(tmp_path / "here")
    backwards = Backwards(IN_FLIGHT)
    run(sources, tmp_path / "backwards", executor=backwards, **goal)
    assert files_of(tmp_path / "backwards") == expected
    assert backwards.seen == IN_FLIGHT
    with ThreadPoolExecutor(3) as threads:
        run(sources, tmp_path / "threads", executor=threads, **goal)
    assert files_of(tmp_path / "threads") == expected


def test_results_do_not_depend_on_processes(sources, tmp_path):
    run(sources, tmp_path / "here")
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        run(sources, tmp_path / "there", executor=processes)
    assert files_of(tmp_path / "there") == files_of(tmp_path / "here")


def test_a_failure_elsewhere_comes_here(sources, tmp_path):
    from safetensors.torch import load_file, save_file

    root = tmp_path / "in"
    shutil.copytree(sources, root)
    path = root / "020" / "adapter_model.safetensors"
    save_file({key: t * float("nan") for key, t in load_file(path).items()}, path)
    with ThreadPoolExecutor(2) as threads, pytest.raises(NotFiniteError, match="adapter '020'"):
        run(root, tmp_path / "out", executor=threads)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_than_so_many_are_in_flight_and_order_is_kept(most):
    executor = Backwards(most)
    taken = list(in_order(executor, ((pow, (2, i)) for i in range(11)), most))
    assert taken == [2**i for i in range(11)]
    assert executor.seen == most


def test_what_has_not_begun_is_cancelled_after_a_failure():
    gate, begun = threading.Event(), []

    def job(i):
        begun.append(i)
        if i == 0:
            raise ValueError("the first")
        gate.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="the first"):
            list(in_order(pool, ((job, (i,)) for i in range(9)), 9))
        gate.set()
    assert len(begun) <= 2


# -- groups and trees ----------------------------------------------------------------------------------------------


def member(i, ranks):
    maps = tuple(Map(path, 64, 32, "linear", None, rank) for path, rank in ranks.items())
    return Member(Origin(str(i), str(i), None, (1, 2, 3, 4)), 100, maps)


MEMBERS = [member(i, {"q": 1 + i % 4, **({"v": 2} if i % 3 else {})}) for i in range(50)] + [member(50, {"late": 3})]
SLOTS = {path: Map(path, 64, 32, "linear", None, 1) for path in ("q", "v", "late")}
COST = summary_cost(SLOTS, dict.fromkeys(SLOTS, 16))


def cost_of(chosen):
    tally = Tally()
    for i in chosen:
        tally.add(MEMBERS[i].maps)
    return COST(tally)


@pytest.mark.parametrize("limit", [0, 30_000, 60_000, 10**9])
def test_groups_are_all_members_in_order_and_as_large_as_the_limit_lets_them(limit):
    found = cut(MEMBERS, COST, limit)
    assert list(itertools.chain(*found)) == list(range(len(MEMBERS)))
    for group, following in itertools.pairwise(found):
        assert len(group) == 1 or cost_of(group) <= limit
        assert cost_of([*group, following[0]]) > limit
    assert (len(found) == 1) == (limit == 10**9)


def test_memory_holds_the_groups_in_flight_and_a_merge():
    memory = 100_000_000
    limit = limit_of(memory, MEMBERS, [COST])
    assert standing(len(MEMBERS)) + (IN_FLIGHT + 1) * limit <= memory
    assert standing(len(MEMBERS)) + (IN_FLIGHT + 1) * (limit + 1) > memory


@pytest.mark.parametrize("limit", [0, 75_000, 10**9])
def test_a_sample_is_spread_over_all_and_has_every_slot(limit):
    chosen = sample(MEMBERS, SLOTS, COST, limit)
    assert chosen == sorted(set(chosen))
    assert {each.path for i in chosen for each in MEMBERS[i].maps} == set(SLOTS)
    if limit == 10**9:
        assert chosen == list(range(len(MEMBERS)))
    if limit == 75_000:
        assert cost_of(chosen[:-1]) <= limit
        gaps = [b - a for a, b in itertools.pairwise(chosen[:-1])]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("count", "arity"), [(1, 2), (2, 2), (5, 2), (9, 3), (64, 8), (65, 8)])
def test_a_tree_merges_every_leaf_once_in_order(count, arity):
    made = {}
    tree = Tree(count, arity, made.__contains__)
    assert list(tree.missing()) == list(range(count))
    for leaf in range(count):
        made[(0, leaf)] = [leaf]
        while ready := list(tree.ready()):
            for node, children in ready:
                assert len(children) <= arity
                made[node] = list(itertools.chain(*(made[child] for child in children)))
        for node in list(tree.covered()):
            del made[node]
        assert list(tree.missing()) == list(range(leaf + 1, count))
        # a few a level are kept, not all
        assert len(made) <= (arity - 1) * (tree.root[0] + 1) + 1
    assert made == {tree.root: list(range(count))}


def test_the_order_in_which_leaves_come_changes_no_merge():
    def merged(order):
        made, merges = {}, []
        tree = Tree(11, 3, made.__contains__)
        for leaf in order:
            made[(0, leaf)] = True
            while ready := list(tree.ready()):
                for node, children in ready:
                    made[node] = True
                    merges.append((node, tuple(children)))
        return sorted(merges)

    assert merged(range(11)) == merged(reversed(range(11)))

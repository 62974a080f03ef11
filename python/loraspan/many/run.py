"""A run over more adapters than fit in memory: the order of its work, and what is kept of it on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from loraspan.collection.fit import Goal
from loraspan.collection.widths import TooNarrowError, rank_unseen, widths_for
from loraspan.many.census import Census
from loraspan.many.groups import (
    IN_FLIGHT,
    Tally,
    cut,
    express_cost,
    limit_of,
    merge_arity,
    sample,
    sample_cost,
    summary_cost,
)
from loraspan.many.in_order import in_order, run
from loraspan.many.ledger import Ledger, Pieces
from loraspan.many.pieces import read_bases
from loraspan.many.tree import Tree
from loraspan.many.work import Work, choose_bases, express_group, merge_summaries, scout_sample, summarize_group

Progress = Callable[[str, int, int], None]

BASES = "bases.safetensors"


@dataclass(frozen=True)
class Run:
    """The work of one run, piece after piece; what its ledger has already is not done again.

    Attributes:
        ledger: held by the caller.
        census: who takes part.
        goal: what to meet.
        skip: whether adapters that are not finite are set aside.
        hash_files: whether whole source files are hashed.
        memory: bytes.
        executor: for the pieces of work; None does them here.
        report: of progress, in bytes of factors.
    """

    ledger: Ledger
    census: Census
    goal: Goal
    skip: bool
    hash_files: bool
    memory: int
    executor: Executor | None
    report: Progress

    def segments(self) -> list[str]:
        """Do all of it, and give the names of the pieces that hold the tasks; the bases are in :data:`BASES`."""
        self._make_bases()
        spaces = read_bases(self.ledger.path / BASES, self.census.slots, self.goal.floats)
        ranks = {path: max(space.ranks) for path, space in spaces.items()}
        cost = express_cost(self.census.slots, ranks, self.goal)
        groups = cut(self.census.members, cost, limit_of(self.memory, self.census.members, [cost]))
        names = [f"tasks-{i:06d}.safetensors" for i in range(len(groups))]
        bases = str(self.ledger.path / BASES)
        jobs = {
            i: (self._work(group), self.hash_files, self.census.slots, bases)
            for i, group in enumerate(groups)
            if not self.ledger.has(names[i])
        }
        for i, pieces in self._each("express", groups, list(jobs), lambda i: (express_group, jobs[i])):
            self.ledger.write(names[i], pieces)
        return names

    def _make_bases(self) -> None:
        attempt = 0
        while self.ledger.has(f"widths-{attempt + 1}.json"):
            attempt += 1
        while not self.ledger.has(BASES):
            widths = self._widths(attempt)
            root = self._summarize(attempt, widths) if any(widths.values()) else None
            path = None if root is None else str(self.ledger.path / root)
            try:
                work, stands_for = self._sample(widths)
                arguments = (work, widths, stands_for, self.census.slots, path)
                self.ledger.write(BASES, run(self.executor, choose_bases, *arguments))
            except TooNarrowError as error:
                wider = {key: 2 * width if key in error.paths else width for key, width in widths.items()}
                attempt += 1
                self.ledger.write_json(f"widths-{attempt}.json", wider)
            if root is not None:
                self.ledger.remove([root])

    def _sample(self, widths: Mapping[str, int] | None = None) -> tuple[Work, dict[str, float]]:
        """Give a sample of tasks, and by slot how many tasks there are for one in it."""
        members, slots = self.census.members, self.census.slots
        # one piece of work at a time: it may take what others take together
        limit = IN_FLIGHT * limit_of(self.memory, members, [])
        chosen = sample(members, slots, sample_cost(slots, widths), limit)
        everyone, some = Tally(), Tally()
        for member in members:
            everyone.add(member.maps)
        for i in chosen:
            some.add(members[i].maps)
        return self._work(chosen), {path: everyone.members[path] / some.members[path] for path in slots}

    def _widths(self, attempt: int) -> dict[str, int]:
        """Give the widths of summaries: twice what a sample alone calls for, and wider after each failed attempt."""
        name = f"widths-{attempt}.json"
        if not self.ledger.has(name):
            seen = run(self.executor, scout_sample, *self._sample())
            ranks = {path: seen.get(path, rank_unseen(self.goal)) for path in self.census.slots}
            self.ledger.write_json(name, widths_for(ranks))
        return {key: int(width) for key, width in self.ledger.read_json(name).items()}

    def _summarize(self, attempt: int, widths: Mapping[str, int]) -> str:
        """Summarize every group, merge the summaries as they come, and give the name of the last one's piece."""
        members, slots = self.census.members, self.census.slots
        cost = summary_cost(slots, widths)
        limit = limit_of(self.memory, members, [cost])
        groups = cut(members, cost, limit)

        def name(node: tuple[int, int]) -> str:
            return f"summary-{attempt}-{node[0]}-{node[1]:06d}.safetensors"

        tree = Tree(len(groups), merge_arity(slots, widths, limit), lambda node: self.ledger.has(name(node)))
        self._merge(tree, name, widths)
        wanted = list(tree.missing())
        for i, pieces in self._each(
            "summarize", groups, wanted, lambda i: (summarize_group, (self._work(groups[i]), widths))
        ):
            self.ledger.write(name((0, i)), pieces)
            self._merge(tree, name, widths)
        return name(tree.root)

    def _merge(self, tree: Tree, name: Callable[[tuple[int, int]], str], widths: Mapping[str, int]) -> None:
        """Merge what can be merged, and remove what that stands for."""
        while ready := list(tree.ready()):
            for node, children in ready:
                paths = [str(self.ledger.path / name(child)) for child in children]
                self.ledger.write(name(node), merge_summaries(paths, widths))
        self.ledger.remove([name(node) for node in tree.covered()])

    def _each(
        self,
        stage: str,
        groups: Sequence[Sequence[int]],
        wanted: Sequence[int],
        job: Callable[[int], tuple[Callable[..., Pieces], tuple[object, ...]]],
    ) -> Iterator[tuple[int, Pieces]]:
        """Give the wanted groups' results in order, telling how many bytes of factors are done."""
        sizes = [sum(self.census.members[i].nbytes for i in group) for group in groups]
        done, total = sum(sizes) - sum(sizes[i] for i in wanted), sum(sizes)
        self.report(stage, done, total)
        results = in_order(self.executor, (job(i) for i in wanted), IN_FLIGHT)
        for i, pieces in zip(wanted, results, strict=True):
            yield i, pieces
            done += sizes[i]
            self.report(stage, done, total)

    def _work(self, chosen: Sequence[int]) -> Work:
        return Work(tuple(self.census.members[i].origin for i in chosen), self.goal, self.skip)

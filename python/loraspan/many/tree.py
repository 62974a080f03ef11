"""Merging in a fixed tree: which summaries are merged with which, whatever was done in what order before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


class Tree:
    """The merges of ``count`` leaves, ``arity`` neighbours at a time, level by level.

    A node is ``(level, index)``; leaves are level 0. It is done when ``has`` says so, and then stands for all below.

    Args:
        count: of leaves, at least 1.
        arity: at least 2.
        has: whether a node is there.

    Example:
        >>> tree = Tree(5, 2, {(0, 0), (0, 1), (1, 1)}.__contains__)
        >>> tree.root, list(tree.missing()), list(tree.ready())
        ((3, 0), [4], [((1, 0), [(0, 0), (0, 1)])])
    """

    def __init__(self, count: int, arity: int, has: Callable[[tuple[int, int]], bool]) -> None:
        self._arity, self._has = arity, has
        self._counts = [count]
        while self._counts[-1] > 1:
            self._counts.append(-(-self._counts[-1] // arity))

    @property
    def root(self) -> tuple[int, int]:
        """The node that stands for all leaves."""
        return len(self._counts) - 1, 0

    def missing(self) -> Iterator[int]:
        """Give the leaves that no node stands for yet."""
        for leaf in range(self._counts[0]):
            nodes = ((level, leaf // self._arity**level) for level in range(len(self._counts)))
            if not any(map(self._has, nodes)):
                yield leaf

    def children(self, level: int, index: int) -> list[tuple[int, int]]:
        """Give the nodes that one is merged from."""
        last = min((index + 1) * self._arity, self._counts[level - 1])
        return [(level - 1, i) for i in range(index * self._arity, last)]

    def ready(self) -> Iterator[tuple[tuple[int, int], Sequence[tuple[int, int]]]]:
        """Give the nodes that can be merged now, and their children."""
        for level in range(1, len(self._counts)):
            for index in range(self._counts[level]):
                children = self.children(level, index)
                if not self._has((level, index)) and all(map(self._has, children)):
                    yield (level, index), children

    def covered(self) -> Iterator[tuple[int, int]]:
        """Give the nodes that another stands for by now."""
        for level in range(1, len(self._counts)):
            for index in range(self._counts[level]):
                if self._has((level, index)):
                    yield from filter(self._has, self.children(level, index))

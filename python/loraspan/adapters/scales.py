"""The rank and the scale that a PEFT configuration gives each module."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loraspan.errors import FormatError, UnsupportedError

if sys.version_info >= (3, 11):
    from re import _constants as _sre
    from re import _parser as _sre_parser
else:
    import sre_constants as _sre
    import sre_parse as _sre_parser

MAX_PATTERN_CHARS = 1000
# with p open repeats and PEFT's own in front a match takes up to chars ** (p + 1) steps
MAX_OPEN_REPEATS = 2
# of that kind for one pattern table and all modules together: some seconds at 2 ns each
MAX_STEPS = 2 * 10**9
_LITERAL = re.compile(r"[\w.\-]*", re.ASCII)
_REPEATS = (_sre.MAX_REPEAT, _sre.MIN_REPEAT)


class Rule(NamedTuple):
    """What the configuration says of one module: its rank (None if it says nothing) and its alpha."""

    lora_rank: int | None
    alpha: float


class Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the first key that matches a module's path wins, as in PEFT.

    A key is a regular expression that has to match the path from its start, or from behind one of its dots, to its end
    (``peft.utils.other.get_pattern_key``).

    Args:
        table: from the configuration.
        where: names the field in errors.

    Raises:
        UnsupportedError: if a key could take very long to match.
        FormatError: if a key is not a regular expression.

    Example:
        >>> Patterns({"0.q": 4, r"\\d.(q|v)": 8}, "rank_pattern").first("layers.0.v")
        8
    """

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self._rules = [(_tail(key), *_compiled(key, where), value) for key, value in table.items()]
        self._where, self._steps = where, 0

    def first(self, path: str) -> Any:
        """Give the value of the first key that matches, or None.

        Raises:
            UnsupportedError: if all paths asked for so far could take very long together.
        """
        for tail, pattern, repeats, value in self._rules:
            self._steps += 1
            if path.endswith(tail):
                self._steps += (len(path) + 1) ** (repeats + 1)
                if self._steps > MAX_STEPS:
                    raise UnsupportedError(
                        f"{self._where}: its {len(self._rules)} keys would take very long to match with module paths "
                        f"such as {path[:80]!r}: it needs fewer keys, or fewer repeats such as * in them"
                    )
                if pattern.match(path):
                    return value
        return None


class Scales:
    """Ranks and scales by module path, for one configuration.

    Args:
        config: as :func:`loraspan.adapters.config.read_config` gives it.

    Example:
        >>> scales = Scales({"r": 8, "lora_alpha": 16, "alpha_pattern": {"k": 32}})
        >>> scales.scale(scales.rule("layers.0.q"), 8), scales.scale(scales.rule("layers.0.k"), 8)
        (2.0, 4.0)
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._ranks = Patterns(config.get("rank_pattern") or {}, "rank_pattern")
        self._alphas = Patterns(config.get("alpha_pattern") or {}, "alpha_pattern")
        self._lora_rank = config.get("r")
        alpha = config.get("lora_alpha")
        # PEFT's default, for files that leave it out
        self._alpha = 8.0 if alpha is None else float(alpha)
        self._rooted = bool(config.get("use_rslora"))
        self._rules: dict[str, Rule] = {}

    def rule(self, path: str) -> Rule:
        """Give rank and alpha of a module."""
        rule = self._rules.get(path)
        if rule is None:
            lora_rank, alpha = self._ranks.first(path), self._alphas.first(path)
            rule = self._rules[path] = Rule(
                self._lora_rank if lora_rank is None else int(lora_rank),
                self._alpha if alpha is None else float(alpha),
            )
        return rule

    def agreed(self, paths: Iterable[str]) -> Rule | None:
        """Give the rule of all these modules, or None if they differ."""
        rules = {self.rule(path) for path in paths}
        return rules.pop() if len(rules) == 1 else None

    def scale(self, rule: Rule, lora_rank: int) -> float:
        """Give ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA."""
        return rule.alpha / (math.sqrt(lora_rank) if self._rooted else lora_rank)


def _tail(key: str) -> str:
    """Give the literal end that every match of ``key`` has; empty if that is not plain to see."""
    return key.rpartition(".")[2] if _LITERAL.fullmatch(key) else ""


@functools.lru_cache(maxsize=4096)
def _compiled(key: str, where: str) -> tuple[re.Pattern[str], int]:
    """Give the pattern of a key and how many open repeats it has."""
    if len(key) > MAX_PATTERN_CHARS:
        raise UnsupportedError(f"{where}: needs keys of at most {MAX_PATTERN_CHARS} characters; got {len(key)}")
    try:
        tree = _sre_parser.parse(key)
        compiled = re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: needs regular expressions as keys; {key[:80]!r} is none: {error}") from None
    repeats = _open_repeats(tree, inside=False)
    if repeats > MAX_OPEN_REPEATS:
        raise UnsupportedError(
            f"{where}: key {key[:80]!r} could take very long to match: it needs at most {MAX_OPEN_REPEATS} repeats "
            "such as * or {2,}, none inside another and none of alternatives, and no back-reference or look-around"
        )
    return compiled, repeats


def _open_repeats(tree: Any, *, inside: bool) -> int:
    """Count the repeats that backtracking can try many ways; one inside another counts as too many."""
    count = 0
    for operator, argument in tree:
        if operator in _REPEATS:
            _, most, child = argument
            many = most > 1
            if many and inside:
                return MAX_OPEN_REPEATS + 1
            count += many + _open_repeats(child, inside=inside or many)
        elif operator is _sre.SUBPATTERN:
            count += _open_repeats(argument[-1], inside=inside)
        elif operator is _sre.BRANCH:
            if inside:
                return MAX_OPEN_REPEATS + 1
            count += max(_open_repeats(branch, inside=inside) for branch in argument[1])
        elif operator not in (_sre.LITERAL, _sre.NOT_LITERAL, _sre.ANY, _sre.IN, _sre.AT, _sre.CATEGORY):
            return MAX_OPEN_REPEATS + 1
    return count

"""JSON from strangers: plain types, no name twice, a size limit."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from loraspan.errors import FormatError

# the C scanner recurses, and far deeper than any header or configuration goes
MAX_DEPTH = 32


class _Refused(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _Refused(f"the name {twice[:200]!r} is there more than once")
    return out


def _no_constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def parse_object(raw: bytes, what: str, *, max_depth: int | None = MAX_DEPTH) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        raw: UTF-8 text.
        what: names the file in errors.
        max_depth: of nesting; None where the caller checks the type of every value anyway.

    Returns:
        A dict of plain JSON values.

    Raises:
        FormatError: if it is not one JSON object in UTF-8, repeats a name, holds NaN or Infinity, or nests too deep.

    Example:
        >>> parse_object(b'{"r": 8}', "adapter_config.json")
        {'r': 8}
    """
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        too_deep = max_depth is not None and _deeper_than(value, max_depth)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise FormatError(f"{what}: needs one JSON object in UTF-8; {error}") from None
    if too_deep:
        raise FormatError(f"{what}: needs JSON of at most {max_depth or MAX_DEPTH} levels; it nests deeper")
    if not isinstance(value, dict):
        raise FormatError(f"{what}: needs one JSON object; got {type(value).__name__}")
    return value


def _deeper_than(value: object, depth: int) -> bool:
    if isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list):
        children = value
    else:
        return False
    return depth == 0 or any(_deeper_than(child, depth - 1) for child in children if isinstance(child, (dict, list)))

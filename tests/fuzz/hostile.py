"""Values that break parsers, and ways to spoil JSON and bytes: hypothesis strategies."""

import copy
import json

from hypothesis import strategies as st

_PATHS = (
    "",
    ".",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "a\0b",
    "a\nb",
    "-rf",
    "~",
    "CON",
    "nul.txt",
    " ",
)
_LOOKALIKES = ("\u0430dmin", "\uff53\uff51\uff4c", "e\u0301", "\u202egnp", "\ufeff", "\U0001f9a5", "\ud800", "\u00b2")
_OURS = ("__metadata__", "records", "extra.0.x", "extra.99.x", "base_model.model.", "base_model.model.q.lora_A.weight")
NAMES = (*_PATHS, *_LOOKALIKES, *_OURS, "x" * 10_000, "%s{0}")
_POWERS = (8, 16, 24, 31, 32, 47, 48, 53, 62, 63, 64)
_WHOLE = (0, 1, 2, 3, 4, 7, 31, 1000, 10**400, -1, -2, -8, -(2**31), -(2**63), -(2**63) - 1)
_FLOATS = (0.0, -0.0, 0.5, 1.5, 2.0, 1e-320, 1e-30, 1e30, 1e39, 1e300, 1.7e308, -1e308)
NUMBERS = (*_WHOLE, *(2**power + step for power in _POWERS for step in (-1, 0, 1)), *_FLOATS)
# texts that json.dumps does not write: put in place of a mark
RAW = {
    "inf": "1e999",
    "-inf": "-1e999",
    "nan": "NaN",
    "infinity": "Infinity",
    "digits": "9" * 5000,
    "huge": "1" + "0" * 4000,
    "zeros": "00012",
    "comment": "1 /* */",
    "surrogate": '"\\ud800"',
    "not utf-8": '"\ud800"',
    "control": '"\x01"',
    "nest": "[" * 200 + "]" * 200,
    "deep": "[" * 60_000 + "]" * 60_000,
    "objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "open": "[" * 3000,
    "many": "[" + "0," * 5000 + "0]",
    "doubled": "{" + ",".join(f'"{i}":0' for i in range(3000)) + ',"2999":1}',
}
LENGTHS = (0, 1, 2**31, 2**40, 2**63, 2**64 - 1, 100_000_000)
PIECES = (b"\0", b"\xff" * 8, b'"', b"{", b"}", b",", b"\xed\xa0\x80", b" " * 64, b"\n", b"-")
_MARK = "\x02raw:"


class Again(str):
    """A key that a dict can hold twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def values():
    """Values of JSON that a reader does not expect."""
    return st.one_of(
        st.sampled_from(NUMBERS),
        st.sampled_from(NAMES),
        st.sampled_from([_MARK + key for key in RAW]),
        st.sampled_from([None, True, False]),
        st.sampled_from([[], {}, [[]], [None], {"": {}}, [0, 0], [0, 8], [8, 0], [-4, 4], [1, 2, 3], [0] * 9, ["x"]]),
        st.integers(0, 40),
    )


def text_of(value):
    """Write a value that :func:`spoiled_json` gave, as bytes."""
    text = json.dumps(value)
    for key, raw in RAW.items():
        text = text.replace(json.dumps(_MARK + key), raw)
    return text.encode("utf-8", "surrogatepass")


def places(value, path=()):
    """Give the path of every value inside a value of JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


@st.composite
def spoiled_json(draw, value):
    """Give ``value`` with few changes: other types, huge numbers, missing and double keys, moved parts."""
    value = copy.deepcopy(value)
    for _ in range(draw(few())):
        paths = list(places(value))
        if not paths:
            return draw(values())
        *way, last = draw(st.sampled_from(paths))
        parent = value
        for key in way:
            parent = parent[key]
        _spoil(draw, value, parent, last, paths)
    return value


def _spoil(draw, whole, parent, key, paths):
    how = draw(st.sampled_from(["kin", "kin", "kin", "value", "value", "near", "drop", "double", "rename", "copy"]))
    old = parent[key]
    if how == "kin":
        parent[key] = draw(_kin(old))
    elif how == "near" and type(old) in (int, float):
        parent[key] = old + draw(st.sampled_from([-1, 1, 0.5, 2**31]))
    elif how == "drop":
        del parent[key]
    elif how == "double" and isinstance(parent, dict):
        parent[Again(key)] = draw(st.one_of(st.just(old), values()))
    elif how == "double":
        parent.append(old)
    elif how == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(NAMES))] = parent.pop(key)
    elif how == "copy":
        parent[key] = copy.deepcopy(_at(whole, draw(st.sampled_from(paths))))
    else:
        parent[key] = draw(values())


def _kin(old):
    """Another value of the same type: it passes the first check and not always the next."""
    if isinstance(old, bool) or old is None:
        return st.sampled_from([True, False, None])
    if isinstance(old, int):
        return st.sampled_from([number for number in NUMBERS if isinstance(number, int)])
    if isinstance(old, float):
        return st.sampled_from([number for number in NUMBERS if isinstance(number, float)] + [_MARK + "inf"])
    if isinstance(old, str):
        return st.sampled_from(NAMES)
    if isinstance(old, list):
        return st.sampled_from([[], old[1:], old * 2, old[::-1], [*old, 0], [old]])
    return st.sampled_from([{}, dict(list(old.items())[1:]), {**old, "x": 1}])


def _at(value, path):
    """Give the value at a path, or as near to it as there still is one."""
    for step in path:
        inside = isinstance(value, dict) and step in value
        if not inside and not (isinstance(value, list) and isinstance(step, int) and step < len(value)):
            break
        value = value[step]
    return value


def few():
    """How many changes: mostly one, since a second is seldom reached behind the first."""
    return st.sampled_from([1, 1, 1, 2, 3])


@st.composite
def spoiled_bytes(draw, data):
    """Give ``data`` with bits flipped, parts cut, doubled, zeroed or replaced, or an end that is torn."""
    data = bytearray(data)
    for _ in range(draw(few())):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        how = draw(st.sampled_from(["flip", "byte", "cut", "double", "zero", "number", "tear", "insert", "empty"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + length]
        elif how == "double":
            data[at:at] = data[at : at + length]
        elif how == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif how == "number":
            # where a length stands, or anywhere
            start = draw(st.sampled_from([0, at]))
            data[start : start + 8] = draw(st.sampled_from([*LENGTHS, len(data), max(8, len(data)) - 8])).to_bytes(
                8, "little"
            )
        elif how == "tear":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.sampled_from(PIECES))
        elif how == "empty" and draw(st.integers(0, 9)) == 0:
            data.clear()
    return bytes(data)

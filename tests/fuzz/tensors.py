"""safetensors files taken apart and put together without a check, so that they may be wrong in any place."""

import json
import math
import struct
import zlib

from hypothesis import strategies as st

from fuzz.hostile import NAMES, few, spoiled_bytes, spoiled_json, text_of, values
from loraspan.collection.deflated import deflate, inflate
from loraspan.errors import FormatError

_BY_SIZE = {8: "F64 I64 U64", 4: "F32 I32 U32", 2: "F16 BF16 I16", 1: "U8 I8 BOOL F8_E4M3"}
ITEM = {dtype: size for size, dtypes in _BY_SIZE.items() for dtype in dtypes.split()}
_HUGE = ([0, 2**31 - 1], [2**31 - 1, 0], [2**31, 0], [2**48, 0], [0, 2**47, 2], [2**40, 0, 2**40])
SHAPES = ([], [0], [1], [0, 0], [1, 1], *_HUGE)
# what a file's numbers become: NaN, infinities, the largest and the smallest of each kind
_DOUBLES = [struct.pack("<d", number) for number in (math.inf, 1.7e308, -1e-320)]
_FLOATS = [struct.pack("<ff", *pair) for pair in ((math.nan, math.inf), (3e38, -3e38), (1e-40, 1e20))]
_HALVES = [b"\x00\x7c" * 4, b"\x80\x7f" * 4, b"\xff\x7b" * 4]
_WHOLE = [number.to_bytes(8, "little", signed=True) for number in (0, -1, 1, 2**62, -(2**63), 0x0101010101010101)]
PATTERNS = (*_DOUBLES, *_FLOATS, *_HALVES, *_WHOLE)
HOW = (
    "numbers",
    "numbers",
    "retype",
    "flat",
    "scalar",
    "fewer",
    "more",
    "drop",
    "rename",
    "copy",
    "shape",
    "turn",
    "bytes",
)


def taken_apart(content):
    """Give ``(metadata, {name: [dtype, shape, bytes]})`` of a file that is in order."""
    start = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(content[8:start])
    metadata = table.pop("__metadata__", {})
    data = content[start:]
    return metadata, {k: [v["dtype"], v["shape"], data[slice(*v["data_offsets"])]] for k, v in table.items()}


def put_together(metadata, tensors):
    """Give a file of tensors, laid out in order, whatever their dtypes and shapes say."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    return with_header(header, b"".join(data for *_, data in tensors.values()))


def with_header(header, data):
    """Give a file with that header, a value or its bytes, padded as safetensors does."""
    raw = header if isinstance(header, bytes) else text_of(header)
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


@st.composite
def spoiled_header(draw, content):
    """Give a file whose header has been changed as JSON, its length corrected or not."""
    start = 8 + int.from_bytes(content[:8], "little")
    spoiled = with_header(draw(spoiled_json(json.loads(content[8:start]))), content[start:])
    return spoiled if draw(st.integers(0, 5)) else content[:8] + spoiled[8:]


@st.composite
def spoiled_tensors(draw, content, likely=None):
    """Give a file whose header is right and whose tensors are not: what only the reader behind it can notice.

    ``likely`` names a tensor of JSON, to be changed as such more often than others.
    """
    metadata, tensors = taken_apart(content)
    for _ in range(draw(few())):
        if not tensors:
            break
        if likely in tensors and draw(st.booleans()):
            _spoil_records(draw, tensors, likely)
            continue
        name = draw(st.sampled_from(list(tensors)))
        stream = name == "weights" or name.startswith("coded.")
        spoil = _spoil_stream if stream and draw(st.booleans()) else _spoil_tensor
        spoil(draw, tensors, name)
    if draw(st.integers(0, 40)) == 0:
        metadata = draw(values())
    return put_together(metadata, tensors)


def _spoil_records(draw, tensors, name):
    try:
        text, behind = inflate(tensors[name][2])
        table = json.loads(text)
    except (ValueError, RecursionError, FormatError):
        return
    data = text_of(draw(spoiled_json(table)))
    if behind and draw(st.booleans()):
        behind = draw(spoiled_bytes(behind))
    data = deflate(data, behind) if behind or draw(st.booleans()) else data
    tensors[name] = ["U8", [len(data)], data]


def _spoil_stream(draw, tensors, name):
    """Change a coded stream, or the bits that its tables have, and give it the checksum of what it is then."""
    data = tensors[name][2]
    bits = data[: next((i for i, byte in enumerate(data) if byte not in (8, 16)), len(data))]
    inside = data[len(bits) : -4]
    if draw(st.booleans()):
        bits = bytes(draw(st.sampled_from([8, 16, byte])) for byte in bits)
    else:
        inside = draw(spoiled_bytes(inside))
    data = bits + inside
    data += zlib.crc32(data).to_bytes(4, "little")
    tensors[name] = ["U8", [len(data)], data]


def _spoil_tensor(draw, tensors, name):
    dtype, shape, data = tensors.pop(name)
    item = ITEM.get(dtype, 1)
    how = draw(st.sampled_from(HOW))
    if how == "drop":
        return
    if how in ("copy", "rename"):
        if how == "copy":
            tensors[name] = [dtype, shape, data]
        name = draw(st.sampled_from([*tensors, f"{name}x", f"{name}.x", f"extra.0.{name}", *NAMES]))
    elif how == "numbers":
        data = _with_numbers(draw, data)
    elif how == "retype":
        dtype = draw(st.sampled_from([code for code in ITEM if len(data) % ITEM[code] == 0]))
        # as many items in the last dimension, if that leaves any
        width = shape[-1] if len(shape) > 1 and shape[-1] else 1
        rows = len(data) // ITEM[dtype] // width
        shape = [rows, width] if len(shape) > 1 else [rows]
        data = data[: rows * width * ITEM[dtype]]
    elif how == "flat":
        size = math.prod(shape)
        shape = draw(st.sampled_from([[size], [1, size], [size, 1], [*shape, 1], [1, *shape]]))
    elif how == "scalar":
        shape, data = [], data[:item].ljust(item, b"\0")
    elif how in ("fewer", "more") and shape and shape[0]:
        row = len(data) // shape[0]
        rows = draw(st.integers(0, shape[0] - 1)) if how == "fewer" else shape[0] + draw(st.sampled_from([1, 2, 100]))
        shape, data = [rows, *shape[1:]], (data * (rows // shape[0] + 1))[: rows * row]
    elif how == "shape":
        shape = draw(st.sampled_from(SHAPES))
        data = bytes(math.prod(shape) * item)
    elif how == "turn":
        shape = shape[::-1]
    elif how == "bytes":
        data = draw(spoiled_bytes(data))
    tensors[name] = [dtype, shape, data]


def _with_numbers(draw, data):
    pattern = draw(st.sampled_from(PATTERNS))
    if draw(st.booleans()):
        return (pattern * (len(data) // 8 + 1))[: len(data)]
    at = draw(st.integers(0, max(0, len(data) - 1))) // 8 * 8
    return (data[:at] + pattern + data[at + 8 :])[: len(data)]

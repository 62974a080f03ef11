"""Ways to damage a store, and what looking at it says."""

import json

import pytest
import torch

from loraspan import store
from loraspan.collection.deflated import deflate, inflate
from loraspan.collection.filed import planes_in
from loraspan.errors import FormatError, LoraspanError

# a slot of the sample with seed 2
S = "layers.1.weights"


def only(path):
    findings = store.verify(path)
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def refused(path, error=FormatError):
    """Opening fails, and its message names the folder, the file and the part that verify finds."""
    with pytest.raises(error) as caught:
        store.open(path)
    return str(caught.value)


def outcome(look, path, healthy=""):
    """What looking at a store gives as text: its error, what it found, or ``healthy``. Other errors pass."""
    try:
        found = look(path)
    except LoraspanError as error:
        return str(error)
    return healthy or str(found)


def file_of(path, pattern):
    return next(path.glob(pattern))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def records(tensors, change):
    text, behind = inflate(tensors["records"].numpy().tobytes())
    table = json.loads(text)
    change(table)
    put_records(tensors, deflate(json.dumps(table).encode(), behind))


def counts_behind(tensors, slot, change=lambda counts: counts):
    """Change the counts of a slot that lie behind the records, ``[4, tasks]``, and give them."""
    text, behind = inflate(tensors["records"].numpy().tobytes())
    table = json.loads(text)
    cells = planes_in(behind, len(table["slots"]), len(table["names"])).astype("<i8")
    at = table["slots"].index(slot)
    cells[:4, at] = change(cells[:4, at])
    put_records(tensors, deflate(text, cells.tobytes()))
    return cells[:4, at]


def put_records(tensors, data):
    tensors["records"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def narrower(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


# seed 2 has in this slot both bases, three of the four tasks, columns of every form, and one dense core
S = "layers.1.weights"

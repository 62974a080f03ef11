"""What a manifest says of tasks that went or have other names, and of how it came about: read believing nothing."""

import json
import re

import pytest

from loraspan import store
from loraspan.errors import FormatError
from store.samples import collection, edit_manifest, part_of, renamed, without


def space_of(folder):
    """Two segments of four tasks; task 1 is gone, task 2 is "two", task 6 is "six"."""
    path = folder / "team.span"
    whole = collection(2, tasks=8)
    store.save(whole.__class__(whole.slots, (part_of(whole, 0, 4), part_of(whole, 4, 8)), whole.dtype), path)
    opened = store.open_at(path)
    store.commit(opened, renamed(without(opened.collection, "task 1"), **{"task 2": "two", "task 6": "six"}))
    return path


@pytest.fixture
def space(tmp_path):
    return space_of(tmp_path)


def first(table):
    return table["segments"][0]


# what is wrong, what is said of it, and whether the manifest alone tells
DAMAGE = {
    "removed below 0": (
        "segment 0: 'removed' has to ascend from 0 to below the 4",
        lambda t: first(t).update(removed=[-1]),
    ),
    "removed past the tasks": (
        "'removed' has to ascend from 0 to below the 4",
        lambda t: first(t).update(removed=[1, 4]),
    ),
    "removed twice": ("'removed' has to ascend", lambda t: first(t).update(removed=[1, 1])),
    "removed out of order": ("'removed' has to ascend", lambda t: first(t).update(removed=[3, 1])),
    "removed true": ("'removed' has to ascend", lambda t: first(t).update(removed=[True])),
    "removed text": ("'removed' has to ascend", lambda t: first(t).update(removed=["1"])),
    "removed huge": ("'removed' has to ascend", lambda t: first(t).update(removed=[10**400])),
    "removed no list": ("'removed' has to be list", lambda t: first(t).update(removed={"1": 1})),
    "renamed past the tasks": ("not to '4'", lambda t: first(t).update(renamed={"4": "x"})),
    "renamed below 0": ("not to '-1'", lambda t: first(t).update(renamed={"-1": "x"})),
    "renamed and removed": ("not to '1'", lambda t: first(t).update(renamed={"1": "x"})),
    "renamed under no number": ("not to '02'", lambda t: first(t).update(renamed={"02": "x"})),
    "renamed under another digit": ("not to '²'", lambda t: first(t).update(renamed={"²": "x"})),
    "renamed under a huge number": ("not to '9999", lambda t: first(t).update(renamed={"9" * 5000: "x"})),
    "renamed to a number": ("not to '2'", lambda t: first(t).update(renamed={"2": 7})),
    "renamed to null": ("not to '2'", lambda t: first(t).update(renamed={"2": None})),
    "renamed no object": ("'renamed' has to be dict", lambda t: first(t).update(renamed=[[2, "x"]])),
    "renamed to another's name": (
        "task 'task 0': two tasks have this name",
        lambda t: first(t).update(renamed={"2": "task 0"}),
    ),
    "two renamed to one": ("two tasks have this name", lambda t: first(t).update(renamed={"2": "x", "3": "x"})),
    "renamed to one elsewhere": (
        "task 'six': two tasks have this name",
        lambda t: first(t).update(renamed={"2": "six"}),
    ),
    "the old name comes back": ("task 'task 7': two tasks", lambda t: first(t).update(renamed={"2": "task 7"})),
    "a segment twice": ("two tasks have this name", lambda t: t["segments"].append(first(t))),
    "time is a number": ("'time' has to be str", lambda t: t.update(time=1.5)),
    "note is null": ("'note' has to be str", lambda t: t.update(note=None)),
    "change is a list": ("change: 'added' is missing", lambda t: t.update(change=[])),
    "change lacks a list": ("change: 'renamed' is missing", lambda t: t["change"].pop("renamed")),
    "change of a number": ("change: it has to hold names", lambda t: t["change"].update(added=[7])),
    "change of a pair": ("change: it has to hold names", lambda t: t["change"].update(renamed=[["a"]])),
    "change of three": ("change: it has to hold names", lambda t: t["change"].update(renamed=[["a", "b", "c"]])),
    "change of null": ("change: it has to hold names", lambda t: t["change"].update(renamed=[["a", None]])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_hostile_change_is_refused(space, damage):
    """By opening and by verify alike, with the manifest's name; the older generation still opens."""
    problem, change = DAMAGE[damage]

    name = edit_manifest(space, lambda table: (change(table) and None) or table)

    with pytest.raises(FormatError) as caught:
        store.open(space)
    findings = store.verify(space)
    assert str(caught.value).startswith(f"{space / name}: ")
    assert problem in str(caught.value)
    assert len(findings) == 1
    assert findings[0].file == name
    assert problem in str(findings[0])
    assert len(store.open(space, generation=1).tasks) == 8


def test_what_is_not_wrong_opens(space):
    """The same edits with nothing wrong: so the damage is what was refused."""
    edit_manifest(space, lambda t: first(t).update(removed=[0, 3], renamed={"1": "task 0", "2": ""}) or t)
    edit_manifest(space, lambda t: t.update(time=None) or (t.pop("note") and None) or t)
    edit_manifest(space, lambda t: (t.pop("change") and None) or t)

    assert [task.name for task in store.open(space).tasks] == ["task 0", "", "task 4", "task 5", "six", "task 7"]
    assert store.verify(space) == []
    newest = store.log(space)[0]
    assert (newest.time, newest.note, newest.change, newest.tasks) == (None, "", None, 6)


def test_the_manifest_says_what_the_documentation_says(space):
    table = json.loads((space / "manifest-000002.json").read_text())

    assert [(entry.get("removed"), entry.get("renamed")) for entry in table["segments"]] == [
        ([1], {"2": "two"}),
        (None, {"2": "six"}),
    ]
    assert table["change"] == {"added": [], "removed": ["task 1"], "renamed": [["task 2", "two"], ["task 6", "six"]]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", table["time"])
    assert list(table)[-1] == "checksum"


def test_a_value_of_a_removed_task_is_still_verified(space):
    """Its columns stay, and are read by whoever goes back."""
    opened = store.open_at(space)
    file = space / opened.segments[0].file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    assert [(finding.file, finding.what) for finding in store.verify(space)][:1] == [(file.name, "checksum")]

"""Segments whose parts do not fit, and values that cannot be: refused on opening, or found by verify."""

import zlib

import pytest
import torch

from loraspan import store
from store.damage import S, file_of, flip, narrower, only, put_records, records, refused
from store.samples import collection, edit_tensors, save_in_segments, saved

SEGMENTS = {
    f"tensor 'weights.{S}': the counts ask for shape": lambda t: narrower(t, f"weights.{S}"),
    f"tensor 'left_private.{S}': the counts ask for": lambda t: narrower(t, f"left_private.{S}"),
    f"tensor 'right_private.{S}': it has to be torch.float32; it is": lambda t: t.update(
        {f"right_private.{S}": t[f"right_private.{S}"].half()}
    ),
    f"tensor 'counts.{S}': it has to be torch.uint8 or": lambda t: t.update({f"counts.{S}": t[f"counts.{S}"].float()}),
    f"tensor 'counts.{S}': rows, counts and dense": lambda t: narrower(t, f"counts.{S}"),
    f"tensor 'counts.{S}': they have to be from 0": lambda t: t.update(
        {f"counts.{S}": t[f"counts.{S}"].to(torch.int64) - 2**62}
    ),
    f"tensor 'rows.{S}': they have to ascend within the 4 tasks": lambda t: t[f"rows.{S}"].copy_(
        t[f"rows.{S}"].flip(0).clone()
    ),
    f"tensor 'dense.{S}': a dense core has": lambda t: t.update(
        {f"dense.{S}": torch.ones(len(t[f"counts.{S}"]), dtype=torch.bool)}
    ),
    f"tensor 'origin.{S}': it has to be [4]": lambda t: t.update({f"origin.{S}": torch.ones(5, dtype=torch.uint8)}),
    f"tensor 'origin.{S}': it names an origin": lambda t: t.update(
        {f"origin.{S}": torch.full((4,), 200, dtype=torch.uint8)}
    ),
    "tensor 'new.thing': it does not belong": lambda t: t.update({"new.thing": torch.zeros(1)}),
    "tensor 'extra.4.x': its number": lambda t: t.update({"extra.4.x": torch.zeros(1)}),
    "tensor 'extra.x': its number": lambda t: t.update({"extra.x": torch.zeros(1)}),
    "tensor 'extra.²': its number": lambda t: t.update({"extra.²": torch.zeros(1)}),
    "tensor 'records': it has to be there": lambda t: t.pop("records"),
    "tensor 'records': it has to be torch.uint8": lambda t: t.update(records=t["records"].to(torch.int16)),
    "tensor 'records': needs one JSON object, or one compressed": lambda t: t["records"].fill_(0),
    "tensor 'records': needs one JSON object; ": lambda t: put_records(t, zlib.compress(b"[]")),
    "tensor 'records': needs to be one zlib stream": lambda t: put_records(t, zlib.compress(b" " * 100_000)),
    "tensor 'records': needs to be one zlib stream of": lambda t: t.update(records=t["records"][:-1].clone()),
    "tensor 'records': needs to be one zlib stream of at": lambda t: put_records(t, zlib.compress(b"{}") + b"x"),
    "'names' has to have 4 entries": lambda t: records(t, lambda r: r["names"].append("x")),
    "'errors' of task 2 has to be float": lambda t: records(t, lambda r: r["errors"].__setitem__(2, "0.1")),
    "'norms' is missing": lambda t: records(t, lambda r: r.pop("norms")),
    "a source has to be five strings": lambda t: records(t, lambda r: r["sources"].__setitem__(0, ["a"])),
    "'configs' names entry 9": lambda t: records(t, lambda r: r["configs"].__setitem__(0, 9)),
    "an origin has to be a scale and a rank": lambda t: records(t, lambda r: r["origin_table"].append([1])),
}


@pytest.mark.parametrize("problem", SEGMENTS)
def test_a_segment_that_does_not_fit_is_refused(tmp_path, problem):
    """A file whose checksum is right, from a writer that is wrong: open and verify say the same."""
    path = saved(tmp_path, seed=2)

    name = edit_tensors(path, "tasks", SEGMENTS[problem])

    assert refused(path).startswith(f"{path / name}: ")
    assert problem in refused(path)
    assert problem in str(only(path))


def test_two_tasks_of_one_name(tmp_path):
    path = tmp_path / "team.span"
    save_in_segments(collection(2), path, [0, 2, 4])
    edit_tensors(path, "tasks", lambda t: records(t, lambda r: r.update(names=["task 0", "task 3"])))
    # the edited segment may be either of the two: both orders hold "task 3" or "task 0" twice
    assert "two tasks have this name" in refused(path)
    assert only(path).what in ("task 'task 0'", "task 'task 3'")


VALUES = {
    "entry 1 of": ("basis", lambda t: t[f"u.{S}"].view(-1).__setitem__(1, float("nan"))),
    "its columns have to be orthonormal to 1.0e-04; they are to 1.0e+00": (
        "basis",
        lambda t: t[f"v.{S}"].mul_(2**0.5),
    ),
    "row 1, of task 'task": ("tasks", lambda t: t[f"left_loadings.{S}"][1].fill_(float("inf"))),
    "finite and not negative": ("tasks", lambda t: t[f"weights.{S}"].neg_()),
}


@pytest.mark.parametrize("problem", VALUES)
def test_values_are_verified(tmp_path, problem):
    """What opening does not read, verifying does."""
    kind, change = VALUES[problem]
    path = saved(tmp_path, seed=2)

    name = edit_tensors(path, kind, change)

    store.open(path)
    assert only(path).file == name
    assert problem in only(path).problem


def test_the_task_of_a_bad_value_is_named(tmp_path):
    path = saved(tmp_path, seed=2)
    columns = store.open(path).segments[0].columns[S]
    last = int(columns.tasks[-1])
    edit_tensors(path, "tasks", lambda t: t[f"weights.{S}"][-1:].fill_(float("nan")))

    assert f"of task 'task {last}'" in only(path).problem
    assert columns.counts[-1].any()


def test_all_findings_are_given(tmp_path):
    path = saved(tmp_path, seed=2)
    edit_tensors(path, "basis", lambda t: [t[f"{side}.{S}"].fill_(float("nan")) for side in "uv"])
    flip(file_of(path, "tasks-*"), -1)

    found = store.verify(path)

    assert sorted(f.what for f in found) == ["checksum", "tensor 'records'", f"tensor 'u.{S}'", f"tensor 'v.{S}'"]

import json
import re
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import store
from loraspan.errors import FormatError, LoraspanError, StoreError, UnsupportedError
from store.samples import ODD_EXTRAS, collection, edit_manifest, edit_tensors, save_in_segments, saved


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


@pytest.mark.parametrize("what", ["no folder", "an empty folder", "a file"])
def test_what_is_no_store_says_so(tmp_path, what):
    path = {"no folder": tmp_path / "none", "an empty folder": tmp_path, "a file": tmp_path / "file"}[what]
    (tmp_path / "file").write_text("x")

    for look in (store.open, store.verify):
        with pytest.raises(StoreError):
            look(path)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1.5", "1 2", "²", "9" * 30, "01"])
def test_a_damaged_current(tmp_path, text):
    path = saved(tmp_path)
    (path / "CURRENT").write_text(text)

    assert "CURRENT: generation: it has to be one number" in refused(path)
    assert only(path).file == "CURRENT"
    with pytest.raises(FormatError):
        store.save(collection(), path, overwrite=True)


@pytest.mark.parametrize("pattern", ["basis-*", "tasks-*", "manifest-*"])
def test_a_missing_file(tmp_path, pattern):
    path = saved(tmp_path)
    gone = file_of(path, pattern)
    gone.unlink()

    assert f"{gone}: cannot be read: No such file" in refused(path, StoreError)
    assert only(path).file == gone.name


@pytest.mark.parametrize("pattern", ["basis-*", "tasks-*"])
@pytest.mark.parametrize("keep", [0, 7, 9, 0.5, -1])
def test_a_torn_file(tmp_path, pattern, keep):
    path = saved(tmp_path, extras=ODD_EXTRAS)
    torn = file_of(path, pattern)
    content = torn.read_bytes()
    torn.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])

    assert f"{torn}: size: the manifest says {len(content)} bytes" in refused(path)
    assert (only(path).file, only(path).what) == (torn.name, "size")


@given(data=st.data())
def test_a_flipped_bit_is_found(tmp_path_factory, data):
    """Wherever it is: by its checksum at least. Opening notices what is in a header, or nothing."""
    path = saved(tmp_path_factory.mktemp("store"), slots=2, tasks=3, extras=ODD_EXTRAS)
    victim = file_of(path, data.draw(st.sampled_from(["basis-*", "tasks-*"]), label="file"))
    flip(victim, data.draw(st.integers(0, victim.stat().st_size - 1), label="at"))

    findings = store.verify(path)

    assert any((finding.file, finding.what) == (victim.name, "checksum") for finding in findings)
    assert victim.name in outcome(store.open, path, victim.name)


@given(data=st.data())
def test_a_damaged_manifest_is_found(tmp_path_factory, data):
    path = saved(tmp_path_factory.mktemp("store"), slots=2, tasks=3)
    victim = file_of(path, "manifest-*")
    flip(victim, data.draw(st.integers(0, victim.stat().st_size - 3), label="at"))

    assert victim.name in refused(path, LoraspanError)
    assert victim.name in outcome(only, path)


@given(data=st.data())
def test_a_hostile_header_is_refused(tmp_path_factory, data):
    """The manifest agrees with the file here, so that only the reading of the header stands in the way."""
    path = saved(tmp_path_factory.mktemp("store"), slots=2, tasks=3, extras=ODD_EXTRAS)
    kind = data.draw(st.sampled_from(["basis", "tasks"]), label="kind")
    victim = file_of(path, f"{kind}-*")
    content = bytearray(victim.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.integers(0, header - 1), label="at")
    content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]), label="byte")
    victim.write_bytes(content)

    assert victim.name in outcome(store.open, path, victim.name)


def slot(table):
    return table["slots"][0]


MANIFESTS = {
    "'format' has to be 'loraspan'": lambda t: t.update(format="zip"),
    "'schema' has to be 1; it is 0": lambda t: t.update(schema=0),
    "'schema' has to be int; it is bool": lambda t: t.update(schema=True),
    "'dtype' has to be one of": lambda t: t.update(dtype="I64"),
    "'summary' has to be str; it is list": lambda t: t.update(summary=[]),
    "'base_model' has to be str; it is int": lambda t: t.update(base_model=7),
    "'slots' is missing": lambda t: t.pop("slots"),
    "generation: it has to be 1; it is 2": lambda t: t.update(generation=2),
    "'parent' has to be from 0": lambda t: t.update(parent=-1),
    "slots: two slots have one name": lambda t: t["slots"].append(slot(t)),
    "slot 0: 'name' is missing": lambda t: t["slots"].insert(0, 7),
    "'kind' has to be one of": lambda t: slot(t).update(kind="dance"),
    "'kernel' has to be null or three sizes": lambda t: slot(t).update(kernel=[1, -1, 1]),
    "'n' has to be from 0 to": lambda t: slot(t).update(n=2**31),
    "'k_in' has to be from 0 to": lambda t: slot(t).update(k_in=-1),
    "'d' has to be int; it is float": lambda t: slot(t).update(d=2.0),
    "basis: 'file' has to be": lambda t: t["basis"].update(file="../../etc/passwd"),
    "segment 0: 'file' has to be": lambda t: t["segments"][0].update(file=t["basis"]["file"]),
    "basis: 'sha256' is missing": lambda t: t["basis"].pop("sha256"),
    "basis: 'bytes' has to be from 0": lambda t: t["basis"].update(bytes=-8),
    "segment 0: 'tasks' is missing": lambda t: t["segments"][0].pop("tasks"),
}
TEXTS = {
    "more than once": '{"format": "loraspan", "format": "loraspan"}',
    "nests deeper": '{"x": ' + "[" * 5000 + "]" * 5000 + "}",
    "NaN is not JSON": '{"schema": NaN}',
    "needs one JSON object": '["loraspan"}',
    "needs one JSON object in UTF-8; Exceeds": '{"schema": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("problem", [*MANIFESTS, *TEXTS])
def test_a_hostile_manifest_is_refused(tmp_path, problem):
    path = saved(tmp_path)

    def change(table):
        if problem in TEXTS:
            return TEXTS[problem]
        MANIFESTS[problem](table)
        return table

    name = edit_manifest(path, change)

    assert re.search(f"^{re.escape(str(path / name))}: .*{re.escape(problem)}", refused(path))
    assert only(path).file == name


def test_a_manifest_without_its_seal(tmp_path):
    path = saved(tmp_path)
    edit_manifest(path, lambda table: table, seal=False)

    assert "checksum: it is not that of the manifest" in refused(path)
    assert only(path).what == "checksum"


def test_a_newer_version_is_named(tmp_path):
    path = saved(tmp_path)
    name = edit_manifest(path, lambda t: {**t, "schema": 2, "writer": "loraspan 9.1"}, seal=False)

    for look in (store.open, store.verify):
        with pytest.raises(UnsupportedError, match=rf"{name}: store schema 2, written by 'loraspan 9.1'.*upgrade"):
            look(path)


def test_shapes_against_the_manifest(tmp_path):
    path = saved(tmp_path, seed=1)
    manifest = json.loads(file_of(path, "manifest-*").read_text())
    wide = next(i for i, s in enumerate(manifest["slots"]) if s["k_in"])
    edit_manifest(path, lambda t: t["slots"][wide].update(k_in=t["slots"][wide]["k_in"] - 1) or t)

    assert "the manifest says shape" in refused(path)
    assert any(finding.what.startswith("tensor 'v.") for finding in store.verify(path))


def records(tensors, change):
    table = json.loads(zlib.decompress(tensors["records"].numpy().tobytes()))
    change(table)
    put_records(tensors, json.dumps(table).encode())


def put_records(tensors, data):
    tensors["records"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def narrower(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


# seed 2 has in this slot both bases, three of the four tasks, columns of every form, and one dense core
S = "layers.1.weights"
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

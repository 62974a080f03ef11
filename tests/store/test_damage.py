import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraspan import store
from loraspan.errors import FormatError, LoraspanError, StoreError, UnsupportedError
from store.damage import file_of, flip, only, outcome, refused
from store.samples import ODD_EXTRAS, collection, edit_manifest, saved


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
    "'schema' has to be from 1 to 3; it is 0": lambda t: t.update(schema=0),
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
    "basis: 'sha256' has to be 64 digits, and 'file' as they say": lambda t: t["basis"].update(file="../../etc/passwd"),
    "segment 0: 'sha256' has to be 64 digits": lambda t: t["segments"][0].update(sha256="../../etc/passwd" * 4),
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
    name = edit_manifest(path, lambda t: {**t, "schema": 4, "writer": "loraspan 9.1"}, seal=False)

    for look in (store.open, store.verify):
        with pytest.raises(UnsupportedError, match=rf"{name}: store schema 4, written by 'loraspan 9.1'.*upgrade"):
            look(path)


def test_shapes_against_the_manifest(tmp_path):
    path = saved(tmp_path, seed=1)
    manifest = json.loads(file_of(path, "manifest-*").read_text())
    wide = next(i for i, s in enumerate(manifest["slots"]) if s.get("k_in"))
    edit_manifest(path, lambda t: t["slots"][wide].update(k_in=t["slots"][wide]["k_in"] - 1) or t)

    assert "the manifest says shape" in refused(path)
    assert any(finding.what.startswith("tensor 'v.") for finding in store.verify(path))

"""Coded ends in files of other hands: refused on opening, when they are unpacked, or by verify."""

from __future__ import annotations

import pickle
import weakref
import zlib
from dataclasses import replace

import planted
import pytest
import torch

import loraspan
from loraspan import store
from loraspan.collection import coding
from loraspan.collection.beside import Beside
from loraspan.collection.coded import column_tensors
from loraspan.errors import FormatError
from loraspan.store.format import DamagedError
from store.damage import counts_behind, only, records, refused
from store.samples import edit_tensors

Q = "layers.1.q_proj"


@pytest.fixture
def path(tmp_path):
    adapters = planted.adapters(count=4, shape=(40, 56), shared_out=0, shared_in=0)
    loraspan.compress(adapters, max_error=0.2, dtype="coded").save(tmp_path / "team.span")
    return tmp_path / "team.span"


def test_an_error_is_pickled_with_what_it_found():
    for folder in (None, "team.span"):
        error = DamagedError("tasks", "tensor 'x'", "needs to be", folder)
        other = pickle.loads(pickle.dumps(error))
        assert (str(other), other.finding) == (str(error), error.finding)


def _bomb(tensors):
    """A stream of few bytes for counts that ask for much."""
    counts_behind(tensors, Q, lambda counts: counts + 2**24 * (counts > 0))


def _weights(tensors):
    return torch.ones(int(counts_behind(tensors, Q).sum()))


OPENING = {
    f"tensor 'coded.{Q}': .* it is missing": lambda t: t.update({"coded.layers.0.q_proj": t.pop(f"coded.{Q}")}),
    "tensor 'coded.layers.0.q_proj': no row is missing": lambda t: t.update(
        {"coded.layers.0.q_proj": t[f"coded.{Q}"].clone()}
    ),
    "tensor 'coded.no.slot': ": lambda t: t.update({"coded.no.slot": t[f"coded.{Q}"].clone()}),
    f"tensor 'coded.{Q}': it has to be torch.uint8": lambda t: t.update({f"coded.{Q}": t[f"coded.{Q}"].float()}),
    f"tensor 'coded.{Q}': [0-9]+ numbers need a byte for 90 of them": lambda t: t.update(
        {f"coded.{Q}": t[f"coded.{Q}"][:9].clone()}
    ),
    f"tensor 'coded.{Q}': [0-9]{{9,}} numbers need": _bomb,
    f"tensor 'coded.{Q}': needs to begin with 8 or 16": lambda t: t[f"coded.{Q}"][1:2].fill_(4),
    "tensor 'weights': it has to have one dimension, and weights that are missing": lambda t: t.pop(f"coded.{Q}"),
    "tensor 'weights': it has to have one": lambda t: t.update(weights=t["weights"][None]),
    "tensor 'weights': it has to be torch.uint8": lambda t: t.update(weights=t["weights"].short()),
    "tensor 'weights': needs to end with the checksum": lambda t: t["weights"][3:4].add_(1),
    "tensor 'weights': needs to begin with 8 or 16": lambda t: t["weights"][:1].fill_(3),
    f"tensor 'weights.{Q}': the counts ask for shape .* missing|'weights.layers.0": lambda t: t.pop("weights"),
    "tensor 'weights.layers.0.q_proj': it has to be torch.float32": lambda t: t.update(
        {"weights.layers.0.q_proj": t.pop("weights").half()}
    ),
    "tensor 'weights': needs to end where its rows do": lambda t: t.update({f"weights.{Q}": _weights(t)}),
    f"tensor 'left_private_scales.{Q}': ": lambda t: t.update({f"left_private_scales.{Q}": torch.zeros(3).half()}),
}


NUMBERS = {
    "tensor 'records': needs slots of the manifest, each once, and numbers of 4 tasks": lambda t: records(
        t, lambda r: r["slots"].append(Q)
    ),
    "tensor 'records': needs slots of the manifest, each once": lambda t: records(
        t, lambda r: r["slots"].__setitem__(0, Q)
    ),
    "tensor 'records': needs slots of the manifest": lambda t: records(
        t, lambda r: r["slots"].__setitem__(0, "no.slot")
    ),
    "tensor 'records': needs slots of": lambda t: records(t, lambda r: r["slots"].__setitem__(0, 1)),
    "tensor 'records': needs slots": lambda t: records(t, lambda r: r["slots"].clear()),
    "tensor 'records': 'slots' has to be list": lambda t: records(t, lambda r: r.update(slots="")),
    "tensor 'records': bytes behind them need 'slots'": lambda t: records(t, lambda r: r.pop("slots")),
    f"counts of slot '{Q}': they have to be from 0": lambda t: counts_behind(t, Q, lambda c: -c),
    f"counts of slot '{Q}': a column whose left end is shared": lambda t: counts_behind(
        t, Q, lambda c: c[[3, 1, 2, 0]]
    ),
    f"tensor 'counts.{Q}': it does not belong": lambda t: t.update({f"counts.{Q}": torch.ones(4, 4).byte()}),
}


@pytest.mark.parametrize("problem", NUMBERS)
def test_numbers_behind_the_records_have_to_fit(path, problem):
    name = edit_tensors(path, "tasks", NUMBERS[problem])
    with pytest.raises(FormatError, match=problem):
        store.open(path)
    assert refused(path).startswith(f"{path / name}: ")
    assert only(path).file == name


@pytest.mark.parametrize("problem", OPENING)
def test_what_does_not_fit_is_refused_on_opening(path, problem):
    name = edit_tensors(path, "tasks", OPENING[problem])
    with pytest.raises(FormatError, match=problem):
        store.open(path)
    assert refused(path).startswith(f"{path / name}: ")
    assert only(path).file == name


def _signed(stream):
    data = stream.numpy().tobytes()
    return torch.frombuffer(bytearray(data + zlib.crc32(data).to_bytes(4, "little")), dtype=torch.uint8)


UNPACKING = {
    "needs to end with the checksum": lambda s: torch.cat([s[:9], s[9:10] ^ 1, s[10:]]),
    "needs to end with the": lambda s: s[:-5].clone(),
    "needs to end where its rows do": lambda s: _signed(torch.cat([s[:4], torch.full_like(s[4:-4], 255)])),
}


@pytest.mark.parametrize("problem", UNPACKING)
def test_a_stream_that_is_none_is_told_when_it_is_unpacked(path, problem):
    """Opening looks at no data; whoever needs the task is told the file and the tensor, and so does verify."""
    spoil = UNPACKING[problem]
    name = edit_tensors(path, "tasks", lambda t: t.update({f"coded.{Q}": spoil(t[f"coded.{Q}"])}))
    space = loraspan.open(path)
    with pytest.raises(FormatError, match=rf"{name}: tensor 'coded.{Q}': {problem}"):
        space.reconstruct("task 0")
    # and so is whoever asked another process
    with pytest.raises(FormatError, match=rf"{name}: tensor 'coded.{Q}': {problem}"):
        pickle.loads(pickle.dumps(space.collection)).segments[0].columns[Q].left_private.rows(0, 1)
    finding = only(path)
    assert (finding.file, finding.what) == (name, f"tensor 'coded.{Q}'")


def test_a_reader_of_another_order_finds_the_same(path):
    """Streams go by the names of slots, whatever order a manifest has them in."""
    before = loraspan.open(path)
    bits = {name: before.reconstruct(name) for name in before.tasks}

    def turned(table):
        table["slots"].reverse()
        return table

    from store.samples import edit_manifest

    edit_manifest(path, turned)
    after = loraspan.open(path)
    for name, adapter in bits.items():
        for slot, was in adapter.slots.items():
            now = after.reconstruct(name).slots[slot]
            assert torch.equal(now.up, was.up)
            assert torch.equal(now.down, was.down)


def test_other_numbers_are_other_adapters(path):
    """What the fuzzer may do: a stream of other numbers opens, and is no longer what was stored."""
    space = loraspan.open(path)
    before = space.reconstruct("task 0")
    (columns,) = (segment.columns for segment in space.collection.segments)
    known = [
        Beside.of(columns[slot]).known()[field]
        for slot in sorted(columns)
        for field in ("left_private", "right_private")
    ]

    def change(tensors):
        shapes = [
            (int(counts_behind(tensors, slot)[3].sum()), length)
            for slot in sorted(("layers.0.q_proj", Q))
            for length in (40, 56)
        ]
        tables = coding.decode(tensors[f"coded.{Q}"].numpy().tobytes(), shapes, known)
        tables[0][:] = -tables[0]
        tensors[f"coded.{Q}"] = torch.frombuffer(bytearray(coding.encode(tables, known)), dtype=torch.uint8)

    edit_tensors(path, "tasks", change)
    after = loraspan.open(path).reconstruct("task 0")
    assert torch.equal(after.slots["layers.0.q_proj"].up, -before.slots["layers.0.q_proj"].up) or torch.equal(
        after.slots["layers.0.q_proj"].down, -before.slots["layers.0.q_proj"].down
    )


def test_a_stream_is_written_as_it_was_unless_its_weights_have_changed(path):
    """They tell how long its rows are."""
    (segment,) = loraspan.open(path).collection.segments
    was = dict(column_tensors(segment.columns))[f"coded.{Q}"]
    assert was.data_ptr() == segment.columns[Q].left_private.stream.data.data_ptr()
    changed = {slot: replace(of, weights=1.3 * of.weights.flip(0)) for slot, of in segment.columns.items()}
    stream = dict(column_tensors(changed))[f"coded.{Q}"]
    assert not torch.equal(stream, was)
    ends = [(changed[slot], field) for slot in sorted(changed) for field in ("left_private", "right_private")]
    known = [Beside.of(columns).known()[field] for columns, field in ends]
    tables = coding.decode(stream.numpy().tobytes(), [getattr(*end).shape for end in ends], known)
    assert all((getattr(*end).numbers.numpy() == table).all() for end, table in zip(ends, tables, strict=True))


def test_segments_are_verified_one_at_a_time(path, monkeypatch):
    """What is unpacked of one is gone before the next is."""
    adapters = planted.adapters(count=7, shape=(40, 56), shared_out=0, shared_in=0)
    space = loraspan.open(path)
    for adapter in adapters[4:]:
        space.add(adapter, max_error=0.2)
    unpacked, alive = [], []
    decode = coding.decode

    def watched(stream, shapes, *known):
        if 40 not in shapes[0]:
            # weights, for which opening waits
            return decode(stream, shapes)
        alive.append(sum(table() is not None for table in unpacked))
        tables = decode(stream, shapes, *known)
        unpacked.extend(map(weakref.ref, tables))
        return tables

    monkeypatch.setattr(coding, "decode", watched)
    assert store.verify(path) == []
    assert alive == [0] * len(space.collection.segments) == [0] * 4

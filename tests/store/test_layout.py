import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import store
from loraspan.collection import layout
from store.samples import FORMS_CASES, ODD_EXTRAS, collection, columns

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sizes(path):
    files = {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name != ".lock"}
    return files, sum(files.values())


def data_bytes(path, prefix):
    content = next(path.glob(prefix)).read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(FLOATS))
def test_bases_and_columns_take_what_is_said(tmp_path_factory, seed, dtype):
    """To the byte: the files hold nothing else than bases, columns, what indexes them and the records."""
    held = collection(seed, dtype=dtype)
    path = tmp_path_factory.mktemp("store") / "a"
    store.save(held, path)

    basis, five, index = 0, 0, 0
    for name, slot in held.slots.items():
        shape = {"n": slot.u.shape[0], "d": slot.v.shape[0], "k_out": slot.u.shape[1], "k_in": slot.v.shape[1]}
        basis += layout.basis_bytes(**shape, dtype=dtype)
        for segment, part in held.columns_of(name):
            five += int(layout.columns_bytes(part.counts, **shape, dtype=dtype, dense=part.dense).sum())
            index += layout.index_bytes(part, len(segment.tasks))
    head = json.loads(_header(path, "tasks-*"))
    rest = sum(e["data_offsets"][1] - e["data_offsets"][0] for n, e in head.items() if n.startswith(("rec", "origin")))

    assert data_bytes(path, "basis-*") == basis
    assert data_bytes(path, "tasks-*") == five + index + rest


def _header(path, pattern):
    content = next(path.glob(pattern)).read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize("counts", FORMS_CASES)
@pytest.mark.parametrize("dense", [False, True])
def test_one_column_of_each_form(counts, dense):
    """Against the tensors themselves, form by form."""
    n, d, k_out, k_in = 11, 7, 5, 3
    counts = np.array([[k_in, *counts[1:]] if dense else counts])
    rng = torch.Generator().manual_seed(0)
    held = columns(rng, [0], (n, d, k_out, k_in), counts, np.array([dense]), torch.float16)

    said = layout.columns_bytes(counts[0], n=n, d=d, k_out=k_out, k_in=k_in, dtype=torch.float16, dense=dense)

    assert int(said) == sum(tensor.nbytes for tensor in held.tensors().values())


@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(0, 6), tasks=st.integers(0, 12))
def test_a_collection_takes_what_is_said(tmp_path_factory, seed, slots, tasks):
    held = collection(seed, slots=slots, tasks=tasks, extras=ODD_EXTRAS)
    path = tmp_path_factory.mktemp("store") / "a"
    store.save(held, path)

    _, total = sizes(path)

    assert abs(layout.collection_bytes(held) - total) <= max(500, total // 100)


def test_a_larger_collection_takes_what_is_said(tmp_path):
    held = collection(3, slots=40, tasks=300)
    store.save(held, tmp_path / "a")

    _, total = sizes(tmp_path / "a")

    assert abs(layout.collection_bytes(held) / total - 1) < 0.01

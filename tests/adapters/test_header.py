"""Tensor files from strangers: the truth about good ones, an error of ours about every bad one."""

import gc
import json
import os
import pathlib

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters import folders
from loraspan.adapters import header, mapped
from loraspan.errors import FormatError, LoraspanError, UnsupportedError

F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def test_views_are_the_tensors(tmp_path):
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    saved = {f"t{i}": torch.arange(15).reshape(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    saved |= {"scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 4), "kernel": torch.rand(2, 3, 4, 5)}
    safetensors.torch.save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})

    opened = mapped.map_tensors(str(tmp_path / "x.safetensors"))

    assert opened.header.metadata == {"format": "pt"}
    assert opened.tensors.keys() == saved.keys()
    for name, tensor in opened.tensors.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name])


def test_a_file_is_mapped_once_and_closed(tmp_path):
    tensors = {"a": torch.rand(64, 64), "b": torch.rand(64, 64)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    descriptors = pathlib.Path("/dev/fd")
    before = len(list(descriptors.iterdir()))

    opened = mapped.map_tensors(str(tmp_path / "x.safetensors"))

    assert len(list(descriptors.iterdir())) == before
    a, b = opened.tensors["a"], opened.tensors["b"]
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    # the mapping lives as long as one tensor of it
    del opened, b
    gc.collect()
    assert torch.equal(a, tensors["a"])


def test_writing_into_a_view_leaves_the_file(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")
    mapped.map_tensors(str(tmp_path / "x.safetensors")).tensors["a"].zero_()
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x.safetensors")["a"], torch.ones(4))


def test_unaligned_tensors_are_copied(tmp_path):
    # a header of odd length, as old writers left it
    tensors = {"a": torch.arange(6.0)}
    raw = json.dumps(folders.header_of(tensors)).encode()
    raw += b" " * (3 - len(raw) % 4)
    (tmp_path / "x.safetensors").write_bytes(folders.file_of(raw, folders.data_of(tensors)))
    found = mapped.map_tensors(str(tmp_path / "x.safetensors")).tensors["a"]
    assert torch.equal(found, tensors["a"])
    assert found.data_ptr() % 4 == 0


DUPLICATE = b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2)
BAD = {
    "not-json": (b"{", 16, "JSON"),
    "not-utf8": (b"\xff\xfe{}", 16, "UTF-8"),
    "not-an-object": (b"[1]", 16, "object"),
    "nan": (b'{"a": NaN}', 16, "NaN"),
    "long-number": (b'{"a": ' + b"9" * 6000 + b"}", 16, "JSON"),
    "deep": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 16, "deep"),
    "duplicate": (DUPLICATE, 16, "more than once"),
    "metadata": (json.dumps({"__metadata__": {"a": 1}, "a": F32}).encode(), 16, "__metadata__"),
    "not-a-dict": (b'{"a": []}', 16, "exactly dtype"),
    "missing-field": (b'{"a": {"dtype": "F32", "shape": []}}', 16, "exactly dtype"),
    "extra-field": (json.dumps({"a": F32 | {"x": 1}}).encode(), 16, "exactly dtype"),
    "control-character": (json.dumps({"a\x00b": F32}).encode(), 16, "printable"),
    "long-name": (json.dumps({"a" * 2000: F32}).encode(), 16, "printable"),
    "negative-size": (json.dumps({"a": F32 | {"shape": [-2, -2]}}).encode(), 16, "shape"),
    "size-is-a-float": (json.dumps({"a": F32 | {"shape": [2.0, 2]}}).encode(), 16, "shape"),
    "size-is-true": (json.dumps({"a": F32 | {"shape": [True, 4]}}).encode(), 16, "shape"),
    "huge-size": (json.dumps({"a": F32 | {"shape": [2**60, 2**60]}}).encode(), 16, "shape"),
    "huge-and-empty": (
        json.dumps({"a": {"dtype": "F32", "shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}).encode(),
        0,
        "takes",
    ),
    "many-axes": (json.dumps({"a": F32 | {"shape": [1] * 9 + [4]}}).encode(), 16, "shape"),
    "wrong-size": (json.dumps({"a": F32 | {"shape": [2, 3]}}).encode(), 16, "takes 24 bytes"),
    "backwards": (json.dumps({"a": F32 | {"data_offsets": [16, 0]}}).encode(), 16, "takes"),
    "three-offsets": (json.dumps({"a": F32 | {"data_offsets": [0, 8, 16]}}).encode(), 16, "data_offsets"),
    "overlap": (json.dumps({"a": F32, "b": F32 | {"data_offsets": [8, 24]}}).encode(), 24, "overlaps"),
    "same-bytes": (json.dumps({"a": F32, "b": F32}).encode(), 16, "overlaps"),
    "gap": (json.dumps({"a": F32, "b": F32 | {"data_offsets": [20, 36]}}).encode(), 36, "gap"),
    "truncated": (json.dumps({"a": F32}).encode(), 15, "truncated"),
    "longer": (json.dumps({"a": F32}).encode(), 17, "longer"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused(case, tmp_path):
    raw, size, says = BAD[case]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(folders.file_of(raw, bytes(size)))
    with pytest.raises(FormatError, match=says) as caught:
        mapped.map_tensors(str(file))
    assert str(file) in str(caught.value)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UnsupportedError, match=r"x: tensor 'a' .* 'F4'"):
        header.parse_header(json.dumps({"a": F32 | {"dtype": "F4"}}).encode(), 16, "x")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 9, b"\xff" * 64, (2**63).to_bytes(8, "little") + b"{}", b"PK\3\4" * 9]
)
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        mapped.map_tensors(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("what", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(what, tmp_path):
    path = tmp_path / "x"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError, match="x"):
        mapped.map_tensors(str(path))


@given(data=st.data())
def test_a_damaged_file_opens_or_is_refused_by_us(data, tmp_path_factory):
    """One byte changed, or the end cut off: nothing but our errors, and no view past the end."""
    tensors = folders.factors(dtype=torch.float16)
    whole = bytearray(folders.file_of(folders.header_of(tensors), folders.data_of(tensors)))
    if data.draw(st.booleans(), label="cut"):
        del whole[data.draw(st.integers(0, len(whole) - 1), label="length") :]
    else:
        whole[data.draw(st.integers(0, len(whole) - 1), label="at")] = data.draw(st.integers(0, 255), label="byte")
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    file.write_bytes(whole)
    try:
        opened = mapped.map_tensors(str(file)).tensors
    except LoraspanError as refusal:
        opened = {}
        message = str(refusal)
    else:
        message = str(file)
    assert str(file) in message
    assert sum(tensor.nbytes for tensor in opened.values()) <= len(whole)
    assert all(tensor.clone().shape == tensor.shape for tensor in opened.values())

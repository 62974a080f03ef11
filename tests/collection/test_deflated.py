"""Text and numbers in few bytes: back as they were, and no further than a reader allows."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraspan.collection.deflated import DICTIONARY, deflate, inflate
from loraspan.errors import FormatError

DOCS = Path(__file__).parents[2] / "docs" / "store.md"


@given(table=st.dictionaries(st.text(), st.text()), behind=st.binary())
def test_what_is_deflated_comes_back(table, behind):
    text = json.dumps(table).encode()
    assert inflate(deflate(text, behind)) == (text, behind)


@pytest.mark.parametrize("behind", [b"", b"\0", b"\0\0x"])
def test_bytes_of_nought_are_bytes_behind(behind):
    for text in (b"{}", b'{"names":[]}' * 20):
        assert inflate(deflate(text, behind)) == (text, behind)


def test_what_others_compressed_is_read():
    """Without the dictionary, as schemas 1 and 2 did, or not at all."""
    text = b'{"names":["sql"]}' * 3
    assert inflate(zlib.compress(text)) == inflate(text) == (text, b"")


def test_a_configuration_takes_few_bytes():
    config = json.loads(DICTIONARY[DICTIONARY.index(b'{"alora') : DICTIONARY.index(b'],"origin_table')])
    config |= {"r": 64, "lora_alpha": 32, "base_model_name_or_path": "org/model"}
    text = json.dumps(config, separators=(",", ":")).encode()
    assert len(deflate(text)) < len(zlib.compress(text, 9)) / 5


def test_what_would_be_too_long_is_not_unpacked():
    assert deflate(b"{}" + b" " * 100_000)[:1] == b"{"
    with pytest.raises(FormatError, match="at most 64 times"):
        inflate(zlib.compress(b"{}" + b" " * 100_000))


def test_the_dictionary_is_the_one_of_the_page():
    """Which whoever reads a store without loraspan needs to the byte."""
    page = DOCS.read_text()
    start = page.index("```text\n", page.index("The dictionary is these lines")) + 8
    assert "".join(page[start : page.index("```", start)].splitlines()).encode() == DICTIONARY
    assert zlib.crc32(DICTIONARY) == 0x8C03DFFD

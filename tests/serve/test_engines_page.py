"""The Python of docs/serving-engines.md runs from top to bottom, on a small model, and gives what the page says."""

import re
from pathlib import Path

import torch

import loraspan
from adapters import models
from loraspan.serve.export import VLLM_RANKS
from loraspan.serve.vllm import _KNOWN, _PREFIX
from serve.samples import QKV, space_of, untouched

PAGE = Path(__file__).parents[2] / "docs" / "serving-engines.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = space_of("llama", tmp_path / "in", {"sql": QKV, "legal": {**QKV, "r": 6}, "SQL": QKV})
    names = {"loraspan": loraspan, "torch": torch, "space": space, "model": models.build("llama")}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3

    for code in blocks[:2]:
        with untouched(names["model"]):
            exec(compile(code, str(PAGE), "exec"), names)
    exec(compile(blocks[2], str(PAGE), "exec"), names)

    assert set(names["folders"]) == set(space.tasks)
    assert {path.name for path in Path("padded").iterdir()} == {"sql", "legal", "tasks.json"}
    assert Path("llama-sql", "model.safetensors").exists()
    legal = models.load_outputs("llama", Path("padded", "legal"))
    assert torch.allclose(models.outputs(names["peft_model"]), legal, atol=1e-5)


def test_the_page_knows_every_setting():
    text = PAGE.read_text()
    assert set(re.findall(r"`(LORASPAN_\w+)", text)) == {_PREFIX + name for name in _KNOWN}
    assert ", ".join(map(str, VLLM_RANKS[:-1])) in text

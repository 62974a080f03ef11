"""``doctor`` tells the truth about backends."""

import importlib
import json

import torch
from click.testing import CliRunner

from loraspan import _native
from loraspan.cli import main

doctor = importlib.import_module("loraspan.cli.doctor")


def test_it_lists_every_backend_and_every_refusal_has_a_reason():
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["threads"]["torch"] == torch.get_num_threads()
    names = {row["backend"] for row in report["backends"]}
    assert names >= {"cpu", "reference", *(f"cpu:{name}" for name, _, _ in _native.INSTRUCTION_SETS)}
    operators = {"gram", "sketch", "power", "combine", "reconstruct", "shared_lora"}
    assert {row["operator"] for row in report["backends"]} == operators
    for row in report["backends"]:
        if row["backend"] in ("cuda", "triton"):
            assert row["says"] == "runs" or len(row["says"]) > len("refuses: ")
        else:
            assert row["says"] == "runs" or row["says"].startswith("refuses: this ")
    assert {row["operator"] for row in report["backends"] if row["says"] == "runs"} == operators


def test_a_wrong_answer_is_seen(monkeypatch):
    honest = doctor._PROBES["gram"]
    lie = lambda backend, at: honest[2](backend, at) + (backend == "cpu")  # noqa: E731
    monkeypatch.setitem(doctor._PROBES, "gram", (*honest[:2], lie))
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "is off by 1" in done.stdout

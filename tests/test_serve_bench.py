"""``benches/serve.py`` in small: all of it runs, a wrong answer is found, and what is missing is said."""

import importlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHES = Path(__file__).parents[1] / "benches"
PARTS = {"adapters", "model", "resident", "memory", "switching", "graphs"}


@pytest.fixture
def bench(monkeypatch):
    """The modules of the bench; ``main`` sets the number of threads."""
    monkeypatch.syspath_prepend(BENCHES)
    parts = {name: importlib.import_module(f"_serve_{name}") for name in ("contenders", "held", "space", "timed")}
    threads = torch.get_num_threads()
    parts["contenders"].whole.cache_clear()
    device = importlib.import_module("_gpu_device")
    # under a name of its own: a folder of tests is called serve too
    spec = importlib.util.spec_from_file_location("serve_bench", BENCHES / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    # neither is to outlast a test: what this process keeps, and whom it may ask
    monkeypatch.setattr(serve, "_keep_memory", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield SimpleNamespace(serve=serve, device=device, **parts)
    parts["contenders"].whole.cache_clear()
    torch.set_num_threads(threads)


def run(bench, folder, *options):
    """Run it in this process; give the exit code and the lines."""
    path = folder / "lines.jsonl"
    code = bench.serve.main(["--small", "--rounds", "1", "--out", str(path), *options])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def without_peers(bench, monkeypatch):
    """Nobody else is here: what a node without them does, and faster."""
    monkeypatch.setattr(bench.contenders, "missing", lambda _: "there is no such module")


def test_every_part_runs_and_every_answer_is_right(bench, tmp_path, capsys):
    pytest.importorskip("peft", reason="the bench is a comparison with it")
    code, lines = run(bench, tmp_path)
    out = capsys.readouterr().out
    assert code == 0, out
    assert {line["operator"] for line in lines} == PARTS | {None}
    assert {line["bench"] for line in lines} == {"serve"}
    timed = [line for line in lines if line["status"] == "timed"]
    for line in timed:
        median, low, high = (
            line[key] for key in (("ms", "low", "high") if "ms" in line else ("us", "low us", "high us"))
        )
        assert 0 < low <= median <= high
    for line in timed:
        if "ms" in line:
            assert 0 <= line["error"] <= 1
    ours = [line for line in timed if line["backend"] == "loraspan" and line["operator"] in ("adapters", "model")]
    assert all(line["x PEFT"] > 0 for line in ours)
    assert [line["x base"] > 0 for line in ours if line["operator"] == "model"] == [True] * 2
    switches = {line["how"] for line in timed if line["operator"] == "switching"}
    assert {"tasks(), one name", "set_adapter", "load_adapter"} <= switches
    # tiny shapes say nothing: no goal is judged by them
    assert not any(line.get("goals") for line in lines)
    assert "0 of 0 goals met" in out


def test_peers_that_are_not_there_are_left_out_and_said(bench, monkeypatch, tmp_path, capsys):
    without_peers(bench, monkeypatch)
    code, lines = run(bench, tmp_path, "--only", "adapters,switching")
    assert code == 0
    assert [line["backend"] for line in lines if line["status"] == "left out"] == ["PEFT", "vlora"] * 2
    assert "PEFT, left out, there is no such module" in capsys.readouterr().out
    assert {line["backend"] for line in lines if line["status"] == "timed"} == {
        "loraspan",
        "loraspan, names",
        "gathered",
    }


@pytest.mark.parametrize("part", ["adapters", "model"])
def test_a_wrong_answer_ends_with_1_and_is_not_timed(bench, monkeypatch, tmp_path, capsys, part):
    """Two tasks of the space are swapped for each other: numbers of the same size, and the wrong ones."""
    without_peers(bench, monkeypatch)
    honest = bench.contenders.space_of

    def swapped(drawn, tasks, sizes):
        rows = torch.arange(tasks * sizes.lora_rank)
        rows[: 2 * sizes.lora_rank] = rows[: 2 * sizes.lora_rank].roll(sizes.lora_rank)
        return honest({path: slot._replace(left=slot.left[rows]) for path, slot in drawn.items()}, tasks, sizes)

    monkeypatch.setattr(bench.contenders, "space_of", swapped)
    code, lines = run(bench, tmp_path, "--only", part)
    assert code == 1
    assert {line["status"] for line in lines if line["operator"] == part} == {"wrong", "left out"}
    assert f"NOT RIGHT: {part}" in capsys.readouterr().out


def test_a_peer_that_fails_is_said_and_the_others_are_timed(bench, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("no such option")

    monkeypatch.setattr(bench.contenders, "missing", lambda _: None)
    monkeypatch.setattr(bench.contenders, "peft_model", lambda *_: fails)
    monkeypatch.setattr(bench.contenders, "vlora_model", fails)
    code, lines = run(bench, tmp_path, "--only", "adapters")
    assert code == 1
    told = {line["backend"]: (line["status"], line["reason"]) for line in lines if "reason" in line}
    assert told == {
        "PEFT": ("failed", "RuntimeError: no such option"),
        "vlora": ("left out", "RuntimeError: no such option"),
    }
    assert {line["backend"] for line in lines if line["status"] == "timed"} == {
        "loraspan",
        "loraspan, names",
        "gathered",
    }


def test_every_way_to_run(bench, monkeypatch, tmp_path):
    """Where a clock captures graphs, as one of a GPU does: here a replay is the call itself."""
    without_peers(bench, monkeypatch)
    captured = []
    monkeypatch.setattr(bench.device.WallClock, "captured", lambda _, run: captured.append(run) or run)
    code, lines = run(bench, tmp_path, "--only", "model", "--compile")
    assert code == 0
    ways = [(line["tokens"], line["way"], line["backend"]) for line in lines if line["status"] == "timed"]
    names = [(tokens, "eager", "loraspan, names") for tokens in (1, 3)]
    every = [(1, way) for way in ("eager", "graph", "compiled", "compiled graph")] + [(3, "eager"), (3, "graph")]
    assert sorted(ways) == sorted(names + [(*way, who) for way in every for who in ("loraspan", "base")])
    assert len(captured) == 6
    # what a graph replays has been judged when it was a call
    assert all((line["error"] is None) == line["way"].endswith("graph") for line in lines if line["status"] == "timed")


def test_a_part_of_a_batch_is_taken_times_all_of_it(bench):
    """Everything takes a millisecond here: who did a quarter of the batch in that needs four."""
    device = torch.device("cpu")
    clock = SimpleNamespace(device=device, timed=lambda run: (run(), 1.0)[1], captured=lambda _: None)
    at = bench.contenders.Place(clock, "f32", 2, bench.space.Sizes())
    found = {who: bench.contenders.Contender(lambda: 0) for who in ("loraspan", "PEFT", "base")}
    found["vlora"] = bench.contenders.Contender(lambda: 0, part=0.25)
    records = bench.timed._timed({}, found, lambda *_: 0.0, at, bench.timed.OF_PEERS)
    of = {record["backend"]: record for record in records}
    assert {who: record["ms"] for who, record in of.items()} == {"loraspan": 1, "PEFT": 1, "base": 1, "vlora": 4}
    assert (of["loraspan"]["x PEFT"], of["loraspan"]["x vlora"], of["vlora"]["x base"]) == (1, 4, 4)
    assert of["loraspan"]["goals"] == "x PEFT 1, goal >= 8: missed; x vlora 4, goal >= 50: missed"


def test_goals_are_judged_and_levels_compared(bench, tmp_path, capsys):
    report = bench.serve.Lines({"small": False, "device": "cpu"}, tmp_path / "lines.jsonl")
    for resident, ms in ((1, 1.0), (10, 1.2), (100, 1.3)):
        report.add(
            {"operator": "resident", "backend": "loraspan", "status": "timed", "way": "eager", "ms": ms}
            | {"resident": resident, "distinct": 1}
        )
    (level,) = bench.serve.levels(report.records)
    report.add({"operator": "resident", **level})
    report.add({"operator": "model", "status": "timed", "goals": bench.timed.OF_BASE[0].judge(1.1)})
    report.show(["resident", "model"])
    out = capsys.readouterr().out
    assert "1 of 2 goals met" in out
    assert "largest over smallest 1.3, goal <= 1.25" in out


def test_bytes_by_hand(bench):
    sizes = bench.space.Sizes(rank=64, lora_rank=16)
    # two bases of 4096 x 64, and for each task 2 x 16 ends of 64 in two bytes, 16 weights and 10 numbers of index
    assert bench.held.counted_bytes(4096, 1000, sizes) == 2 * 4096 * 64 * 2 + 1000 * (4096 + 64 + 80)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_stops_at_once_and_says_so(bench, capsys, tmp_path):
    assert bench.serve.main(["--device", "cuda", "--out", str(tmp_path / "lines.jsonl")]) == 2
    assert "finds no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""``benches/fidelity.py`` in small: what it counts and measures is right, and nothing is done twice."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save

import loraspan
from loraspan.adapters import Adapter, Slot

BENCHES = Path(__file__).parents[1] / "benches"
SHAPE = (40, 30)

# a peer that keeps everything, after some noise on its standard output
PEER = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
source, out = map(Path, sys.argv[1:3])
tensors = {}
for i, folder in enumerate(sorted(source.iterdir())):
    config = json.loads((folder / "adapter_config.json").read_text())
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, letter = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        tensors[f"{i}.{path}.{letter}"] = tensor * (config["lora_alpha"] / config["r"] if letter == "B" else 1)
save_file(tensors, out / "all.safetensors")
print("building a subspace")
print(json.dumps({"way": "vlora f32, 1", "nbytes": 5, "file": "all.safetensors"}))
print(json.dumps({"way": "lorashare", "failed": "ValueError: no"}))
"""


@pytest.fixture
def bench(monkeypatch):
    """The modules of the bench, by the last part of their names; ``main`` sets the number of threads."""
    monkeypatch.syspath_prepend(BENCHES)
    parts = {name: importlib.import_module(f"_fidelity_{name}") for name in ("cases", "draw", "peers", "show", "ways")}
    threads = torch.get_num_threads()
    yield SimpleNamespace(**parts, fidelity=importlib.import_module("fidelity"))
    torch.set_num_threads(threads)


def adapters(count=3, rank=4):
    rng = torch.Generator().manual_seed(5)

    def slot():
        return Slot(torch.randn(rank, SHAPE[1], generator=rng), torch.randn(SHAPE[0], rank, generator=rng), 1.7)

    return [Adapter(f"z-{i}" if i else "a", {"q": slot(), "v": slot()}) for i in range(count)]


def dense(factors):
    return torch.cat([(left.double() @ right.double()).flatten() for left, right in factors.values()])


def originals(adapter):
    return {path: (slot.scale * slot.up.double(), slot.down.double()) for path, slot in adapter.slots.items()}


@pytest.mark.parametrize("size", [0.3, 1e-10])
def test_an_error_is_that_of_dense_matrices_however_small(bench, size):
    (one,) = adapters(1)
    rng = torch.Generator().manual_seed(6)
    other = {
        path: (left + size * torch.randn(left.shape, generator=rng, dtype=torch.float64), right)
        for path, (left, right) in originals(one).items()
    }
    whole = dense(originals(one))

    expected = float((dense(other) - whole).norm() / whole.norm())

    # what float64 loses to cancellation beside an error of 1e-10, with room for sums of 40
    assert bench.fidelity.error(one, other) == pytest.approx(expected, rel=40 * 2.3e-16 / size + 1e-12)


def test_svds_are_the_best_of_their_rank_in_the_bytes_of_a_file(bench):
    given = adapters()
    found = {kept.way: kept for kept in bench.ways.svds(given)}
    for adapter, of_rank, by_energy in zip(
        given, found["SVD f16, rank 2"].rebuilt, found["SVD f16, 0.5 dropped"].rebuilt, strict=True
    ):
        matrices = {path: (left @ right) for path, (left, right) in originals(adapter).items()}
        values = [torch.linalg.svdvals(matrix) for matrix in matrices.values()]
        whole = sum(float(s.square().sum()) for s in values) ** 0.5
        best = sum(float(s[2:].square().sum()) for s in values) ** 0.5
        # entries of both ends are rounded to 11 bits
        assert bench.fidelity.error(adapter, of_rank) == pytest.approx(best / whole, abs=2**-10)
        assert all(left.shape[1] == 2 for left, _ in of_rank.values())
        # a column more would be too much dropped
        smallest = min(float(s[left.shape[1] - 1]) for s, (left, _) in zip(values, by_energy.values(), strict=True))
        error = bench.fidelity.error(adapter, by_energy)
        assert error <= 0.5 + 2**-10
        assert (error**2 + (smallest / whole) ** 2) ** 0.5 > 0.5


@pytest.mark.parametrize(("width", "bits"), [("f16", 16), ("8 bits", 8), ("4 bits", 4)])
def test_an_svd_takes_what_its_files_would(bench, width, bits):
    given = adapters()
    kept = next(kept for kept in bench.ways.svds(given) if kept.way == f"SVD {width}, rank 4")
    ends = 2 * 3 * 4
    # packed rows have a scale for each of their blocks of 64, one a row here
    data = sum(ends * (length * bits // 8 + (2 if bits < 16 else 0)) for length in SHAPE)
    files = [
        {f"base_model.model.{path}.{side}": torch.zeros(1) for path in one.slots for side in ("A", "B")}
        for one in given
    ]
    headers = sum(len(save(file)) - 4 * len(file) for file in files)
    assert data < kept.nbytes < data + 1500
    assert data + headers < kept.folders < data + 3 * headers + 3 * 128


def test_controls_give_what_they_are_named_for(bench):
    given = adapters()
    found = {kept.way: kept for kept in bench.ways.controls(given)}
    mean = sum(dense(originals(one)) for one in given) / 3
    for factors in found["mean"].rebuilt:
        assert (dense(factors) - mean).norm() <= 2**-11 * mean.norm()
    whole, narrow = (bench.fidelity.error(given[0], found[f"random basis {k}"].rebuilt[0]) for k in (32, 8))
    # of 40 and 30 directions the first holds 32 and 30; orthonormal but for the rounding of half precision
    assert whole < narrow < 1
    assert whole == pytest.approx((1 - 32 / 40) ** 0.5, abs=0.15)


def test_a_peer_gets_everything_and_is_believed_nothing(bench, monkeypatch, tmp_path):
    (tmp_path / "fidelity_peers.py").write_text(PEER)
    monkeypatch.setattr(bench.peers, "PEERS", tmp_path)
    # of two ranks: peers get them padded to one
    given = [*adapters(2), *(replace(one, name="b") for one in adapters(1, rank=3))]
    kept, refusal = bench.peers.peers(given, sys.executable)
    assert refusal == ("lorashare", "ValueError: no")
    assert (kept.way, kept.nbytes) == ("vlora f32, 1", 5)
    for adapter, factors in zip(given, kept.rebuilt, strict=True):
        # float32 factors, scaled in float32
        assert bench.fidelity.error(adapter, factors) <= 2**-22


@pytest.mark.parametrize(
    ("nbytes", "worst", "met"),
    [(100, 0.5, True), (101, 0.1, False), (10, 0.500001, False), (100, 0.1, True)],
)
def test_a_point_is_met_by_no_more_bytes_and_no_more_error(bench, nbytes, worst, met):
    assert bench.show.met({"nbytes": 100, "worst": 0.5}, [{"nbytes": nbytes, "worst": worst}]) is met


def test_rounding_of_float32_is_no_error(bench):
    mine = [{"nbytes": 100, "worst": 2e-7}]
    assert bench.show.met({"nbytes": 100, "worst": 1e-8}, mine)
    assert not bench.show.met({"nbytes": 100, "worst": 1e-8}, [{"nbytes": 100, "worst": 2e-6}])


@pytest.fixture
def tiny(bench, monkeypatch, tmp_path):
    """A run of one tiny collection into a file: gives the lines, and what was asked of loraspan in that run.

    A stand-in answers: what half the bytes asked for hold, nothing below 1000 of them.
    """
    case = bench.cases.Case(adapters(), lambda rebuilt: float(len(rebuilt)))
    monkeypatch.setattr(bench.fidelity, "cases", lambda _: {"tiny": lambda: case})
    asked = []

    def compress(_, limit):
        asked.append(limit)
        about = {"way": "loraspan", "asked": limit}
        if limit < 1000:
            return {**about, "refused": "no"}
        return {**about, "nbytes": limit // 2, "worst": 500 / limit, "mean": 400 / limit, "accuracy": 3.0}

    monkeypatch.setattr(bench.fidelity, "compress", compress)
    file = tmp_path / "points.jsonl"

    def run(*options):
        asked.clear()
        bench.fidelity.main(["--no-peers", "--json", str(file), *options])
        return [json.loads(line) for line in file.read_text().splitlines()], list(asked)

    return run


def test_every_point_is_measured_once_and_ours_again_when_asked(tiny, capsys):
    lines, asked = tiny()
    points = [line for line in lines if "nbytes" in line]
    assert {line["way"].split()[0].rstrip(",") for line in points} == {"original", "SVD", "random", "mean", "loraspan"}
    assert all(0 <= line["mean"] <= line["worst"] and line["accuracy"] == 3 for line in points)
    assert next(line for line in points if line["way"] == "original")["worst"] < 1e-12
    mine = [line for line in lines if line.get("way") == "loraspan"]
    assert asked == [line["asked"] for line in mine]
    assert asked == sorted(set(asked))
    # most are met by what was asked for before
    assert len(points) - len(mine) > 2 * len(asked)
    out = capsys.readouterr().out
    assert "of the accuracy" in out
    assert "SVD in one file" in out

    again, asked_again = tiny()
    assert asked_again == []
    assert [line for line in again if "way" in line] == [line for line in lines if "way" in line]

    anew, asked_anew = tiny("--ours")
    assert asked_anew == asked
    assert [line for line in anew if "way" in line] == [line for line in lines if "way" in line]


def test_ours_is_what_a_saved_folder_takes_and_gives_back(bench, tmp_path):
    given = adapters()
    found = bench.fidelity.compress(bench.cases.Case(given), 2500)
    space = loraspan.compress(given, max_bytes=2500)
    space.save(tmp_path / "one.span")
    files = [path.stat().st_size for path in (tmp_path / "one.span").rglob("*") if path.is_file()]
    assert found["nbytes"] == sum(files) <= 2500
    # the store's own figure, measured as it was built
    assert found["worst"] == pytest.approx(max(space.errors.values()), rel=1e-5)
    assert "refused" in bench.fidelity.compress(bench.cases.Case(given), 10)


def test_a_missed_point_is_named(bench, capsys):
    about = {"case": "one", "adapters": 2, "factor_bytes": 1000}
    other = {**about, "way": "SVD f16, rank 1", "nbytes": 90, "folders": 120, "worst": 0.2, "mean": 0.1}
    mine = {**about, "way": "loraspan", "asked": 90, "nbytes": 100, "worst": 0.1, "mean": 0.1}
    bench.show.show([other])
    out = capsys.readouterr().out
    assert "0 of 1, 1 open" in out
    assert "not met" not in out
    bench.show.show([other, mine])
    out = capsys.readouterr().out
    assert "not met in one file: one: SVD f16, rank 1" in out
    assert "not met:" not in out
    bench.show.show([{**other, "folders": 99}, {**mine, "asked": 99}])
    out = capsys.readouterr().out
    assert "not met: one: SVD f16, rank 1: 0.2 in 99; ours refuses, no worse with 1.0% more bytes" in out
    bench.show.show([other, {**mine, "nbytes": 90}])
    assert "not met" not in capsys.readouterr().out


def test_combinations_lie_in_the_span_of_four_and_one_seed_shares_its_rows(bench):
    made = bench.cases.cases(6)
    flat = torch.stack([one.slots["layers.0.q_proj"].up.flatten() for one in made["combinations"]().adapters]).double()
    s = torch.linalg.svdvals(flat)
    assert s[4] < 1e-5 * s[0] < s[3]
    rows = torch.cat([one.slots["layers.0.q_proj"].down for one in made["one seed"]().adapters]).double()
    s = torch.linalg.svdvals(rows)
    assert s[8] < 0.1 * s[7]
    norms = [float((one.slots["layers.0.q_proj"].up).norm()) for one in made["dominant"]().adapters]
    assert norms[0] > 10 * max(norms[1:])
    assert {one.slots["layers.0.q_proj"].lora_rank for one in made["mixed ranks"]().adapters} == {2, 4, 8, 16}


def test_trained_adapters_keep_their_accuracy_as_they_are(bench):
    pytest.importorskip("sklearn", reason="its digits are what the sample adapters were trained on")
    case = bench.cases.cases(1)["trained, own-seed"]()
    assert all(not one.extras for one in case.adapters)
    half = [
        {path: (left if i % 2 else 0 * left, right) for path, (left, right) in originals(one).items()}
        for i, one in enumerate(case.adapters)
    ]
    # about 0.9 with an adapter; 0.2 without, where the base model knows none of the tasks
    assert case.accuracy(half) == pytest.approx((0.9 + 0.2) / 2, abs=0.15)


def test_the_picture_shows_every_way(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture is drawn with it")
    about = {"case": "one", "adapters": 2, "factor_bytes": 1000, "mean": 0.1}
    ways = ("SVD f16, rank 1", "vlora f32, 1", "lorashare, 1", "random basis 8", "mean", "loraspan")
    records = [{**about, "way": way, "asked": 9, "nbytes": 90 + i, "worst": 0.2} for i, way in enumerate(ways)]
    bench.draw.draw(records, tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    for family in (*bench.show.FAMILIES, "loraspan"):
        assert f">{family}</text>" in text

"""``benches/gpu.sh`` in small on the CPU: all of it runs, and it says what is wrong."""

import importlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHES = Path(__file__).parents[1] / "benches"
OPERATORS = ("gram", "combine", "sketch", "power", "reconstruct", "shared_lora")
WHOLE = ("randomized_svd", "compress")
MODULES = ("device", "costs", "cases", "shared_lora", "report")


@pytest.fixture
def bench(monkeypatch):
    """The modules of the bench, by the last part of their names, and ``main``, which sets the number of threads."""
    monkeypatch.syspath_prepend(BENCHES)
    parts = {name: importlib.import_module(f"_gpu_{name}") for name in MODULES}
    threads = torch.get_num_threads()
    yield SimpleNamespace(**parts, main=importlib.import_module("gpu").main)
    torch.set_num_threads(threads)


def run(bench, folder, only):
    """Run some benches in this process; give the exit code and the lines."""
    code = bench.main(["--small", "--device", "cpu", "--no-tests", "--only", only, "--out", str(folder)])
    (path,) = folder.iterdir()
    return code, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The script itself, started from another folder by a relative path of the figures."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    where = tmp_path_factory.mktemp("node")
    command = [bash, str(BENCHES / "gpu.sh"), "--small", "--device", "cpu", "--out", "figures"]
    variables = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(where)}
    done = subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True, check=False, timeout=600)
    lines = [json.loads(line) for file in (where / "figures").glob("*") for line in file.read_text().splitlines()]
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, where=where, lines=lines)


def test_the_script_runs_tests_and_benches(whole):
    assert whole.code == 0, whole.out + whole.err
    assert {line["status"] for line in whole.lines} == {"begun", "passed", "measured", "runs", "timed"}
    timed = Counter(line["operator"] for line in whole.lines if line["status"] == "timed")
    assert set(timed) == {*OPERATORS, *WHOLE}
    for line in whole.lines:
        if line["status"] == "timed":
            assert 0 < line["low"] <= line["ms"] <= line["high"]
        if line["status"] == "timed" and line["operator"] in OPERATORS:
            assert line["floor ms"] > 0
            assert line["backend"] in ("cpu", "reference")
            assert 0 <= line["error"] <= 1


def test_every_line_says_where_it_comes_from(whole):
    for line in whole.lines:
        assert line["bench"] == "gpu"
        assert line["torch"] == torch.__version__
        assert {"begun", "cpu", "loraspan", "triton", "commit"} <= set(line)


def test_no_figure_of_the_cpu_passes_for_that_of_a_gpu(whole):
    assert [file.name.startswith("cpu-") for file in (whole.where / "figures").iterdir()] == [True]
    assert "ran on the CPU and says nothing of any GPU" in whole.out
    for line in whole.lines:
        assert (line["device"], line["card"]) == ("cpu", None)
        assert not line.keys() & {"driver", "cuda", "graph ms", "capability"}
        assert line.get("goals") is None
        assert line.get("kernels ms") is None


def test_the_table_has_a_row_for_every_figure(whole):
    tables = whole.out[whole.out.index("\n\n") :].splitlines()
    for line in whole.lines:
        if line["status"] == "timed":
            starts = [row for row in tables if row.split()[:1] == [line["operator"]] and line["backend"] in row]
            assert any(line["case"] in row and f" {line['dtype']} " in row for row in starts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_stops_at_once_and_says_so(bench, capsys, tmp_path):
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert "finds no GPU here; --device cpu runs without one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_cpu_is_not_measured_in_full(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--device", "cpu"])
    assert stop.value.code == 2
    assert "--device cpu goes with --small" in capsys.readouterr().err


def off(operator, change):
    """``operator`` with one entry of what it gives or writes made wrong."""

    def call(*args, **options):
        out = operator(*args, **options)
        change(args, out)
        return out

    return call


def entry(t, value):
    t[(0,) * t.ndim] = value(t[(0,) * t.ndim])


PLANTED = {
    # a hundredth is far above the bound of half precision, a NaN is not larger than anything
    "gram": ("cases", "gram_many", lambda _, out: entry(out[0], lambda t: 1.01 * t)),
    "sketch": ("cases", "sketch_many", lambda _, out: entry(out[-1], lambda t: t * torch.nan)),
    "power": ("cases", "power_many", lambda _, out: entry(out[0], lambda t: -t)),
    "combine": ("cases", "combine_many", lambda _, out: entry(out[0].vtv, lambda t: 1.01 * t)),
    "reconstruct": ("cases", "reconstruct_many", lambda args, _: entry(args[0][-1].out, lambda t: t * torch.nan)),
    "shared_lora": ("shared_lora", "shared_lora_", lambda args, _: entry(args[0], lambda t: 1.5 * t + 1)),
}


@pytest.mark.parametrize("operator", PLANTED)
def test_a_wrong_answer_ends_with_1_and_is_not_timed(bench, monkeypatch, capsys, tmp_path, operator):
    module, name, change = PLANTED[operator]
    place = getattr(bench, module)
    monkeypatch.setattr(place, name, off(getattr(place, name), change))
    code, lines = run(bench, tmp_path, operator)
    mine = [line for line in lines if line["operator"] == operator and "case" in line]
    assert code == 1
    assert {line["status"] for line in mine} == {"wrong"}
    assert not any("ms" in line for line in mine)
    assert f"NOT RIGHT: {operator}" in capsys.readouterr().out


def test_a_kernel_that_fails_ends_with_1_and_the_others_go_on(bench, monkeypatch, tmp_path):
    honest = bench.cases.sketch_many

    def broken(batch, *, seed, backend):
        if backend == "reference":
            raise RuntimeError("an illegal memory access")
        return honest(batch, seed=seed, backend=backend)

    monkeypatch.setattr(bench.cases, "sketch_many", broken)
    code, lines = run(bench, tmp_path, "gram,sketch")
    failed = [line for line in lines if line["status"] == "failed"]
    assert code == 1
    assert {line["operator"] for line in failed} == {"sketch"}
    assert all("illegal memory access" in line["reason"] for line in failed)
    assert any(line["operator"] == "gram" and line["status"] == "timed" for line in lines)


def test_a_refusal_is_told_with_its_reason_and_is_no_failure(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.device.WallClock, "backends", ("cpu", "cuda"))
    monkeypatch.setattr("loraspan._cuda.library.library", lambda: None)
    code, lines = run(bench, tmp_path, "gram")
    refused = [line for line in lines if line["status"] == "refused"]
    assert code == 0
    assert {line["operator"] for line in refused} == set(OPERATORS)
    assert "gram, cuda, refused, this build has no CUDA kernels, since nvcc was not found" in capsys.readouterr().out


def test_failed_tests_end_with_1(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout=""))
    assert bench.main(["--small", "--device", "cpu", "--only", "gram", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["operator"] for line in lines if line["status"] == "failed"] == ["tests"]


def test_floors_by_hand(bench):
    ceilings = {"copy": 1e9, "f16": 1e12, "f32": 1e11, "f64": 1e10}
    # 2 * 10 * 100 + 8 * 100 bytes, 10 * 11 * 100 operations
    assert bench.costs.gram(10, 100, "f16") == (2800, {"f16": 11000})
    assert bench.costs.gram(10, 100, "f16").floor(ceilings) == pytest.approx(2.8e-6)
    assert bench.costs.gram(10, 100, "f32", "f64").floor(ceilings) == pytest.approx(4.8e-6)
    assert bench.costs.sketch(10, 100, 8, "bf16") == (2640, {"bf16": 16000})
    assert bench.costs.power(10, 100, 8, "f16") == (3280, {"f32": 32000})
    assert bench.costs.combine(10, 100, 8, "f16") == (2000 + 3200 + 1280 + 512, {"f32": 32000 + 7200})
    assert bench.costs.reconstruct([100, 50], 3, 8, 4, "f16") == (2 * (1200 + 192 + 1800), {"f16": 28800})
    assert bench.costs.shared_lora(10, 5, 100, 8, 4, "f16") == (
        2 * (3000 + 1600 + 320) + 80,
        {"f16": 16000, "f32": 1280 + 16000},
    )
    # where computing takes longer, by the sum over the rates
    slow = bench.costs.Cost(1, {"f16": 1e12, "f32": 1e11}).times(2)
    assert slow.floor(ceilings) == pytest.approx(4.0)


def test_goals_of_the_operators(bench):
    by_operator = {}
    for operator in OPERATORS[:-1]:
        _, build = bench.cases.plans(operator, bench.cases.SMALL, torch.device("cpu"))[0]
        by_operator[operator] = build().goals
    share = (bench.cases.Goal("share", 0.8),)
    assert by_operator == {"gram": share, "combine": share, "sketch": share, "power": (), "reconstruct": share}
    large = bench.shared_lora.batches(small=False)
    assert {(b.rows, b.distinct): len(bench.shared_lora.goals(b)) for b in large} == {
        (64, 64): 2,
        (64, 8): 0,
        (1024, 64): 0,
        (8192, 64): 0,
        (1, 1): 0,
    }


def test_missed_goals_are_no_failure(bench, tmp_path):
    report = bench.report.Report({"device": "cuda"}, tmp_path / "lines.jsonl")
    slow = {"operator": "gram", "case": "1 x 1 x 1", "status": "timed", "ms": 1.0, "goals": "share 0.1: missed"}
    report.guarded({"operator": "gram"}, lambda: [slow])
    report.show(["gram"])
    assert report.failed == []

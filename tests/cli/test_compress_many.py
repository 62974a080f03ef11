"""``loraspan compress`` in groups: what it prints, what it sets aside, and what more processes change: nothing."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import loraspan
from loraspan.cli import main
from loraspan.cli.output import bars
from many_runs import COUNT, files_of, write


def run(*args):
    return CliRunner().invoke(main, ["compress", *map(str, args)])


@pytest.fixture
def sources(tmp_path):
    write(tmp_path / "in")
    return tmp_path / "in"


def test_it_says_what_it_did(sources, tmp_path):
    done = run(sources, "-o", tmp_path / "out", "--memory", "200MB", "--rank", 4)
    assert done.exit_code == 0, done.output
    space = loraspan.open(tmp_path / "out")
    lines = done.stdout.splitlines()
    assert lines[0] == space.summary
    assert lines[1].startswith(f"Largest error: {max(space.errors.values()):.3g}, of task ")
    assert lines[2].startswith("Wrote ")
    assert len(space.tasks) == COUNT


def test_json_is_one_document(sources, tmp_path):
    done = run(sources, "-o", tmp_path / "out", "--memory", "200MB", "--json")
    document = json.loads(done.stdout)
    assert document["store"] == str(tmp_path / "out")
    assert len(document["tasks"]) == COUNT
    assert max(task["error"] for task in document["tasks"]) <= 0.05
    assert document["nbytes"] == loraspan.open(tmp_path / "out").nbytes
    assert document["aside"] == []
    assert "took --max-error 0.05" in done.stderr


def test_eight_bits_are_kept_in_groups_too(sources, tmp_path):
    for dtype in ("f32", "int8"):
        done = run(sources, "-o", tmp_path / dtype, "--memory", "200MB", "--max-error", 0.1, "--dtype", dtype)
        assert done.exit_code == 0, done.output
    packed = loraspan.open(tmp_path / "int8")
    assert packed.nbytes < 0.6 * loraspan.open(tmp_path / "f32").nbytes
    assert max(packed.errors.values()) <= 0.1


def test_a_bad_adapter_is_set_aside_and_named(sources, tmp_path):
    (sources / "007" / "adapter_model.safetensors").write_bytes(b"nothing")
    done = run(sources, "-o", tmp_path / "out", "--rank", 4)
    assert done.exit_code == 1
    done = run(sources, "-o", tmp_path / "out", "--rank", 4, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert f"set aside {sources / '007'}: " in done.stderr
    assert f"Set aside 1 of {COUNT} adapters" in done.stdout
    assert "007" not in loraspan.open(tmp_path / "out").tasks


def test_processes_change_nothing(sources, tmp_path):
    for jobs in (1, 2):
        done = run(sources, "-o", tmp_path / f"out{jobs}", "--jobs", jobs, "--rank", 4)
        assert done.exit_code == 0, done.output
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2")


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--memory", "1GB", "--device", "cpu"], 2, "--device does not go with"),
        (["--jobs", "2", "--device", "cpu"], 2, "--device does not go with"),
        (["--memory", ""], 1, "a number of bytes is positive"),
        (["--memory", "plenty"], 1, "a number of bytes is positive"),
        (["--memory", "1kB"], 1, "the least is"),
        (["--jobs", "0"], 2, "--jobs"),
        (["--on-error", "ignore"], 2, "--on-error"),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(options, code, word, sources, tmp_path):
    done = run(sources, "-o", tmp_path / "out", "--rank", 4, *options)
    assert done.exit_code == code
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_number_of_bytes_for_all_does_not_go_with_groups(sources, tmp_path):
    done = run(sources, "-o", tmp_path / "out", "--memory", "1GB", "--max-bytes", "1MB")
    assert done.exit_code == 2
    assert "--max-bytes does not go with --memory or --jobs" in done.stderr


def test_in_memory_bad_adapters_are_set_aside_and_bytes_kept_to(sources, tmp_path):
    (sources / "007" / "adapter_model.safetensors").write_bytes(b"nothing")
    done = run(sources, "-o", tmp_path / "out", "--max-bytes", "100kB", "--on-error", "skip", "--json")
    document = json.loads(done.stdout)
    assert [one["source"] for one in document["aside"]] == [str(sources / "007")]
    assert document["nbytes"] <= 100_000
    assert len(document["tasks"]) == COUNT - 1
    assert not (tmp_path / "out.progress").exists()


def test_bytes_are_shown_as_bytes(monkeypatch):
    """A stage that counts bytes says so; one that was done in part before counts its speed from there."""
    from rich.progress import Progress

    made = []
    monkeypatch.setattr(Progress, "__init__", spy(Progress.__init__, made))
    with bars() as report:
        report("read", 2, 5)
        report("express", 3_000_000, 9_000_000)
        report("express", 6_000_000, 9_000_000)
        texts = [str(made[0].columns[2].render(task)) for task in made[0].tasks]
    assert texts == ["2/5", "6 MB of 9 MB"]


def spy(honest, made):
    def init(self, *args, **options):
        honest(self, *args, **options)
        made.append(self)

    return init

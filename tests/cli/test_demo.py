"""The demo, on fewer settings and images."""

import importlib

import pytest
from click.testing import CliRunner

import loraspan
from loraspan.cli import main
from loraspan.cli.demo_data import FAMILIES, TASKS

# the package's attribute of that name is the command
demo = importlib.import_module("loraspan.cli.demo")
demo_compare = importlib.import_module("loraspan.cli.demo_compare")
demo_data = importlib.import_module("loraspan.cli.demo_data")


def test_the_demo_shows_both_families_and_leaves_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "WITHIN", (0.15,))
    monkeypatch.setattr(demo, "RANKS", (8,))
    monkeypatch.setattr(demo_compare, "IMAGES", 50)

    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "demo")])

    assert done.exit_code == 0, done.output
    for task in TASKS:
        assert done.stdout.count(f"\n {task} ") == len(FAMILIES)
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    for family in FAMILIES:
        space = loraspan.open(tmp_path / "demo" / f"{family}.span")
        assert len(space.tasks) == len(TASKS)
        assert max(space.errors.values()) <= 0.15
    # the case that the demo is there to show: own seeds lose by sharing everything, a shared seed wins
    shared, own = (line for line in done.stdout.splitlines() if "--rank 8: " in line)
    assert shared.endswith(", sharing wins")
    assert own.endswith(", sharing loses")


def test_without_its_extra_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "find_spec", lambda _name: None)
    done = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "demo")])
    assert done.exit_code == 1
    assert "pip install 'loraspan[demo]'" in done.stderr
    assert not (tmp_path / "demo").exists()


def test_without_its_files_it_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "__file__", str(tmp_path / "a" / "b" / "loraspan" / "cli" / "demo_data.py"))
    with pytest.raises(loraspan.errors.FormatError, match="reinstall"):
        demo_data.folder()

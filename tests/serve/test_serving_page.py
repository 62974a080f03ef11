"""docs/serving.md runs as it stands, from top to bottom: its Python and its shell, in one folder."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraspan.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"


def blocks():
    """The blocks of code in order: what they are in, the lines they begin at, and themselves."""
    text = PAGE.read_text()
    for match in re.finditer(r"^```(python|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match.group(1), text[: match.start(2)].count("\n"), match.group(2)


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="a part of the page is about it")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names, ran = {"__name__": PAGE.name}, []
    for language, before, code in blocks():
        ran.append(language)
        if language == "python":
            # blank lines in front, so that an error names the line of the page
            exec(compile("\n" * before + code, str(PAGE), "exec"), names)
            continue
        for line in code.splitlines():
            program, *words = shlex.split(line)
            assert program == "loraspan"
            done = CliRunner().invoke(main, words)
            assert done.exit_code == 0, f"line {before + 1}: {line}: {done.output}"
    assert ran.count("python") >= 4
    assert "sh" in ran


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", PAGE.read_text())
    assert targets
    for target in targets:
        assert (PAGE.parent / target).exists(), target

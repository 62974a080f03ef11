"""docs/living.md runs as it stands, from top to bottom: its Python and its shell, in one folder."""

import re
import shlex
import shutil
from pathlib import Path

from click.testing import CliRunner

from loraspan.cli import main

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "living.md"


def blocks():
    """The blocks of code in order: what they are in, the lines they begin at, and themselves."""
    text = PAGE.read_text()
    for match in re.finditer(r"^```(python|sh)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield match.group(1), text[: match.start(2)].count("\n"), match.group(2)


def run(line, before):
    """Run a line of shell: a command of ours in this process, or a copy."""
    words = shlex.split(line)
    if words[:2] == ["cp", "-r"]:
        shutil.copytree(words[2], words[3])
        return
    assert words[0] == "loraspan", line
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, f"line {before + 1}: {line}: {done.output}"


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names, counts = {"__name__": PAGE.name}, {"python": 0, "sh": 0}
    for language, before, code in blocks():
        counts[language] += 1
        if language == "python":
            # blank lines in front, so that an error names the line of the page
            exec(compile("\n" * before + code, str(PAGE), "exec"), names)
        else:
            for i, line in enumerate(code.splitlines()):
                run(line, before + i)
    assert min(counts.values()) >= 8


def test_the_page_has_every_command_of_a_life():
    text = PAGE.read_text()
    for command in (
        "compress",
        "project",
        "add",
        "absorb",
        "refit",
        "rename",
        "replace",
        "remove",
        "log",
        "rollback",
        "gc",
    ):
        assert f"loraspan {command} " in text


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", PAGE.read_text()):
        assert (PAGE.parent / target).exists(), target

"""The examples of the documentation run as they stand, and every method has its place there."""

import re
from pathlib import Path

import pytest
import torch

import loraspan.linalg

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("linalg.md", "which-function.md")


def examples(page):
    """The Python blocks of a page, with the lines they begin at."""
    text = (DOCS / page).read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start(1)].count("\n"), match.group(1)


BLOCKS = [pytest.param(page, line, code, id=f"{page}:{line}") for page in PAGES for line, code in examples(page)]


@pytest.mark.parametrize(("page", "line", "code"), BLOCKS)
def test_runs_as_it_stands(page, line, code):
    torch.manual_seed(20261122)
    # blank lines in front, so that an error names the line of the page
    exec(compile("\n" * line + code, str(DOCS / page), "exec"), {"__name__": page})


def test_the_examples_are_found():
    """None found would pass all of the above; and one that asserts nothing shows nothing."""
    assert {block.values[0] for block in BLOCKS} == set(PAGES)
    assert all("assert " in block.values[2] for block in BLOCKS)


@pytest.mark.parametrize("name", loraspan.linalg.__all__)
def test_every_method_is_on_the_page(name):
    assert re.search(rf"`{name}\b", (DOCS / "linalg.md").read_text()), f"say in docs/linalg.md what {name} is for"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (DOCS / page).read_text()
    titles = [re.sub(r"[^\w\- ]", "", title).strip() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    headings = {title.lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or (DOCS / file).exists(), target
        assert not anchor or file or anchor in headings, target

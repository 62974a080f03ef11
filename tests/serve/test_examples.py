"""The examples of serving run as they stand, and what they print is true."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def printed(request, capsys, monkeypatch):
    """What an example prints, and its module; torch's own stream of random numbers is put back."""
    pytest.importorskip("transformers", reason="the example is about its models")
    pytest.importorskip("peft", reason="the example trains with it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with torch.random.fork_rng():
        example.main()
    return example, capsys.readouterr().out


@pytest.mark.parametrize("printed", ["generate_mixed_tasks"], indirect=True)
def test_every_row_goes_on_by_its_own_task(printed):
    example, out = printed
    lists = re.compile(r"-> (\[.*?\]) +alone: (\[.*?\]) +two beams: (\[.*?\])$", re.MULTILINE)
    found = [tuple([int(digit) for digit in re.findall(r"\d+", part)] for part in row) for row in lists.findall(out)]
    assert len(found) == len(example.BATCH)
    for (prompt, task), (row, alone, beams) in zip(example.BATCH, found, strict=True):
        assert row == alone
        if task is not None:
            last = torch.tensor(prompt[-1])
            wanted = [int(last := example.TASKS[task](last)) for _ in row]
            assert row == beams == wanted
    next_digits = re.search(r"by task_ids: \[(.*)\]", out).group(1).split(", ")
    assert [int(digit) for digit in next_digits] == [row[0] for row, _, _ in found]
    mixture = re.search(r"all up to all down: \[(.*)\]", out).group(1).split(", ")
    assert (mixture[0], mixture[-1]) == ("6", "4")


@pytest.mark.parametrize("printed", ["classify_mixed_tasks"], indirect=True)
def test_every_row_has_the_head_of_its_task(printed):
    example, out = printed
    named = {label for _, labels in example.TASKS.values() for label in labels}
    rows = [line for line in out.splitlines() if line.endswith(tuple(named))]
    assert len(rows) == 12
    for line in rows:
        words, name, label = re.match(r"(.*[?.]) +(\w+) +(.*)", line).groups()
        rule, labels = example.TASKS[name]
        assert label == labels[rule(words.split())], line
    right = dict(re.findall(r"(\w+) (\d+) of 100", out))
    # chance is 50, and 60 steps are enough for rules of one word each
    assert set(right) == set(example.TASKS)
    assert all(int(count) >= 95 for count in right.values()), right


@pytest.mark.parametrize("printed", ["train_loadings"], indirect=True)
def test_a_task_is_learned_by_its_coefficients(printed):
    pytest.importorskip("sklearn", reason="the images are its")
    example, out = printed
    base = float(re.search(r"the base model: (0\.\d+)", out).group(1))
    learned = re.findall(r"learned (.*): (0\.\d+), in PEFT (0\.\d+), .* within (\S+) of what was trained", out)
    assert [name for name, *_ in learned] == list(example.LEARNED)
    for _, right, in_peft, error in learned:
        # chance is a tenth, and other processors round differently
        assert float(right) > base + 0.25
        # of 597 images a few may lie on the border
        assert abs(float(right) - float(in_peft)) <= 6 / 597
        assert float(error) <= 1e-6
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", out)]
    assert losses[-1] < 0.5 * losses[0]
    assert "the other 11 tasks are bit for bit as they were" in out

"""The sample adapters are what the script says: really trained, small, and loaded by the real PEFT."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from loraspan.adapters import read_all
from loraspan.cli.demo_compare import DTYPE, Family
from loraspan.cli.demo_data import FAMILIES, TASKS, accuracy, base_model, digits, folder

PLACE = folder()
RECORDED = json.loads((PLACE / "base" / "accuracies.json").read_text())
# other processors round differently: a handful of the 597 test images may fall on the other side
HANDFUL = 6 / 597


@pytest.fixture(scope="module")
def test_images():
    return digits(training=False)


def test_there_are_twice_twelve_and_they_are_small():
    adapters = read_all(PLACE / "adapters")
    assert {adapter.name for adapter in adapters} == {f"{family}-{task}" for family in FAMILIES for task in TASKS}
    assert {adapter.slots["blocks.0.q_proj"].lora_rank for adapter in adapters} == {2, 4, 5, 6, 8, 10, 16}
    assert len({adapter.slots["blocks.0.up"].scale for adapter in adapters}) > 3
    assert sum(path.stat().st_size for path in PLACE.rglob("*") if path.is_file()) < 2_000_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_peft_loads_them_and_they_do_their_task(family, task, test_images):
    peft = pytest.importorskip("peft")
    images, labels = TASKS[task](test_images.images, test_images.labels)
    base = accuracy(base_model(PLACE), images, labels)

    model = peft.PeftModel.from_pretrained(base_model(PLACE), PLACE / "adapters" / f"{family}-{task}").eval()

    found = accuracy(model, images, labels)
    assert found == pytest.approx(RECORDED[family][task], abs=HANDFUL)
    assert found > base + 0.25


def initial_overlap(adapters, path):
    """How much of the second adapter's ``lora_A`` lies in the row space of the first's."""
    first, second = (adapter.slots[path].down.double() for adapter in adapters)
    q, _ = torch.linalg.qr(first.T)
    return float((second @ q).norm() / second.norm())


def test_only_one_family_shares_its_initialisation():
    shared, own = (
        read_all([PLACE / "adapters" / f"{family}-{task}" for task in ("mirrored", "inverted")]) for family in FAMILIES
    )
    for path in shared[0].slots:
        assert initial_overlap(shared, path) > 0.6
        assert initial_overlap(own, path) < 0.6


def test_training_starts_where_the_family_says():
    """The script's initialisation: nested in rank, the same for one seed, different for another."""
    spec = importlib.util.spec_from_file_location(
        "train_adapters", Path(__file__).parents[1] / "examples/train_adapters.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    peft = pytest.importorskip("peft")

    def drawn(rank, seed):
        model = peft.get_peft_model(base_model(PLACE), peft.LoraConfig(r=rank, target_modules=["up"]))
        script.initialise(model, seed)
        return next(weight for name, weight in model.named_parameters() if ".lora_A." in name).detach()

    assert torch.equal(drawn(4, 0), drawn(8, 0)[:4])
    assert not torch.equal(drawn(4, 0), drawn(4, 1))


def test_the_plain_svd_keeps_its_promises():
    """The rival of the demo is as good as it can be: everything kept loses only rounding, and a budget is used."""
    family = Family("own-seed")
    for adapter, original, cut in zip(family.adapters.values(), family.originals, family.cuts, strict=True):
        everything = cut.deltas(len(cut.nbytes))
        assert cut.bytes_of(len(cut.nbytes)) == adapter.nbytes
        for path, delta in original.items():
            assert (everything[path] - delta).norm() <= 4 * torch.finfo(DTYPE).eps * delta.norm()
    point = family.plain(family.original().nbytes // 3)
    assert 0.97 * family.original().nbytes // 3 <= point.nbytes <= family.original().nbytes // 3
    assert max(point.errors) - min(point.errors) < 0.1

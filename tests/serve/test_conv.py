"""A served convolution is the convolution with the merged weights, and PEFT's where PEFT says one thing."""

import types

import pytest
import torch
from torch import nn

import loraspan
import oracles
import task_cores
from adapters import models
from loraspan.collection.collection import SlotSpace
from loraspan.errors import ArgumentError, ShapeError, UnsupportedError
from loraspan.serve.conv import ServedConv2d
from loraspan.serve.rows import Rows
from loraspan.serve.tables import Triple
from matrices import normal
from oracles import F32
from serve.samples import merged, space_of

CIN, COUT = 6, 10
COUNTS = [(3, 0, 0, 0), (1, 2, 1, 2), (0, 0, 0, 0)]
U32 = oracles.UNIT_ROUNDOFF[F32]
CASES = {
    "plain": {"kernel_size": 3},
    "oblong": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    "dilated": {"kernel_size": (2, 3), "padding": (0, 3), "dilation": (2, 3), "stride": 2},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid", "bias": False},
    "reflected": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
    "replicated": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 3},
    "pointwise": {"kernel_size": 1, "stride": 2},
}


def layer_of(dtype=F32, path="conv", **options):
    base = nn.Conv2d(CIN, COUT, **options).to(dtype).requires_grad_(False)
    d = base.weight[0].numel()
    cores = task_cores.planted(3, COUNTS, COUT, d, 4, 5, dtype=dtype)
    now = Triple(normal(1, d, 5, dtype=dtype), normal(2, COUT, 4, dtype=dtype), cores)
    space = SlotSpace(now.u, now.v, "conv2d", tuple(base.weight.shape[1:]))
    return base, ServedConv2d(base, path, types.SimpleNamespace(now=now), space)


def run(layer, x, rows):
    mark = layer.board.context.set(rows)
    try:
        return layer(x)
    finally:
        layer.board.context.reset(mark)


def expected(base, x, delta):
    """In float64, with the weights that merging gives; and what bounds are made of."""
    wide = nn.Conv2d.__new__(nn.Conv2d)
    wide.__dict__.update(base.__dict__)
    weight = base.weight.double() + delta.reshape(base.weight.shape)
    size = base.weight.double().abs() + delta.abs().reshape(base.weight.shape)
    bias = None if base.bias is None else base.bias.double()
    out = wide._conv_forward(x.double(), weight, bias)
    return out, wide._conv_forward(x.double().abs(), size, None if bias is None else bias.abs())


@pytest.mark.parametrize("case", CASES)
def test_is_the_merged_convolution(case):
    base, layer = layer_of(**CASES[case])
    x = normal(4, 5, CIN, 9, 8, dtype=F32)
    tasks = [1, -1, 0, 2, 1]
    actual = run(layer, x, Rows(torch.tensor(tasks)))
    assert actual.shape == base(x).shape
    v, u, cores = layer.tables.now
    absolute = task_cores.absolute(cores)
    for row, task in enumerate(tasks):
        if task < 0:
            assert oracles.same_bits(actual[row], base(x)[row])
            continue
        delta = torch.from_numpy(task_cores.delta(cores, v, u, task))
        out, _ = expected(base, x[row : row + 1], delta)
        # with the absolute values of all factors, as the sum over them is what rounds
        _, size = expected(base, x[row : row + 1], torch.from_numpy(task_cores.delta(absolute, v.abs(), u.abs(), task)))
        steps = 2 * len(v) + 4 + 5 + sum(COUNTS[task]) + 8
        oracles.assert_within(actual[row : row + 1], out.numpy(), oracles.gamma(steps, U32) * size.numpy())


def test_mixtures_and_one_picture():
    base, layer = layer_of(kernel_size=3, padding=1)
    x = normal(4, 2, CIN, 5, 5, dtype=F32)
    # two tables in a row of halves are the sum of the halves
    half = run(layer, x, Rows(torch.tensor([[0, 1], [1, -1]]), torch.tensor([[0.5, 0.25], [2.0, 9.0]])))
    first, second = (run(layer, x, Rows(torch.tensor([task]))) - base(x) for task in (0, 1))
    scale = half.abs().max() + first.abs().max() + 2 * second.abs().max()
    assert (half[0] - base(x)[0] - 0.5 * first[0] - 0.25 * second[0]).abs().max() < 100 * U32 * scale
    assert (half[1] - base(x)[1] - 2 * second[1]).abs().max() < 100 * U32 * scale
    # a picture without a batch is a row
    assert torch.equal(run(layer, x[1], Rows(torch.tensor([1]))), run(layer, x[1:], Rows(torch.tensor([1])))[0])


def test_refuses_tokens_and_tasks_that_left():
    _, layer = layer_of(kernel_size=3)
    x = normal(4, 2, CIN, 5, 5, dtype=F32)
    with pytest.raises(ArgumentError, match="it is a convolution, which has no tokens"):
        run(layer, x, Rows(torch.tensor([[0] * 9] * 2), None, "token"))
    with pytest.raises(ArgumentError, match="conv: a task of the batch has left"):
        run(layer, x, Rows(torch.tensor([0, 3])))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        (nn.Conv2d(CIN, COUT, 3, groups=2), UnsupportedError, "has 2 groups"),
        (nn.Conv1d(CIN, COUT, 3), UnsupportedError, "it is a Conv1d"),
        (Standardized(CIN, COUT, 3), UnsupportedError, "it is a Standardized"),
        (nn.Conv2d(CIN, COUT, (1, 9)), ShapeError, r"kernel \(6, 3, 3\)"),
        (nn.Conv2d(CIN, COUT + 1, 3), ShapeError, "is for 10 channels out"),
    ],
)
def test_other_convolutions_are_refused_by_name(base, error, message):
    space = SlotSpace(torch.ones(COUT, 1), torch.ones(54, 1), "conv2d", (CIN, 3, 3))
    with pytest.raises(error, match=message) as refused:
        ServedConv2d(base, "unet.conv", types.SimpleNamespace(), space)
    assert "unet.conv" in str(refused.value)


class Padded(models.Pixels):
    """Convolutions for which PEFT's own layer and its merge do different things."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 10, (1, 3), padding=(0, 2), padding_mode="circular", dilation=(1, 2))


CONFIG = {"r": 4, "lora_alpha": 10, "target_modules": ["first", "second", "table"]}


@pytest.mark.parametrize("name", ["pixels", "padded"])
def test_a_model_is_that_of_peft(name, tmp_path, monkeypatch):
    monkeypatch.setitem(models.BUILD, "padded", Padded)
    if name == "padded":
        # what PEFT would run while it trains has another size
        monkeypatch.setattr(models, "outputs", lambda _: None)
    space = space_of(name, tmp_path, {"sql": CONFIG, "legal": {**CONFIG, "r": 2}})
    monkeypatch.undo()
    monkeypatch.setitem(models.BUILD, "padded", Padded)
    served = loraspan.attach(models.build(name), space)
    base = models.outputs(served)
    with served.tasks(["legal", "sql"]):
        actual = models.outputs(served)
    for row, task in enumerate(("legal", "sql")):
        theirs = models.outputs(merged(name, space, task, tmp_path / "out" / task))
        assert (theirs - base).norm() > 0.05 * base.norm()
        # two float32 runs of a model of about a hundred sums, as in the tests of exported adapters
        assert (actual[row] - theirs[row]).norm() <= 100 * U32 * theirs[row].norm()

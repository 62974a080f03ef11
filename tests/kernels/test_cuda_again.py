"""shared_lora on CUDA told again: past the checks where all is as it was, and told the same as if nothing were kept."""

import ctypes
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from loraspan._cuda import library
from loraspan._cuda import shared_lora as on_cuda
from loraspan.errors import BackendError, ShapeError
from loraspan.ops import Cores, pack, shared_lora_, shared_lora_run
from matrices import normal
from oracles import BF16, F16, F32
from task_cores import batch, planted, random_tasks

ROWS, N, D, K_OUT, K_IN = 20, 64, 96, 16, 8
COUNTS = [(4, 0, 0, 0), (2, 1, 1, 1)]
# places in what kernels are told: rows, tasks, tasks to a row, shares, and the workspace
_ROWS, _TASKS, _MIXTURE, _SHARES, _SPACE, _MEETING = 24, 41, 42, 43, 45, 46


class Noted:
    """A library that runs here; it notes what kernels would be told, and runs none."""

    emulated = True

    def __init__(self):
        self.told = []

    def refuses(self):
        return None

    def call(self, operator, path, table, *counts):
        fields = list(struct.unpack(f"={len(table) // 8}q", table))
        # these may have been copied: what is told is what lies there
        count = fields[_ROWS] * fields[_MIXTURE]
        fields[_TASKS] = tuple((ctypes.c_int64 * count).from_address(fields[_TASKS]))
        fields[_SHARES] = fields[_SHARES] and tuple((ctypes.c_float * count).from_address(fields[_SHARES]))
        # memory is new for each call: what is told of it is how far apart its parts are
        fields[_MEETING] -= fields[_SPACE]
        fields[_SPACE] = 0
        self.told.append((operator, path, tuple(fields), counts))


@pytest.fixture
def noted(monkeypatch):
    found = Noted()
    monkeypatch.setattr(library, "library", lambda: found)
    monkeypatch.setattr(on_cuda, "_known", {})
    return found


@pytest.fixture
def unchecked(monkeypatch):
    """Fail where a call is checked."""

    def forbid():
        def checked(*_):
            raise AssertionError("this call was checked")

        monkeypatch.setattr(shared_lora_run, "check", checked)

    return forbid


def call(dtype=BF16):
    """The arguments of a call."""
    y, x, v, u = batch(1, ROWS, N, D, K_OUT, K_IN, dtype)
    cores = planted(5, COUNTS, N, D, K_OUT, K_IN, dtype=dtype)
    return {"y": y, "x": x, "v": v, "u": u, "cores": cores, "tasks": random_tasks(6, ROWS, 1, 2)[:, 0]}


def run(given):
    return shared_lora_(**given, scale=0.3, backend="cuda")


def as_operator(given):
    """As a compiled graph does it."""
    y, x, v, u, cores, tasks = (given[name] for name in ("y", "x", "v", "u", "cores", "tasks"))
    shares = given.get("shares")
    torch.ops.loraspan.shared_lora_(y, x, v, u, *cores.fields(), tasks, shares, 0.3, "cuda")


@pytest.mark.parametrize("repeat", [run, as_operator])
def test_another_batch_of_the_same_form_is_not_checked_again(noted, unchecked, repeat):
    given = call()
    run(given)
    mixture = given | {"tasks": given["tasks"][:, None].repeat(1, 2), "shares": normal(7, ROWS, 2, dtype=F32)}
    run(mixture)
    unchecked()
    others = {name: given[name].clone() for name in ("y", "x", "tasks")}
    repeat(given | others)
    repeat(given | {"tasks": given["tasks"][:, None]})
    repeat(mixture | {"shares": mixture["shares"].clone()})
    # the same columns, in another object
    repeat(given | {"cores": replace(given["cores"])})
    for changed in (given["cores"].left, given["v"], given["cores"].index):
        changed.zero_()
        repeat(given)
    assert len(noted.told) == 2 + 4 + 3


def at_odds(tensor):
    """The same values two bytes further on."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def apart(tensor):
    """The same values with a gap behind each row."""
    down, across = tensor.shape
    return torch.zeros(down, across + 8, dtype=tensor.dtype)[:, :across].copy_(tensor)


def across(tensor):
    return tensor.T.contiguous().T


def in_halves(cores):
    """The same memory, taken for float16."""
    names = ("left", "left_private", "right", "right_private")
    return replace(cores, **{name: getattr(cores, name).view(F16) for name in names})


# what a second call may have otherwise than the first, in a form that kernels take
CHANGES = {
    "rows": lambda c: {"y": c["y"][:7], "x": c["x"][:7], "tasks": c["tasks"][:7]},
    "mixture": lambda c: {"tasks": c["tasks"][:, None].repeat(1, 3)},
    "shares": lambda _: {"shares": normal(8, ROWS, dtype=F32)},
    "y dtype": lambda c: {"y": c["y"].float()},
    "x dtype": lambda c: {"x": c["x"].half()},
    "y odd": lambda c: {"y": at_odds(c["y"])},
    "x odd": lambda c: {"x": at_odds(c["x"])},
    "y apart": lambda c: {"y": apart(c["y"])},
    "x apart": lambda c: {"x": apart(c["x"])},
    "x across": lambda c: {"x": across(c["x"])},
    "tasks apart": lambda c: {"tasks": c["tasks"].repeat_interleave(2)[::2]},
    "shares apart": lambda _: {"shares": normal(8, 2 * ROWS, dtype=F32)[::2]},
    "v": lambda c: {"v": c["v"].clone()},
    "v dtype": lambda c: {"v": c["v"].float()},
    "v of the same bits": lambda c: {"v": c["v"].view(F16)},
    "ends of the same bits": lambda c: {"cores": in_halves(c["cores"])},
    "u turned": lambda c: {"u": c["u"].as_strided((N, K_OUT), (1, N))},
    "u across": lambda c: {"u": across(c["u"])},
    "u odd": lambda c: {"u": at_odds(c["u"])},
    "most": lambda c: {"cores": replace(c["cores"], most=(9, 2, 2, 2))},
    "left": lambda c: {"cores": replace(c["cores"], left=c["cores"].left.clone())},
    "weights": lambda c: {"cores": replace(c["cores"], weights=c["cores"].weights.clone())},
    "fewer tasks": lambda c: {"cores": replace(c["cores"], index=c["cores"].index[:1])},
    "ends": lambda _: {"cores": planted(9, [(3, 0, 0, 0)], N, D, K_OUT, K_IN, dtype=F16)},
}


@pytest.mark.parametrize("repeat", [run, as_operator])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_is_told_as_if_nothing_were_kept(noted, monkeypatch, change, repeat):
    first = call()
    second = first | change(first)
    run(first)
    repeat(second)
    repeat(first)
    repeat(second)
    monkeypatch.setattr(on_cuda, "_known", {})
    run(second)
    before, *others = noted.told
    assert others[1] == before
    assert others[0] == others[2] == others[3]
    assert others[0][2][_TASKS] == tuple(second["tasks"].reshape(-1).tolist())
    assert others[0][2][_SHARES] == (tuple(second["shares"].reshape(-1).tolist()) if "shares" in second else 0)


# what a second call is refused for, whatever the first was
REFUSED = {
    "y columns": (lambda c: {"y": c["y"][:, 1:]}, ShapeError, "have to fit"),
    "x rows": (lambda c: {"x": c["x"][1:]}, ShapeError, "have to fit"),
    "tasks": (lambda c: {"tasks": c["tasks"][1:]}, ShapeError, "have to fit"),
    "tasks dtype": (lambda c: {"tasks": c["tasks"].int()}, ShapeError, "int64"),
    "shares": (lambda _: {"shares": torch.ones(ROWS, 1)}, ShapeError, "have to fit"),
    "shares dtype": (lambda _: {"shares": torch.ones(ROWS).double()}, ShapeError, "float32"),
    "y device": (lambda c: {"y": c["y"].to("meta")}, ShapeError, "one device"),
    "x device": (lambda c: {"x": c["x"].to("meta")}, ShapeError, "one device"),
    "tasks device": (lambda c: {"tasks": c["tasks"].to("meta")}, ShapeError, "on the device of y"),
    "shares device": (lambda _: {"shares": torch.ones(ROWS, device="meta")}, ShapeError, "on the device of y"),
    "y wide": (lambda c: {"y": c["y"].double()}, BackendError, "float64"),
    "x wide": (lambda c: {"x": c["x"].double()}, BackendError, "float64"),
    "y negative": (lambda c: {"y": torch._neg_view(c["y"])}, BackendError, "negative view"),
    "x negative": (lambda c: {"x": torch._neg_view(c["x"])}, BackendError, "negative view"),
    "v negative": (lambda c: {"v": torch._neg_view(c["v"])}, BackendError, "negative view"),
    "y shared": (lambda c: {"y": c["y"][:1].expand(ROWS, N)}, ShapeError, "share memory"),
    "v packed": (lambda c: {"v": pack(c["v"].T.contiguous().float(), 8)}, BackendError, "packed"),
    "u columns": (lambda c: {"u": c["u"][:, 1:]}, ShapeError, "cores.left has 16 columns and needs 15"),
    "ends": (lambda c: {"cores": replace(c["cores"], right=normal(1, 9, 5))}, ShapeError, "cores.right has 5 columns"),
}


@pytest.mark.parametrize(("change", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_after_what_fitted(noted, change, error, words):
    first = call()
    run(first)
    with pytest.raises(error, match=words):
        run(first | change(first))
    assert len(noted.told) == 1


def test_what_is_kept_does_not_grow_without_end(noted, monkeypatch):
    monkeypatch.setattr(on_cuda, "_PLANS", 3)
    monkeypatch.setattr(on_cuda, "_TABLES", 2)
    given = [call(), call(F32), call(F16)]
    for one in given:
        for rows in range(1, 9):
            run(one | {name: one[name][:rows] for name in ("y", "x", "tasks")})
    assert len(noted.told) == 24
    assert len(on_cuda._known) <= 2
    assert all(len(told.plans) <= 3 for told in on_cuda._known.values())


@pytest.mark.usefixtures("noted")
def test_what_is_kept_holds_no_tensor():
    """Tables of an attached model are as large as it: who lets go of them has the memory back."""
    given = call()
    run(given)

    def tensors(value):
        if isinstance(value, (torch.Tensor, Cores)):
            yield value
        elif isinstance(value, dict):
            yield from (found for one in value.items() for found in tensors(one))
        elif isinstance(value, (tuple, list)):
            yield from (found for one in value for found in tensors(one))

    assert on_cuda._known
    assert not list(tensors(on_cuda._known))


def test_a_stream_is_asked_for_on_its_device(monkeypatch):
    """Of the current device by its number alone; another device is made the current one meanwhile."""
    entered = []

    class On:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 40 + index, raising=False)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=70 + device.index))
    for device, stream, switched in (("cpu", 0, []), ("cuda:1", 41, []), ("cuda:2", 72, [2, None])):
        entered.clear()
        with library.stream_of(torch.device(device)) as found:
            assert found == stream
            assert entered == switched[:1]
        assert entered == switched

"""The clock of ``benches/gpu.py`` for a GPU, on an imitation of what torch.cuda has; and goals, which are for GPUs."""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

BENCHES = Path(__file__).parents[1] / "benches"


@pytest.fixture
def bench(monkeypatch):
    """The modules of the bench, by the last part of their names."""
    monkeypatch.syspath_prepend(BENCHES)
    return SimpleNamespace(**{name: importlib.import_module(f"_gpu_{name}") for name in ("device", "cases", "runs")})


class FakeCard:
    """What EventClock asks of torch.cuda, with a log of it; a millisecond passes with every launch."""

    def __init__(self):
        self.log, self.now = [], 0.0

    def launch(self, what):
        self.log.append(what)
        self.now += 1.0

    def event(self, *, enable_timing):
        assert enable_timing
        mark = SimpleNamespace(at=None)

        def record():
            self.log.append("record")
            mark.at = self.now

        mark.record, mark.synchronize = record, lambda: self.log.append("synchronize")
        mark.elapsed_time = lambda end: end.at - mark.at
        return mark


@pytest.fixture
def card(bench, monkeypatch):
    fake = FakeCard()
    clock = object.__new__(bench.device.EventClock)
    clock.device, clock.cache_bytes = torch.device("cuda", 0), 1 << 20
    clock._flush = SimpleNamespace(zero_=lambda: fake.launch("flush"))
    stream = SimpleNamespace(wait_stream=lambda _: fake.log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: fake.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    graph = SimpleNamespace(replay=lambda: fake.launch("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    @contextlib.contextmanager
    def capturing(_):
        fake.log.append("capture")
        yield
        fake.log.append("captured")

    monkeypatch.setattr(torch.cuda, "graph", capturing)
    return SimpleNamespace(clock=clock, fake=fake)


def test_events_are_around_the_call_and_after_the_flush(card):
    assert card.clock.timed(lambda: card.fake.launch("kernel")) == 1.0
    assert card.fake.log == ["flush", "record", "kernel", "record", "synchronize"]


def test_a_graph_is_captured_once_after_a_warm_up(card, bench):
    replay = card.clock.captured(lambda: card.fake.launch("kernel"))
    warm = ["wait", *["kernel"] * bench.device.WARM_UP, "wait"]
    assert card.fake.log == [*warm, "capture", "kernel", "captured"]
    replay()
    assert card.fake.log[-1] == "replay"


def test_times_in_a_graph_are_of_one_of_its_calls(card, bench):
    found = bench.runs._graph_times(card.clock, {"ours": lambda _: card.fake.launch("kernel")}, 4, 3)
    assert found["ours"] == (0.25, 0.25, 0.25)
    # each call of the graph takes another copy
    turns = []
    bench.runs._graph_times(card.clock, {"ours": turns.append}, 4, 1)
    assert turns[-4:] == [0, 1, 2, 3]


def test_times_of_kernels_leave_copies_out(card, bench, monkeypatch):
    def event(name, kind, us):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [
        event("gram_kernel", DeviceType.CUDA, 30.0),
        event("Memset (Device)", DeviceType.CUDA, 2.0),
        event("Memcpy DtoH (Device -> Pageable)", DeviceType.CUDA, 900.0),
        event("cudaLaunchKernel", DeviceType.CPU, 5.0),
    ]
    shown = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(bench.device, "profile", lambda **_: contextlib.nullcontext(shown))
    assert card.clock.kernels(lambda: card.fake.launch("kernel")) == pytest.approx(0.032)
    assert card.fake.log == ["flush", "synchronize", "kernel", "synchronize"]
    events.clear()
    assert card.clock.kernels(lambda: None) is None


def test_goals_are_judged_on_a_gpu_and_nowhere_else(bench, card):
    most, least = bench.cases.Goal("times plain", 1.5, most=True), bench.cases.Goal("x loop", 5.0)
    record = {"times plain": 1.4, "x loop": 4.0}
    said = bench.runs._judged(record, (most, least), card.clock)
    assert said == "times plain 1.4, goal <= 1.5: met; x loop 4, goal >= 5: missed"
    assert bench.runs._judged(record, (most, least), bench.device.WallClock()) is None

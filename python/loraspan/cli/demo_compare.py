"""What ``loraspan demo`` measures: errors, bytes and accuracy of one family of sample adapters, beside plain SVDs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import subspace
from loraspan.adapters import Adapter, read_all
from loraspan.cli.demo_data import TASKS, accuracy, base_model, digits, folder
from loraspan.subspace import Subspace

DTYPE = torch.float16
# of the test images: enough for the curves, and quick
IMAGES = 300

Deltas = Mapping[str, Tensor]


@dataclass(frozen=True)
class Point:
    """A family stored in one way: bytes of bases and factors, and per task its bytes, error on dW and accuracy."""

    setting: str
    nbytes: int
    task_nbytes: tuple[float, ...]
    errors: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def error(self) -> float:
        """The mean error."""
        return float(np.mean(self.errors))

    @property
    def accuracy(self) -> float:
        """The mean accuracy."""
        return float(np.mean(self.accuracies))


@dataclass(frozen=True)
class Cut:
    """The singular triplets of one adapter's ``dW`` over all its slots, the most energy per byte first.

    Attributes:
        slots: the slot of each triplet.
        nbytes: what the first one, two, ... take.
        energy: what the first none, one, two, ... hold.
        factors: by slot ``up [n, r]`` and ``down [r, d]``, balanced, in :data:`DTYPE`.
    """

    slots: NDArray[np.str_]
    nbytes: NDArray[np.int64]
    energy: NDArray[np.float64]
    factors: Mapping[str, tuple[Tensor, Tensor]]

    def count_within(self, error: float) -> int:
        """Give the number of columns that keep the relative error at ``error`` or below."""
        return int(np.searchsorted(self.energy, (1 - error**2) * self.energy[-1] * (1 - 1e-12)))

    def bytes_of(self, count: int) -> int:
        """Give the bytes of the first ``count`` columns."""
        return int(self.nbytes[count - 1]) if count else 0

    def deltas(self, count: int) -> Deltas:
        """Give ``dW`` of the first ``count`` columns, its factors rounded to :data:`DTYPE`."""
        made = {}
        for path, (up, down) in self.factors.items():
            rank = int((self.slots[:count] == path).sum())
            made[path] = up[:, :rank].float() @ down[:rank].float()
        return made


class Family:
    """The sample adapters of one family on their base model.

    Args:
        name: one of :data:`loraspan.cli.demo_data.FAMILIES`.
        step: called after each adapter that was measured.
        images: how many of the test images to measure with at the most.
    """

    def __init__(self, name: str, step: Callable[[], None] = lambda: None, *, images: int = IMAGES) -> None:
        place = folder()
        read = {a.name.removeprefix(f"{name}-"): a for a in read_all(str(place / "adapters" / f"{name}-*"))}
        self.name = name
        self.adapters = {task: read[task] for task in TASKS}
        self.originals = [_deltas(adapter) for adapter in self.adapters.values()]
        self.cuts = [_cut(adapter) for adapter in self.adapters.values()]
        self.file_nbytes = sum(_file_bytes(adapter) for adapter in self.adapters.values())
        self._step = step
        self._model = base_model(place)
        self._weights = {path: self._model.get_parameter(f"{path}.weight").clone() for path in self.originals[0]}
        test = digits(training=False)
        self._tests = [make(test.images[:images], test.labels[:images]) for make in TASKS.values()]

    def compress(self, **goal: float) -> tuple[Subspace, Point]:
        """Compress the family to one goal of :func:`loraspan.compress`, and measure what comes back."""
        space = subspace.compress(list(self.adapters.values()), dtype=DTYPE, **goal)  # type: ignore[arg-type]
        report = space.report()
        rebuilt = [_deltas(space.reconstruct(adapter.name)) for adapter in self.adapters.values()]
        shares = {line.name: line.nbytes + report.basis_nbytes / len(rebuilt) for line in report.tasks}
        task_nbytes = [shares[adapter.name] for adapter in self.adapters.values()]
        setting = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in goal.items())
        return space, self.measure(setting, task_nbytes, rebuilt)

    def plain(self, nbytes: int) -> Point:
        """Measure every adapter's own truncated SVD, ranks chosen freely per module, at the smallest common error.

        The smallest whose factors take at most ``nbytes`` for all adapters together.
        """
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.plain_nbytes(middle) <= nbytes else (middle, high)
        counts = [cut.count_within(high) for cut in self.cuts]
        sizes = [cut.bytes_of(count) for cut, count in zip(self.cuts, counts, strict=True)]
        return self.measure("SVD", sizes, [cut.deltas(n) for cut, n in zip(self.cuts, counts, strict=True)])

    def plain_nbytes(self, error: float) -> int:
        """Give the bytes of every adapter's own truncated SVD at one error."""
        return sum(cut.bytes_of(cut.count_within(error)) for cut in self.cuts)

    def original(self) -> Point:
        """Measure the adapters as they came."""
        return self.measure("original", [adapter.nbytes for adapter in self.adapters.values()], self.originals)

    def base(self) -> Point:
        """Measure the base model with the task's head and nothing else."""
        nothing = {path: torch.zeros_like(weight) for path, weight in self._weights.items()}
        return self.measure("base", [0] * len(self.adapters), [nothing] * len(self.adapters))

    def measure(self, setting: str, task_nbytes: Sequence[float], rebuilt: Sequence[Deltas]) -> Point:
        """Give error and accuracy of every task for the ``dW`` in ``rebuilt``, in the order of the adapters."""
        errors, accuracies = [], []
        for adapter, original, deltas, test in zip(
            self.adapters.values(), self.originals, rebuilt, self._tests, strict=True
        ):
            errors.append(_distance(original, deltas))
            accuracies.append(self._accuracy(adapter, deltas, *test))
            self._step()
        return Point(setting, round(sum(task_nbytes)), tuple(task_nbytes), tuple(errors), tuple(accuracies))

    def _accuracy(self, adapter: Adapter, deltas: Deltas, images: Tensor, labels: Tensor) -> float:
        for path, weight in self._weights.items():
            self._model.get_parameter(f"{path}.weight").data = weight + deltas[path]
        for key, tensor in adapter.extras.items():
            self._model.head.get_parameter(key.rpartition(".")[2]).data = tensor.float()
        return accuracy(self._model, images, labels)


def _deltas(adapter: Adapter) -> Deltas:
    return {path: slot.scale * slot.up.float() @ slot.down.float() for path, slot in adapter.slots.items()}


def _distance(original: Deltas, deltas: Deltas) -> float:
    lost = sum(float((original[path] - deltas[path]).double().square().sum()) for path in original)
    whole = sum(float(delta.double().square().sum()) for delta in original.values())
    return float((lost / whole) ** 0.5)


def _cut(adapter: Adapter) -> Cut:
    """Take the SVD of every slot of an adapter, and order all columns by energy per byte."""
    factors, slots, energies, sizes = {}, [], [], []
    for path, slot in adapter.slots.items():
        q_up, r_up = torch.linalg.qr(slot.scale * slot.up.double())
        q_down, r_down = torch.linalg.qr(slot.down.double().T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T)
        factors[path] = ((q_up @ u * s.sqrt()).to(DTYPE), (s.sqrt()[:, None] * vh @ q_down.T).to(DTYPE))
        slots += [path] * len(s)
        energies += s.square().tolist()
        sizes += [sum(slot.shape) * DTYPE.itemsize] * len(s)
    order = np.argsort(-np.array(energies) / np.array(sizes), kind="stable")
    energy, nbytes = np.cumsum(np.array(energies)[order]), np.cumsum(np.array(sizes)[order])
    # nothing kept has no energy: counts start at 0
    return Cut(np.array(slots)[order], nbytes, np.concatenate([[0.0], energy]), factors)


def _file_bytes(adapter: Adapter) -> int:
    place = folder() / "adapters" / adapter.name
    return sum(path.stat().st_size for path in place.iterdir())

"""The sample adapters of ``loraspan demo``: where they lie, the tasks they were trained for, and their test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loraspan.cli.demo_model import DigitsTransformer
from loraspan.errors import ArgumentError, FormatError

FAMILIES = ("shared-seed", "own-seed")
TRAINING_IMAGES = 1200

_PRIMES = (2, 3, 5, 7)
# loops in each printed digit
_HOLES = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)


@dataclass(frozen=True)
class Digits:
    """Images ``[count, 8, 8]`` with pixels from 0 to 1, and labels ``[count]`` from 0 to 9."""

    images: Tensor
    labels: Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noisy(images: Tensor) -> Tensor:
    return images + 0.25 * torch.randn(images.shape, generator=_generator(5))


def _occluded(images: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(images[:, :4]), images[:, 4:]], dim=1)


def _shuffled(images: Tensor) -> Tensor:
    """Put the sixteen patches in another order, the same for every image."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 2, 2)
    mixed = patches[:, torch.randperm(16, generator=_generator(3))]
    return mixed.reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(-1, 8, 8)


# what each task makes of the digits; the model always has ten outputs, whatever the number of classes
TASKS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "parity": lambda images, labels: (images, labels % 2),
    "at-least-5": lambda images, labels: (images, (labels >= 5).long()),
    "prime": lambda images, labels: (images, torch.isin(labels, torch.tensor(_PRIMES)).long()),
    "holes": lambda images, labels: (images, torch.tensor(_HOLES)[labels]),
    "successor": lambda images, labels: (images, (labels + 1) % 10),
    "mirrored": lambda images, labels: (images.flip(2), labels),
    "upside-down": lambda images, labels: (images.rot90(2, (1, 2)), labels),
    "rotated": lambda images, labels: (images.rot90(1, (1, 2)), labels),
    "inverted": lambda images, labels: (1 - images, labels),
    "noisy": lambda images, labels: (_noisy(images), labels),
    "occluded": lambda images, labels: (_occluded(images), labels),
    "shuffled": lambda images, labels: (_shuffled(images), labels),
}


def check_extra() -> None:
    """Raise if what the extra ``demo`` brings is not installed.

    Raises:
        ArgumentError: names what is missing and how to get it.
    """
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        if find_spec(module) is None:
            raise ArgumentError(f"demo: needs {package}, which is not installed: pip install 'loraspan[demo]'")


def digits(*, training: bool) -> Digits:
    """Give the training or the test images of scikit-learn's digits, split with a fixed seed."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=_generator(0))
    chosen = order[:TRAINING_IMAGES] if training else order[TRAINING_IMAGES:]
    images = torch.as_tensor(bunch.images, dtype=torch.float32)[chosen] / 16
    return Digits(images, torch.as_tensor(bunch.target, dtype=torch.int64)[chosen])


def folder() -> Path:
    """Give the folder ``examples`` with the sample adapters: in the installed package, or beside it in a clone.

    Raises:
        FormatError: if neither holds them.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "examples", package.parents[1] / "examples"]
    for place in places:
        if (place / "base" / "model.safetensors").is_file():
            return place
    raise FormatError(f"demo: the sample adapters are not in {places[0]}, nor in {places[1]}; reinstall loraspan")


def base_model(place: Path) -> DigitsTransformer:
    """Give the base model of the sample adapters from the folder ``examples``, ready for evaluation."""
    model = DigitsTransformer()
    weights = load_file(place / "base" / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Give the share of ``images`` whose largest logit is at their label."""
    return float((model(images).argmax(-1) == labels).float().mean())

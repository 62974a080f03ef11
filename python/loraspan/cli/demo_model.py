"""The tiny transformer of the sample adapters, its tasks, and how well it does: scikit-learn's 8 x 8 digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 96
HIDDEN = 192
BLOCKS = 2
HEADS = 4
PATCH = 2
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down")


class Block(nn.Module):
    """Attention and a two-layer perceptron, normalised before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Take and give ``[images, tokens, WIDTH]``."""
        h = self.norm1(x)
        # [images, HEADS, tokens, WIDTH / HEADS]
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.o_proj(mixed)
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class DigitsTransformer(nn.Module):
    """Sixteen patches of 2 x 2 pixels as tokens, two blocks, the mean token into a linear head of ten outputs."""

    def __init__(self) -> None:
        super().__init__()
        tokens = (8 // PATCH) ** 2
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Give logits ``[images, 10]`` of ``[images, 8, 8]`` with pixels from 0 to 1."""
        patches = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(-2).flatten(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits

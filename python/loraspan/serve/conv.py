"""A convolution with tasks: patches of the input are rows, and ``dW`` is a matrix over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loraspan.collection.collection import SlotSpace
from loraspan.errors import ArgumentError, ShapeError, UnsupportedError
from loraspan.serve.known import plain
from loraspan.serve.layer import Served
from loraspan.serve.rows import Rows
from loraspan.serve.steady import added
from loraspan.serve.tables import SlotTables


class ServedConv2d(Served):
    r"""``base(x) + dW * x`` with the stride, padding (of any mode) and dilation of the base.

    ``dW [cout, cin * kh * kw]`` is what is added to the weight, so the answer is that of the merged weights. PEFT's own
    layer, not merged, pads with zeros and does not dilate, whatever its base does: where the base pads otherwise or
    dilates, it is PEFT's merged model that this agrees with. Sums and error are those of
    :func:`loraspan.ops.shared_lora` for patches of ``cin * kh * kw`` entries.

    Args:
        base: an `nn.Conv2d` with one group.
        path: of it in the model.
        tables: of its slot.
        space: of its slot.

    Raises:
        UnsupportedError: if it is another kind of convolution, or has groups: a factor A of PEFT meets all channels
            then and B some of them, so that there is no ``dW`` of the shape of the weight.
        ShapeError: if the slot has another kernel.
    """

    tables: SlotTables

    def __init__(self, base: nn.Module, path: str, tables: SlotTables, space: SlotSpace) -> None:
        super().__init__(base, path)
        self.tables = tables
        _check(plain(base), path, space)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x [B, cin, height, width]``, or one without its first axis."""
        y: Tensor = self.base(x)
        rows = self.rows()
        if rows is None:
            return y
        if rows.per == "token":
            raise ArgumentError(f"module {self.path!r}: it is a convolution, which has no tokens; name tasks per row")
        if x.ndim == 3:
            return self._added(y[None], x[None], rows)[0]
        return self._added(y, x, rows)

    def _added(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        batch, n, height, width = y.shape
        # [B, d, places]
        patches = _patches(plain(self.base), x)
        lead = (batch, height * width)
        ids, shares = rows.of(lead, y.device)
        flat_x, flat_y = patches.mT.reshape(-1, patches.shape[1]), y.flatten(2).mT.reshape(-1, n)
        out = added(self.path, self.tables, flat_y, flat_x, ids, shares)
        return out.reshape(*lead, n).mT.reshape(y.shape)


def _patches(base: nn.Module, x: Tensor) -> Tensor:
    """Give the patches that the kernel meets, ``[B, cin * kh * kw, places]``."""
    assert isinstance(base, nn.Conv2d)
    # left, right, top, bottom: torch has it for padding given in any way
    padding = base._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x = torch.nn.functional.pad(x, padding, mode=mode)
    return torch.nn.functional.unfold(x, base.kernel_size, dilation=base.dilation, stride=base.stride)


def _check(base: nn.Module, path: str, space: SlotSpace) -> None:
    kind = type(base).__name__
    methods = [getattr(type(base), name, None) for name in ("forward", "_conv_forward")]
    if not isinstance(base, nn.Conv2d) or methods != [nn.Conv2d.forward, nn.Conv2d._conv_forward]:
        raise UnsupportedError(
            f"attach: module {path!r} is to be an nn.Conv2d, as its slot is; it is a {kind}, which is not known here"
        )
    if base.groups != 1:
        raise UnsupportedError(
            f"attach: convolution {path!r} has {base.groups} groups, for which LoRA has no dW like the weight"
        )
    cout, *kernel = base.weight.shape
    if space.kernel != tuple(kernel) or space.shape[0] != cout:
        raise ShapeError(
            f"attach: slot {path!r} is for {space.shape[0]} channels out and a kernel {space.kernel} (channels in, "
            f"height, width); the module has {cout} and {tuple(kernel)}: is it the adapters' base model?"
        )

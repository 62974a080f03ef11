"""Tensors that say they lie on a device which this machine lacks, and keep their numbers on the CPU.

A :class:`Shadow` runs every call on its inner tensor, once :class:`Rules` has found nothing against it: so the code
that runs on the device runs here with its real numbers. :class:`Machine` makes torch give shadows where the device is
asked for. What is on the other side stays an ordinary tensor, so an operand left there is seen.
"""

import contextlib
import threading
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
VIEWS = """
    view _unsafe_view reshape permute transpose t slice select unsqueeze squeeze expand as_strided detach alias split
    split_with_sizes diagonal unbind
"""
COPIES = """
    clone copy_ _to_copy cat stack constant_pad_nd empty empty_like new_empty zeros zeros_like new_zeros ones_like
    new_ones full full_like fill_ zero_ arange
"""
ELEMENTWISE = """
    add add_ sub sub_ mul mul_ div neg abs where eq ne lt le gt ge bitwise_and bitwise_or bitwise_not logical_and
    logical_not clamp square
"""
GATHERS = "gather index index_select embedding"
# over the few tasks of one row, in shared_lora
SMALL_SUMS = "any sum"
PRODUCTS = {"mm", "bmm"}
ON_METAL = {*VIEWS.split(), *COPIES.split(), *ELEMENTWISE.split(), *GATHERS.split(), *SMALL_SUMS.split(), *PRODUCTS}
NOT_ON_METAL = {torch.float64, torch.complex64, torch.complex128}


class Fault(AssertionError):
    """Something that the device cannot do, or does wrong."""


class Call(NamedTuple):
    """One call on the device: its name, and shape, dtype and strides of each operand."""

    name: str
    operands: tuple


class Rules:
    """What a device may be asked for, and a record of what it was asked for."""

    def __init__(self, kind):
        self.kind = kind
        self.calls = []
        self.moves = []
        # what does a copy that need not wait, and what comes before numbers are read, where streams are simulated
        self.copy_later = self.before = None

    @property
    def names(self):
        return {call.name for call in self.calls}

    def check(self, name, tensors):
        if self.before is not None and name not in VIEWS.split():
            self.before()
        here = [t for t in tensors if isinstance(t, Shadow)]
        self.calls.append(Call(name, tuple((tuple(t.shape), t.dtype, t.stride()) for t in here)))
        # a number in a call becomes a tensor without dimensions, which torch takes along
        others = [t for t in tensors if not isinstance(t, Shadow) and t.ndim]
        if name != "copy_" and others:
            other = others[0]
            raise Fault(f"{name} on {self.kind} takes an operand of shape {list(other.shape)} that lies on the CPU")
        if others and len({t.dtype for t in tensors}) > 1:
            raise Fault(f"{name} copies between devices and converts at once: {[t.dtype for t in tensors]}")
        if self.kind != "mps":
            return
        if name not in ON_METAL:
            raise Fault(f"{name} is not among what is used on Metal")
        if name in PRODUCTS and not all(t.is_contiguous() for t in here):
            raise Fault(f"{name} takes contiguous operands; got strides {[t.stride() for t in here]}")

    def check_result(self, name, tensor):
        if self.kind == "mps" and tensor.dtype in NOT_ON_METAL:
            raise Fault(f"{name} makes a {tensor.dtype} tensor on Metal")

    def move(self, tensor, direction, dtype):
        if self.before is not None:
            self.before()
        self.moves.append((direction, tensor.numel() * tensor.element_size(), threading.current_thread()))
        if dtype is not None and dtype != tensor.dtype:
            raise Fault(f"a move {direction} the device converts at once, {tensor.dtype} to {dtype}")


class Shadow(torch.Tensor):
    """``inner``, said to lie on ``device``."""

    @staticmethod
    def __new__(cls, inner, device, rules):
        # for torch itself it is on the CPU: kernels of a device that it was not built for are looked for otherwise
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner, made.place, made.rules = inner, device, rules
        return made

    def __init__(self, *_):
        self.rules.check_result("a tensor", self)

    @property
    def device(self):
        return self.place

    is_cuda = property(lambda self: self.place.type == "cuda")
    is_mps = property(lambda self: self.place.type == "mps")
    is_cpu = property(lambda _: False)

    def __repr__(self):
        return f"Shadow({self.inner!r}, {self.place})"

    def data_ptr(self):
        raise Fault(f"something on the CPU asks for the address of a tensor on {self.place}")

    def record_stream(self, stream):
        """Tell an allocator that there is not."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return _moved(func, args, kwargs)
        later = args[0].rules.copy_later if func is torch.Tensor.copy_ and isinstance(args[0], Shadow) else None
        if later is not None and kwargs.get("non_blocking"):
            later(args[0], args[1])
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, torch.Tensor)]
        first = next(t for t in tensors if isinstance(t, Shadow))
        name = func.overloadpacket.__name__
        first.rules.check(name, tensors)
        bare = tree_map(_inner, (args, kwargs or {}))
        out = func(*bare[0], **bare[1])
        known = {id(t.inner): t for t in tensors if isinstance(t, Shadow)}

        def dressed(result):
            if not isinstance(result, torch.Tensor):
                return result
            first.rules.check_result(name, result)
            return known.get(id(result)) if id(result) in known else Shadow(result, first.place, first.rules)

        # a copy to the CPU gives the tensor there
        return args[0] if name == "copy_" else tree_map(dressed, out)


def _inner(value):
    return value.inner if isinstance(value, Shadow) else value


def _moved(func, args, kwargs, machine=None):
    """Do ``.to`` and ``.cpu``."""
    tensor, *rest = args
    if func is torch.Tensor.cpu:
        device, dtype = torch.device("cpu"), None
    elif rest and isinstance(rest[0], torch.Tensor):
        device, dtype = rest[0].device, rest[0].dtype
        machine = machine or (rest[0] if isinstance(rest[0], Shadow) else None)
    else:
        device, dtype, *_ = torch._C._nn._parse_to(*rest, **{k: v for k, v in kwargs.items() if k != "copy"})
    here = tensor.device
    if device is None or device.type == here.type:
        change = {} if dtype is None else {"dtype": dtype}
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.to(**change, copy=kwargs.get("copy", False)) if change or kwargs.get("copy") else tensor
    if isinstance(tensor, Shadow):
        tensor.rules.move(tensor, "from", dtype)
        return tensor.inner.clone()
    machine.rules.move(tensor, "to", dtype)
    return Shadow(tensor.detach().clone(), machine.place, machine.rules)


class Machine(TorchFunctionMode):
    """A machine that has one device of a kind, ``"mps"`` or ``"cuda"``."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.place, self.rules = kind, torch.device(kind, 0), Rules(kind)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and not isinstance(args[0], Shadow):
            return _moved(func, args, kwargs, self)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == self.kind:
            del kwargs["device"]
            made = func(*args, **kwargs)
            return made if isinstance(made, Shadow) else Shadow(made, self.place, self.rules)
        return func(*args, **kwargs)

    def put(self, tensor):
        """Give a tensor on the device; its numbers are a copy, its strides the same."""
        memory = tensor.untyped_storage().clone()
        inner = torch.empty(0, dtype=tensor.dtype)
        inner.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
        return Shadow(inner, self.place, self.rules)


@contextlib.contextmanager
def machine(kind, monkeypatch):
    """Run on a machine with such a device, which torch says is there."""
    if kind == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    else:
        for name, value in (("is_available", True), ("device_count", 1), ("current_device", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with Machine(kind) as found:
        yield found

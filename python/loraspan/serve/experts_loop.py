"""What a module of stacked experts does, found out by running a small one; and the same with something in between."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraspan.errors import UnsupportedError
from loraspan.serve.extras_modules import twin

# a stand-in with as many experts, hidden entries and entries between is what a module's forward is known by; grouped
# products want strides of a multiple of 16 bytes
_SMALL = (4, 8, 16)
_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
# a parameter; what it made of x, y [S, n]; x [S, d]; the experts and the tokens of those rows [S]; gives y
Between = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]
Routed = tuple[Tensor, Tensor, Tensor]


class Form(NamedTuple):
    """What a module of experts does: ``down(gate(up(x)))``, weighted and summed.

    Attributes:
        parameters: the first and the second product's, ``[E, n, d]``.
        is_transposed: whether they are ``[E, d, n]``.
        has_bias: whether each has another, ``<name>_bias [E, n]``.
        sums: the dtype that a token's experts are added in: that of its state or of its weights, or float32.
        implementations: those of transformers that are known to be this too.
    """

    parameters: tuple[str, str]
    is_transposed: bool
    has_bias: bool
    sums: str = "states"
    implementations: tuple[str, ...] = ()


def form_of(base: nn.Module, path: str) -> Form:
    """Find out what a module of experts does.

    Raises:
        UnsupportedError: if it is none that is known, naming it and saying why.
    """
    gated = "gate_up_proj" if getattr(base, "has_gate", True) else "up_proj"
    is_transposed, has_bias = (bool(getattr(base, name, False)) for name in ("is_transposed", "has_bias"))
    form = Form((gated, "down_proj"), is_transposed, has_bias)
    reason = _lack(base, form)
    if reason is None:
        with torch.device("cpu"):
            for sums in ("states", "weights", "float32"):
                form = form._replace(sums=sums)
                reason = _difference(base, form)
                if reason is None:
                    break
    if reason is not None:
        raise UnsupportedError(
            f"attach: module {path!r} is a {type(base).__name__}, and experts like that are not known here: {reason}. "
            "Export the tasks, or attach a space without slots of experts"
        )
    if not hasattr(base, "is_concatenated"):
        return form
    with torch.device("cpu"):
        return form._replace(implementations=tuple(name for name in _IMPLEMENTATIONS if _is_known(base, form, name)))


def _lack(base: nn.Module, form: Form) -> str | None:
    """Say what a module lacks to have experts of a form."""
    parameters = dict(base.named_parameters(recurse=False))
    if not all(name in parameters and parameters[name].ndim == 3 for name in form.parameters):
        return "it has no stacked parameters gate_up_proj or up_proj, and down_proj"
    if len({parameters[name].shape[0] for name in form.parameters}) > 1:
        return "its parameters are of different numbers of experts"
    if not all(parameters[name].is_floating_point() for name in form.parameters):
        return "its experts are quantized"
    if getattr(base, "_is_expert_parallel", False):
        return "it has a part of its experts here, and their numbers are others"
    return None


def _difference(base: nn.Module, form: Form) -> str | None:
    """Run a stand-in of the module and the loop here; say what differs, if anything does."""
    forward = inspect.unwrap(type(base).forward)
    if len(inspect.signature(forward).parameters) != 4:
        return "its forward takes something else than tokens, their experts and the experts' weights"
    if "forward" in base.__dict__ and not hasattr(base, "_hf_hook"):
        return "its forward was replaced by another"
    for dtype, weights_dtype in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        small, (x, index, weights) = _stand_in(base, form, dtype)
        weights = weights.to(weights_dtype)
        ours = loop(small, form, x, index, weights, lambda _, y, *__: y)
        try:
            theirs = forward(small, x, index, weights)
        except Exception as error:
            # whatever it is: the module is not known
            return f"a small one of its class fails: {type(error).__name__}: {str(error)[:200]}"
        if not (isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)):
            return "its forward is not the loop that is done here"
        # tokens may be sent to no expert; some modules do something else with those
        nobody = torch.where(index == 3, _SMALL[0], index)
        ours = loop(small, form, x, nobody, weights, lambda _, y, *__: y)
        with contextlib.suppress(Exception):
            if not torch.equal(forward(small, x, nobody, weights), ours):
                return "it does something of its own with tokens that it has no expert for"
    return None


def _is_known(base: nn.Module, form: Form, implementation: str) -> bool:
    """Say whether an implementation of transformers has its products where they are looked for."""
    small, batch = _stand_in(base, form, torch.float32)
    same: list[bool] = []

    def compare(parameter: str, y: Tensor, x: Tensor, experts: Tensor, tokens: Tensor) -> Tensor:
        rows = [_linear(small, form, parameter, int(e), row[None])[0] for e, row in zip(experts, x, strict=True)]
        right = torch.allclose(y, torch.stack(rows), rtol=1e-4, atol=1e-4)
        same.append(right and (parameter == form.parameters[1] or torch.equal(x, batch[0][tokens])))
        return y

    try:
        found = run(small, form, implementation, batch, compare)
    except Exception:
        return False
    return same == [True, True] and torch.allclose(found, loop(small, form, *batch, lambda _, y, *__: y), rtol=1e-3)


def _stand_in(base: nn.Module, form: Form, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """Give a small module that does what ``base`` does, and a batch; entries are large enough to meet any limits."""
    experts, hidden, between = _SMALL
    rng = torch.Generator().manual_seed(20)
    first = between * (2 if form.parameters[0] == "gate_up_proj" else 1)
    parameters: dict[str, nn.Parameter] = {}
    for name, (n, d) in zip(form.parameters, ((first, hidden), (hidden, between)), strict=True):
        shape = (experts, d, n) if form.is_transposed else (experts, n, d)
        parameters[name] = nn.Parameter(3 * torch.randn(shape, generator=rng).to(dtype), requires_grad=False)
        if form.has_bias:
            bias = torch.randn(experts, n, generator=rng).to(dtype)
            parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
    small = twin(base, parameters)
    count = getattr(base, form.parameters[0]).shape[0]
    small.__dict__.update(
        {name: experts for name, value in base.__dict__.items() if type(value) is int and value == count}
    )
    x = torch.randn(6, hidden, generator=rng).to(dtype)
    # three experts a token, as a sum of two is rounded once however it is done; one of them in every place, one in none
    index = torch.tensor([[0, 2, 3], [2, 3, 0], [3, 0, 2], [2, 0, 3], [0, 3, 2], [3, 2, 0]])
    return small, (x, index, torch.rand(6, 3, generator=rng).to(dtype))


def implementation_of(base: nn.Module) -> str:
    """Give the name of what runs the experts."""
    if not hasattr(base, "is_concatenated"):
        return "eager"
    return getattr(base.config, "_experts_implementation", None) or "eager"


def _linear(base: nn.Module, form: Form, parameter: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(base, parameter)[expert]
    y = x @ weight if form.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(base, f"{parameter}_bias")[expert] if form.has_bias else y


def _gate(base: nn.Module, form: Form, y: Tensor) -> Tensor:
    act: Any = getattr(base, "act_fn", None)
    own = getattr(base, "_apply_gate", None)
    if form.parameters[0] != "gate_up_proj":
        gated: Tensor = act(y)
    elif own is not None:
        gated = own(y)
    else:
        gate, up = y.chunk(2, dim=-1)
        gated = act(gate) * up
    return gated


def loop(base: nn.Module, form: Form, x: Tensor, index: Tensor, weights: Tensor, between: Between) -> Tensor:
    """Do what the module's own forward does, and ``between`` after each product."""
    first, second = form.parameters
    count = getattr(base, first).shape[0]
    dtype = {"states": x.dtype, "weights": weights.dtype, "float32": torch.float32}[form.sums]
    out = torch.zeros_like(x, dtype=dtype)
    for expert in sorted(set(index.flatten().tolist())):
        if expert >= count:
            # a token that is sent nowhere, as where experts are spread over devices
            continue
        place, tokens = torch.where((index == expert).mT)
        experts = torch.full_like(tokens, expert)
        state = x[tokens]
        state = _gate(base, form, between(first, _linear(base, form, first, expert, state), state, experts, tokens))
        state = between(second, _linear(base, form, second, expert, state), state, experts, tokens)
        out.index_add_(0, tokens, (state * weights[tokens, place, None]).to(dtype))
    return out.to(x.dtype)


class _Hooked:
    """A module of experts to an implementation of transformers, which calls back between its products."""

    def __init__(self, base: nn.Module, gate: Callable[[Tensor], Tensor], last: Callable[[Tensor], Tensor]) -> None:
        self._base = base
        self.has_post_expert_norm = True
        self._apply_gate = self.act_fn = gate
        self.post_expert_norm = last

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def run(
    base: nn.Module, form: Form, implementation: str, batch: tuple[Tensor, Tensor, Tensor], between: Between
) -> Tensor:
    """Run an implementation of transformers, and ``between`` after each of its products."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    x, index, _ = batch
    experts = index.reshape(-1)
    tokens = torch.arange(experts.shape[0], device=x.device) // index.shape[1]
    if implementation == "grouped_mm":
        # as it sorts them
        experts, order = torch.sort(experts)
        tokens = order // index.shape[1]
    states: list[Tensor] = []

    def gate(y: Tensor) -> Tensor:
        states.append(_gate(base, form, between(form.parameters[0], y, x[tokens], experts, tokens)))
        return states[0]

    def last(y: Tensor) -> Tensor:
        return between(form.parameters[1], y, states[0], experts, tokens)

    found: Tensor = ALL_EXPERTS_FUNCTIONS[implementation](_Hooked(base, gate, last), *batch)
    return found

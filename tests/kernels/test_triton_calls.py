"""What Triton's backends refuse and why, and what only they promise: NaN for a task out of range, no copy twice."""

import pytest
import torch

import oracles
from devices import Piece, combine, gram, interpreting, power, reconstruct_many, shared_lora, sketch
from loraspan.errors import BackendError
from matrices import normal
from oracles import BF16, F16, F32, F64
from task_cores import batch, planted

pytest.importorskip("triton", reason="triton is not installed")
X, Q = torch.ones(3, 4), torch.ones(3, 1, dtype=F64)
CALLS = {
    "gram": lambda x: gram(x, backend="triton"),
    "gram of a batch": lambda x: gram(x[None], backend="triton"),
    "combine": lambda x: combine(x, Q, backend="triton"),
    "sketch": lambda x: sketch(x, 2, backend="triton"),
    "power": lambda x: power(x, Q, backend="triton"),
    "reconstruct": lambda x: reconstruct_many([Piece(x, None, torch.empty_like(x))], backend="triton"),
}
elsewhere = pytest.mark.skipif(
    interpreting() or torch.cuda.is_available(),
    reason="Triton interprets, or has a GPU to go to",
)
here = pytest.mark.skipif(
    not interpreting() and not torch.cuda.is_available(), reason="no GPU, and TRITON_INTERPRET=1 is not set"
)


@elsewhere
@pytest.mark.parametrize("call", CALLS)
def test_cpu_tensors_are_refused(call):
    with pytest.raises(
        BackendError, match=r"'triton' refuses .* on cpu; it runs on CUDA devices, .*TRITON_INTERPRET=1"
    ):
        CALLS[call](X)


@pytest.mark.parametrize("call", CALLS)
def test_other_devices_are_refused(call):
    with pytest.raises(BackendError, match=r"'triton' refuses this call: tensors are on meta"):
        CALLS[call](X.to("meta"))


@here
def test_a_task_out_of_range_makes_its_row_nan():
    cores, (y, x, v, u) = planted(1, [(2, 1, 1, 1)] * 3, 70, 40, 5, 6), batch(2, 6, 70, 40, 5, 6)
    tasks = torch.tensor([[0, -1], [3, 0], [-1, -2], [1, 2**40], [2, 1], [-1, -1]])
    out = shared_lora(y, x, v, u, cores, tasks, backend="triton")
    assert out[[1, 2, 3]].isnan().all()
    assert torch.isfinite(out[[0, 4, 5]]).all()
    assert oracles.same_bits(out[5], y[5])


def test_bases_of_too_many_columns_are_refused():
    from loraspan.triton_ops.shared_lora import refuses

    y, x, v, u = batch(3, 2, 9, 8, 3, 513)
    assert refuses(y, x, v, u) == "v has 513 columns, and it takes at most 512"


@here
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_a_basis_may_be_turned_in_place(dtype):
    """Past a tile on both sides: no tile may be written before the last one that reads its rows."""
    basis, turn = normal(4, 130, 70, dtype=dtype), normal(5, 70, 70, dtype=dtype)
    exact = oracles.reconstruct(oracles.to_numpy(basis), oracles.to_numpy(turn), 0.3)
    wide = F64 if dtype == F64 else F32
    bound = oracles.reconstruct_bound(oracles.to_numpy(basis), oracles.to_numpy(turn), 0.3, dtype, wide)
    reconstruct_many([Piece(basis, turn, basis, 0.3)], backend="triton")
    oracles.assert_within(basis, exact, bound)


@here
def test_tables_of_the_last_calls_are_kept():
    """What lets a CUDA graph capture a call with many pieces; and no more of them than a few."""
    from loraspan.triton_ops import reconstruct as module

    out = torch.zeros(5, 4)
    pieces = [Piece(normal(6, 5, 2, dtype=F32), None, out[:, :2]), Piece(normal(7, 5, 2, dtype=F32), None, out[:, 2:])]
    reconstruct_many(pieces, backend="triton")
    count = len(module._tables)
    if interpreting():
        reconstruct_many(pieces, backend="triton")
        assert len(module._tables) == count
    for scale in range(module._KEPT + 3):
        reconstruct_many([piece._replace(scale=scale + 0.3) for piece in pieces], backend="triton")
    assert len(module._tables) == module._KEPT
    oracles.assert_within(
        out,
        oracles.to_numpy(torch.cat([piece.basis for piece in pieces], dim=1)) * (module._KEPT + 2.3),
        oracles.reconstruct_bound(
            oracles.to_numpy(torch.cat([piece.basis for piece in pieces], dim=1)), None, module._KEPT + 2.3, F32, F32
        ),
    )


@here
def test_nothing_is_written_past_a_workspace(monkeypatch):
    """The last entries of every workspace and answer are where the last tile would overflow."""
    honest, guards = torch.empty, []

    def guarded(*size, **options):
        if len(size) != 1 or not isinstance(size[0], int):
            return honest(*size, **options)
        whole = honest(size[0] + 256, **options).fill_(5)
        guards.append(whole[size[0] :])
        return whole[: size[0]].fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", guarded)
    x, q = [normal(8, 17, 129, dtype=F16), normal(9, 20, 129, dtype=F16)], normal(10, 37, 5)
    for call in (
        lambda: gram(x, backend="triton"),
        lambda: combine(x, q, backend="triton").xv,
        lambda: sketch(x, 5, backend="triton"),
        lambda: power(x, q, backend="triton"),
        lambda: shared_lora(
            *batch(11, 3, 19, 21, 5, 3),
            planted(12, [(1, 1, 1, 1)], 19, 21, 5, 3),
            torch.zeros(3, 1).long(),
            backend="triton",
        ),
    ):
        guards.clear()
        assert not call().isnan().any()
        assert guards
        assert all((guard == 5).all() for guard in guards)

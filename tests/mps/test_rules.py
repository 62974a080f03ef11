"""The witness sees what Metal cannot do or does wrong, and leaves the rest alone."""

import pytest
import torch

from shadow import Fault


@pytest.mark.usefixtures("mps")
def test_tensors_say_where_they_lie():
    x = torch.zeros(2, 3, device="mps")
    for tensor in (x, x.T, x[:, 1:], x + 1, x.clone(), x.to(torch.float16), torch.ones(2).to("mps"), x.new_empty(4)):
        assert tensor.device == torch.device("mps", 0)
    assert x.cpu().device == x.to("cpu").device == torch.zeros(2).device


@pytest.mark.usefixtures("mps")
def test_views_share_memory_and_copies_do_not():
    there = torch.zeros(2, 3).to("mps")
    copy = there.cpu()
    there[:, 1].copy_(torch.ones(2).to("mps"))
    assert there.cpu().tolist() == [[0, 1, 0], [0, 1, 0]]
    assert not copy.any()


def test_numbers_are_those_of_the_cpu(mps):
    x, y = torch.randn(5, 7), torch.randn(7, 3)
    assert torch.equal((mps.put(x) @ mps.put(y)).cpu(), x @ y)
    assert torch.equal(torch.cat([mps.put(x), mps.put(x)]).cpu(), torch.cat([x, x]))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x.to(torch.float64), "float64 tensor on Metal"),
        (lambda x: x.cpu().double().to("mps"), "float64 tensor on Metal"),
        (lambda _: torch.zeros(2, dtype=torch.float64, device="mps"), "float64 tensor on Metal"),
        (lambda x: x.new_zeros(2, dtype=torch.float64), "float64 tensor on Metal"),
        (lambda x: x.to("cpu", torch.float64), "converts at once"),
        (lambda _: torch.ones(2, dtype=torch.float64).to("mps", torch.float32), "converts at once"),
        (lambda x: x.copy_(torch.zeros(4, 4, dtype=torch.float16)), "converts at once"),
        (lambda x: x.T @ x, "contiguous operands"),
        (lambda x: x @ x.T, "contiguous operands"),
        (lambda x: x[:, :2] @ x[:2], "contiguous operands"),
        (lambda x: x @ torch.ones(4, 1), "lies on the CPU"),
        (lambda x: torch.ones(4, 4).add_(x), "lies on the CPU"),
        (lambda x: torch.linalg.qr(x), "linalg_qr is not among"),
        (lambda x: torch.linalg.svd(x), "_linalg_svd is not among"),
        (lambda x: torch.linalg.eigh(x), "eigh is not among"),
        (lambda x: x.amax(), "amax is not among"),
        (lambda x: float(x[0, 0]), "_local_scalar_dense is not among"),
        (lambda x: x.data_ptr(), "asks for the address"),
    ],
)
@pytest.mark.usefixtures("mps")
def test_a_fault_is_seen(fault, message):
    x = torch.randn(4, 4).to("mps")
    with pytest.raises(Fault, match=message):
        fault(x)

"""What factored_svd cannot take is refused by name: the argument, what it needs, what it got."""

import numpy as np
import pytest
import torch

from loraspan.errors import ArgumentError, BackendError, NotFiniteError, ShapeError
from loraspan.linalg import factored_svd
from matrices import normal
from oracles import F16


@pytest.mark.parametrize(
    ("b", "a", "options", "error", "message"),
    [
        (
            torch.ones(3, 2),
            torch.ones(3, 4),
            {},
            ShapeError,
            r"b \[..., n, r\] and a .* one r .*got \[3, 2\] and \[3, 4",
        ),
        (torch.ones(2, 3, 2), torch.ones(3, 2, 4), {}, ShapeError, "the same batch dimensions"),
        (torch.ones(3), torch.ones(3), {}, ShapeError, r"b \[..., n, r\]"),
        (torch.ones(3, 2, dtype=torch.complex64), torch.ones(2, 4), {}, ShapeError, "b is a dense tensor.*complex64"),
        (torch.ones(3, 2), torch.ones(2, 4, dtype=torch.int32), {}, ShapeError, "a is a dense tensor.*int32"),
        (torch.ones(3, 2).to_sparse(), torch.ones(2, 4), {}, ShapeError, "b is a dense tensor.*sparse"),
        (
            torch.ones(3, 2),
            torch.ones(2, 4),
            {"rank": -1},
            ArgumentError,
            "rank is a whole number .*got -1",
        ),
        (
            torch.ones(3, 2),
            torch.ones(2, 4),
            {"scale": float("nan")},
            ArgumentError,
            "scale is a finite number; got nan",
        ),
        (torch.ones(3, 2), torch.ones(2, 4), {"scale": [1.0]}, ArgumentError, "scale is a finite number"),
        (torch.ones(3, 2), torch.ones(2, 4), {"backend": "fpga"}, BackendError, "no backend 'fpga'"),
        (torch.ones(3, 2), [torch.ones(2, 4)], {}, ArgumentError, "b and a are lists of tensors; b is Tensor"),
        ([torch.ones(3, 2)], [], {}, ArgumentError, "as many matrices; got 1 and 0"),
        ([torch.ones(1, 3, 2)], [torch.ones(1, 2, 4)], {}, ShapeError, r"lists hold matrices; b\[0\] is \[1, 3, 2\]"),
        ([torch.ones(3, 2)], [np.ones((2, 4))], {}, ArgumentError, r"a\[0\] is a tensor; got ndarray"),
        (
            [torch.ones(3, 2)],
            [torch.ones(2, 4)],
            {"scale": [1.0, 2.0]},
            ArgumentError,
            "scale is one number .* 1 pairs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(b, a, options, error, message):
    with pytest.raises(error, match=f"factored_svd: .*{message}" if "backend" not in options else message):
        factored_svd(b, a, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(6, 2, 5), (2, 6, 5)], ids=str)
def test_what_is_not_finite_is_named(bad, size, backend):
    b, a = normal(0, 3, *size[:2], dtype=F16), normal(1, 3, *size[1:], dtype=F16)
    a[1, 0, 2] = bad
    with pytest.raises(NotFiniteError, match=r"factored_svd: a holds a NaN or an infinity at \[1, 0, 2\]"):
        factored_svd(b, a, backend=backend)
    with pytest.raises(NotFiniteError, match=r"a\[1\] holds a NaN or an infinity at \[0, 2\]"):
        factored_svd(list(b), list(a), backend=backend)

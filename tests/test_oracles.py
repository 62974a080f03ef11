"""The oracles themselves, against what others published or NumPy does."""

import numpy as np
import pytest
import torch

import oracles


# the known answers of Random123, kat_vectors: counter, key, block
@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, block):
    counter, key, block = (tuple(int(word, 16) for word in text.split()) for text in (counter, key, block))
    assert oracles.philox4x32(counter, key) == block


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [(torch.float16, np.float16), (torch.float32, np.float32)])
def test_rounding_is_that_of_numpy(dtype, numpy_dtype):
    rng = np.random.default_rng(20261122)
    values = np.ldexp(rng.standard_normal(20000), rng.integers(-160, 130, 20000))
    values[:6] = [0.0, -0.0, np.inf, -np.inf, 65519.99, 65520.0]
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(oracles.rounded(values, dtype), values.astype(numpy_dtype).astype(np.float64))


def test_rounding_to_bfloat16_is_that_of_torch_from_float32():
    values = np.random.default_rng(20261122).standard_normal(20000).astype(np.float32)
    want = torch.from_numpy(values).to(torch.bfloat16).to(torch.float64).numpy()
    np.testing.assert_array_equal(oracles.rounded(values.astype(np.float64), torch.bfloat16), want)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)])
def test_rounding_takes_one_step(dtype, step):
    # float32 would first round this down to a tie
    assert oracles.rounded(np.array([1 + step / 2 + 2.0**-40]), dtype)[0] == 1 + step


def test_a_number_past_its_bound_is_named():
    with pytest.raises(AssertionError, match=r"4 times the bound at \(0, 1\): 5.0, expected 1.0"):
        oracles.assert_within(torch.tensor([[1.0, 5.0]]), np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(AssertionError, match="1 entries are a NaN"):
        oracles.assert_within(torch.tensor([[1.0, float("nan")]]), np.ones((1, 2)), np.ones((1, 2)))
    with pytest.raises(AssertionError, match="inf times the bound"):
        oracles.assert_within(torch.tensor([[1.0]]), np.zeros((1, 1)), np.zeros((1, 1)))

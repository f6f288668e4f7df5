"""Block floats in torch are golden's, to the bit."""

import numpy as np
import pytest
import torch

from moeaccel.arithmetic import quantise_float32
from moeaccel.host.quality.activations import block_floats


@pytest.mark.parametrize("planes", [1, 2])
def test_the_golden_model_s_values(planes):
    rng = np.random.default_rng(planes)
    x = rng.standard_normal((200, 96)).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 30, (200, 96 // 32)).astype(np.float32)).repeat(32, axis=1)
    x *= np.exp2(rng.integers(-20, 3, x.shape).astype(np.float32))
    x[3] = 0
    x[4, :40] = 0
    x[5] = 1e-42  # subnormal
    x[6, ::7] = np.float32(1.99999)  # rounds up; beyond balanced digits with two planes
    x[7] = np.float32(2**-126)
    expected = quantise_float32(x, planes)[0].to_float64()
    assert np.array_equal(block_floats(torch.from_numpy(x), planes).double().numpy(), expected)


def test_columns_that_fill_no_block():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    filled = torch.nn.functional.pad(x, (0, 26))
    assert torch.equal(block_floats(x, 2), block_floats(filled, 2)[:, :70])

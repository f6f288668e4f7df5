"""FP8 checkpoints whose rows and columns are not multiples of their block."""

import pytest
import torch

from moeaccel.host import errors
from moeaccel.host.importers import fp8
from moeaccel.host.importers.fp8 import dequantise

BLOCK = 128, 128


def quantised(weight, block):
    """Quantise one matrix as it is published: blocks from the first row, the last one short."""
    rows, columns = (-(-size // b) for size, b in zip(weight.shape, block, strict=True))
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.5
    exact = torch.empty(weight.shape)
    for r in range(rows):
        for c in range(columns):
            where = (slice(r * block[0], (r + 1) * block[0]),
                     slice(c * block[1], (c + 1) * block[1]))
            exact[where] = weight[where].float() * scale[r, c]
    return scale, exact


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(
        torch.float8_e4m3fn)


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (64, 96), (129, 127), (1, 1000)])
def test_one_matrix(shape):
    weight = draw(*shape)
    scale, exact = quantised(weight, BLOCK)
    assert torch.equal(dequantise(weight, scale, BLOCK), exact)


@pytest.mark.parametrize("rows", [128, 192, 96, 32, 200, 640])
def test_gate_and_up_have_a_grid_each(rows):
    """The blocks of up begin at its own first row: with 192 rows each, the grid has 4 rows, not 3;
    with 96, it has 2 either way."""
    gate, up = draw(rows, 200), draw(rows, 200).flip(0)
    (of_gate, exact_gate), (of_up, exact_up) = quantised(gate, BLOCK), quantised(up, BLOCK)
    of_up, exact_up = of_up * 3, exact_up * 3
    found = dequantise(torch.cat([gate, up]), torch.cat([of_gate, of_up]), BLOCK, parts=2)
    assert torch.allclose(found, torch.cat([exact_gate, exact_up]), rtol=1e-6)


def test_a_grid_over_all_rows():
    """384 rows in 3 blocks: they were quantised as one matrix."""
    weight = draw(384, 256)
    scale, exact = quantised(weight, BLOCK)
    assert torch.equal(dequantise(weight, scale, BLOCK, parts=2), exact)


@pytest.mark.parametrize(("grid", "block"), [
    ((1, 1), None), ((2, 1), None), ((200, 1), None), ((4, 6), BLOCK), ((1, 1), BLOCK)])
def test_the_grid_says_what_a_scale_covers(grid, block):
    weight = draw(200, 300)
    scale = torch.rand(grid) + 0.5
    ones = torch.ones(200 // grid[0], 300 // grid[1])
    expected = weight.float() * torch.kron(scale, ones)
    assert torch.equal(dequantise(weight, scale, block, parts=2), expected)


def test_scales_that_are_powers_of_two():
    weight = draw(64, 64)
    expected = weight.float() * 2.0**-3
    stored = torch.full((1, 1), 124, dtype=torch.uint8)
    assert torch.equal(dequantise(weight, stored, BLOCK), expected)
    assert torch.equal(dequantise(weight, stored.view(torch.float8_e8m0fnu), BLOCK), expected)


@pytest.mark.parametrize("grid", [(3, 3), (2, 7), (0, 3)])
def test_a_grid_that_does_not_fit_is_refused(grid):
    with pytest.raises(errors.UnsupportedExperts, match=r"FP8 weights of \(200, 300\) must have"):
        dequantise(draw(200, 300), torch.ones(grid), BLOCK)


def test_two_readings_of_a_grid_are_told_once(caplog):
    """448 rows in blocks of 128: two grids of two rows, or one of four."""
    fp8._warn_of_two_readings.cache_clear()
    gate, up = draw(224, 128), draw(224, 128).flip(0)
    (of_gate, exact_gate), (of_up, exact_up) = quantised(gate, BLOCK), quantised(up, BLOCK)
    for _ in range(2):
        found = dequantise(torch.cat([gate, up]), torch.cat([of_gate, of_up]), BLOCK, parts=2)
        assert torch.equal(found, torch.cat([exact_gate, exact_up]))
    assert len(caplog.records) == 1
    assert "2 grids, one for each matrix, or one grid over all rows" in caplog.text
    caplog.clear()
    dequantise(draw(512, 128), torch.ones(4, 1), BLOCK, parts=2)  # the same either way
    assert not caplog.records

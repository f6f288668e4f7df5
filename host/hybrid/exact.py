"""The torch device's part with the accelerator's integers: every product, rounding and sum.

Experts are computed by the golden model, and their weighted outputs are summed as integers on the
layer's grid. The accelerator's part comes as float32, which holds sums of up to 2^24 grid units
exactly; then both together are rounded once, and y has the bits that the accelerator alone would
give. A larger sum of the accelerator's part was rounded to 24 bits before; ``grid_exponent=`` can
make the grid coarser, so that none is. It runs in this process, whatever device x is on.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moeaccel.arithmetic import BFLOAT16_BITS, ELEMENT_BITS, grid_to_float32
from moeaccel.golden.block_quantiser import quantise_x, rows_of
from moeaccel.golden.combiner import Combiner
from moeaccel.golden.experts import DeviceResult, expert as compute
from moeaccel.host.errors import command_error
from moeaccel.host.layers import Experts
from moeaccel.host.tensors import float32
from moeaccel.image import Expert
from moeaccel.interface.commands import Status

__all__ = ["Exact"]


class Exact:
    """Weights as they are in images; NumPy.

    Parameters
    ----------
    experts : :class:`Experts`
        The layer.
    device : :class:`torch.device`
        Of x.
    """

    def __init__(self, experts: Experts, device: torch.device) -> None:
        del device
        self._planes, self._grid = experts._planes, experts.grid_exponent
        self._d_model = experts.shapes[0].d_model

    @staticmethod
    def input(x: torch.Tensor) -> torch.Tensor:
        """Return x as the accelerator gets it: y comes back as it went."""
        return x.float()

    @staticmethod
    def hold(slots: int) -> list[Expert | None]:
        """Return room for some experts."""
        return [None] * slots

    @staticmethod
    def grown(held: list[Expert | None]) -> list[Expert | None]:
        """Return it with room for one more."""
        return [*held, None]

    @staticmethod
    def put(held: list[Expert | None], slot: int, image: Expert) -> None:
        """Put an expert into it."""
        held[slot] = image

    def compute(self, x: torch.Tensor, ids: NDArray[np.int32], weights: torch.Tensor,
                held: list[Expert | None]) -> NDArray[np.int64]:
        """Return the sums of some experts on the grid, (T, d_model filled up).

        Parameters
        ----------
        x : (T, d_model)
        ids : (T, K)
            Slots; -1 where another side computes it.
        weights : (T, K)
        held : list
            From :meth:`hold`.

        Raises
        ------
        CommandFailed
            As the accelerator says it.
        """
        values, routing = float32("x", x), float32("weights", weights)
        filled = np.pad(values, ((0, 0), (0, -values.shape[1] % 32)))
        quantised, nonfinite = quantise_x(filled, self._planes)
        tokens, d_out = filled.shape
        sums = Combiner(tokens, d_out, self._grid)
        used = np.zeros(len(filled), bool)
        for e in np.unique(ids[ids >= 0]).tolist():
            tokens, slots = np.nonzero(ids == e)
            used[tokens] = True
            image = held[e]
            assert image is not None
            sums.add(tokens, routing[tokens, slots], compute(rows_of(quantised, tokens), image))
        status, detail, address = DeviceResult(
            np.zeros(0, np.float32), np.nonzero(nonfinite & used)[0].tolist(),
            sums.nonfinite_weights, sums.overflows, sums.underflows).outcome
        if status != Status.OK:
            raise command_error(status, detail, address, first_token=0)
        return sums.sums[:, : self._d_model]

    def join(self, like: torch.Tensor, own: NDArray[np.int64] | None, rows: NDArray[np.int64],
             theirs: torch.Tensor | None) -> torch.Tensor:
        """Return y, (T, d_model), of the type and place of ``like``.

        Parameters
        ----------
        like : (T, d_model)
        own : (T, d_model), optional
            From :meth:`compute`.
        rows : integer, (R,)
            Tokens that were sent.
        theirs : float32, (R, d_model), optional
            The accelerator's.
        """
        total = np.zeros(tuple(like.shape), np.int64) if own is None else own.copy()
        if theirs is not None:
            y = theirs.numpy().astype(np.float64)
            total[rows] += np.ldexp(y, -self._grid).astype(np.int64)
        bits = BFLOAT16_BITS if like.dtype is torch.bfloat16 else ELEMENT_BITS
        return torch.from_numpy(grid_to_float32(total, self._grid, bits)).to(like)

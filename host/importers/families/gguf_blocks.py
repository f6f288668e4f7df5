"""The block formats of GGUF files.

=========  ==============================================================================
MXFP4      exact in ``mxfp4``
Q4_0       16 levels from -8 to 7 times a float16 of any sign: in ``int4_g32`` the blocks with a
           positive scale are exact; where it is negative, and a weight has the level -8, that would
           be +8, which INT4 has not, and the block is quantised again; exact in ``int4_g32_zp``
Q8_0       a float16 times -127 to 127: in ``mxint8`` exact where it is a power of two, in
           ``int8_g32`` where a row's scales, as integers of one unit, have at most 13 bits
Q4_1       a float16 times 0 to 15, plus another: exact in ``int4_g32_min``, in others quantised
           again
TQ2_0      -1 to 1 times a float16 for each 256 weights: exact in ``ternary_g256``
the rest   dequantised by the package gguf, and quantised again
=========  ==============================================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.importers.base import Contents, Family
from moeaccel.host.importers.coded import Coded, Matrix
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.families.fp4 import E2M1_DOUBLED, power_of_two

__all__ = ["FAMILIES"]

_CODED = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34, "MXFP4": 17, "TQ2_0": 66}
"""Bytes of a block of 32; of TQ2_0, of 256."""

_BLOCKS = ("Q", "IQ", "TQ", "MXFP", "NVFP")
"""What the names of the types begin with that are no numbers on their own."""


class GgufBlocks(Family):
    """Weights of a GGUF file that are no floats."""

    name = "gguf"
    mark = ".weight"

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(stem + self.mark).startswith(_BLOCKS)

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        return contents.need(stem + self.mark).shape

    def read(self, contents: Contents, stem: str, expert: int | None) -> Matrix:
        tensor = contents.need(stem + self.mark)
        n, k = tensor.shape[-2:]
        if tensor.dtype in _CODED:
            return _coded(tensor.dtype, tensor.bytes(expert).reshape(n, -1, _CODED[tensor.dtype]))
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
                weights = dequantize(tensor.bytes(expert).reshape(n, -1),
                                     GGMLQuantizationType[tensor.dtype])
        except NotImplementedError:
            raise ForeignCheckpoint(f"{tensor} must be of a type that the package gguf can "
                                    "dequantise; update it, or convert the checkpoint") from None
        return weights.astype(np.float32, copy=False).reshape(n, k)


def _coded(kind: str, blocks: NDArray[np.uint8]) -> Coded:
    """Take blocks apart, (n, blocks, bytes)."""
    n = len(blocks)

    def half(offset: int) -> NDArray[np.floating]:
        return np.ascontiguousarray(blocks[:, :, offset : offset + 2]).view("<f2")[:, :, 0]

    if kind == "Q8_0":
        codes = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8)
        return Coded(codes.reshape(n, -1), half(0), 32)
    if kind == "TQ2_0":
        # Of 32 bytes all lowest 2 bits first, and so on.
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        fours = blocks[:, :, :64].reshape(n, -1, 1, 32) >> shifts & 3
        return Coded(fours.reshape(n, -1).view(np.int8) - np.int8(1), half(64), 256)
    # Low halves of the 16 bytes first, then the high ones.
    pairs = blocks[:, :, -16:]
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(n, -1)
    if kind == "MXFP4":
        return Coded(E2M1_DOUBLED[codes], power_of_two(blocks[:, :, 0]) / 2, 32)
    if kind == "Q4_0":
        return Coded(codes.view(np.int8) - np.int8(8), half(0), 32)
    return Coded(codes.view(np.int8), half(0), 32, minimum=half(2))


FAMILIES = (GgufBlocks(),)

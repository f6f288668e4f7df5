"""FP4 E2M1 with scales for blocks: MXFP4, as gpt-oss and compressed-tensors have it, and NVFP4.

MXFP4 is exact in ``mxfp4``: E2M1 values, and scales that are powers of two (E8M0). NVFP4 has a
scale for each 16 weights, FP8 E4M3 times one float32 for the matrix: in ``nvfp4`` exact where that
number has at most 7 significant bits; otherwise codes stay and each scale is rounded to 11 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.importers.base import Contents, Family, check_shape
from moeaccel.host.importers.coded import Coded
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor

__all__ = ["E2M1_DOUBLED", "FAMILIES", "e4m3", "power_of_two"]

E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice the value of each code."""


def power_of_two(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return ``2**(code - 127)``, NaN for 255 (OCP Microscaling Formats v1.0, section 5.4.1)."""
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(np.int32) - 127))


def e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return FP8 E4M3 numbers (OCP 8-bit Floating Point Specification v1.0: no infinities)."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10),
                      np.ldexp(mantissa * 1.0, -9))
    values[(code & 127) == 127] = np.nan
    return np.where(code >> 7, -values, values).astype(np.float32)[codes]


def _e2m1(pairs: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Return twice the values of pairs of codes, low one first, along the last dimension."""
    both = np.stack([E2M1_DOUBLED[pairs & 15], E2M1_DOUBLED[pairs >> 4]], axis=-1)
    return both.reshape(*pairs.shape[:-1], 2 * pairs.shape[-1])


class GptOss(Family):
    """gpt-oss: ``_blocks`` of 16 bytes for 32 weights, ``_scales``, experts stacked."""

    name = "mxfp4"
    mark = "_blocks"

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(f"{stem}_blocks") == "U8"

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        blocks = contents.need(f"{stem}_blocks")
        if len(blocks.shape) != 4 or blocks.shape[3] != 16:
            raise ForeignCheckpoint(f"{blocks} must have the shape [experts, rows, K / 32, 16]")
        return *blocks.shape[:2], 32 * blocks.shape[2]

    def read(self, contents: Contents, stem: str, expert: int | None) -> Coded:
        blocks, scales = contents.need(f"{stem}_blocks"), contents.need(f"{stem}_scales")
        check_shape(scales, blocks.shape[:3], f"for {blocks}")
        rows = blocks.array(expert).reshape(blocks.shape[1], -1)
        return Coded(_e2m1(rows), power_of_two(_bytes(scales, expert)) / 2, 32)


class PackedFp4(Family):
    """compressed-tensors and ModelOpt: two weights a byte, rows first.

    The scales' type says which of both it is, the names who wrote it: ``weight_global_scale``
    divides, ``weight_scale_2`` multiplies.
    """

    name = "fp4"
    rank = 1

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(stem + self.mark) == "U8" and contents.dtype(
            f"{stem}.weight_scale") in ("U8", "F8_E8M0", "F8_E4M3")

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        pairs = contents.need(stem + self.mark)
        if len(pairs.shape) != 2:
            raise ForeignCheckpoint(f"{pairs} must have two dimensions")
        return pairs.shape[0], 2 * pairs.shape[1]

    def read(self, contents: Contents, stem: str, expert: int | None) -> Coded:
        pairs, stored = contents.need(stem + self.mark), contents.need(f"{stem}.weight_scale")
        n, k = self.shape(contents, stem)
        group = 16 if stored.dtype == "F8_E4M3" else 32
        check_shape(stored, (n, k // group), f"for {pairs}")
        if group == 32:
            scales = power_of_two(_bytes(stored, None))
        else:
            # One product of a 4-bit and a 24-bit significand: exact in float64.
            scales = e4m3(_bytes(stored, None)).astype(np.float64)
            if f"{stem}.weight_scale_2" in contents.tensors:
                scales *= _number(contents.need(f"{stem}.weight_scale_2"))
            else:
                scales /= _number(contents.need(f"{stem}.weight_global_scale"))
        return Coded(_e2m1(pairs.array()), scales / 2, group)


def _bytes(tensor: StoredTensor, index: int | None) -> NDArray[np.uint8]:
    if tensor.dtype not in ("U8", "F8_E8M0", "F8_E4M3"):
        raise ForeignCheckpoint(f"{tensor} must be of one of the types U8, F8_E8M0, F8_E4M3")
    return tensor.array(index)


def _number(tensor: StoredTensor) -> float:
    values = tensor.float32().reshape(-1)
    if len(values) != 1 or not (np.isfinite(values[0]) and values[0] > 0):
        raise ForeignCheckpoint(f"{tensor} must be one positive number")
    return float(values[0])


FAMILIES = (GptOss(), PackedFp4(".weight_packed"), PackedFp4(".weight"))

"""INT4 with scales and zero points for groups: GPTQ, AWQ and compressed-tensors.

Exact in formats whose groups lie within the checkpoint's: in ``int4_*`` where the zero point is 8,
in ``int4_*_zp`` whatever it is. The scales are float16 or bfloat16, whose significands are 11 and 8
bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeaccel.host.importers.base import (
    Contents,
    Family,
    check_shape,
    grouped_columns,
    nibbles,
)
from moeaccel.host.importers.coded import Coded
from moeaccel.host.importers.errors import ForeignCheckpoint
from moeaccel.host.importers.files import StoredTensor

__all__ = ["FAMILIES"]

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each 4-bit number of a word belongs to."""


def _check_bits(contents: Contents, tensor: StoredTensor) -> None:
    bits = contents.quantisation.get("bits", contents.quantisation.get("w_bit", 4))
    if bits != 4:
        raise ForeignCheckpoint(f"{tensor} must have weights of 4 bits, not {bits!r}; convert the "
                                "checkpoint to one of 4 bits, or to bfloat16")


def _group(k: int, scales: StoredTensor, groups: int) -> int:
    """Return how many of K columns share a scale."""
    if not groups or k % groups:
        raise ForeignCheckpoint(f"{scales} must have a scale for each of groups of equal size of "
                                f"{k} columns, not for {groups}")
    return k // groups


class _Transposed(Family):
    """GPTQ and AWQ: words in ``qweight``, K first."""

    mark = ".qweight"

    def _sizes(self, contents: Contents, stem: str) -> tuple[StoredTensor, StoredTensor]:
        words, scales = contents.need(f"{stem}.qweight"), contents.need(f"{stem}.scales")
        for tensor in (words, scales):
            if len(tensor.shape) != 2:
                raise ForeignCheckpoint(f"{tensor} must have two dimensions")
        if words.dtype != "I32" or scales.shape[1] % 8:
            raise ForeignCheckpoint(f"{words} must be of the type I32, of whole words of zero "
                                    f"points for {scales}")
        return words, scales

    def _parts(self, contents: Contents, stem: str
               ) -> tuple[StoredTensor, StoredTensor, StoredTensor, int]:
        """Return words, zero points, scales, and the columns of a group."""
        words, scales = self._sizes(contents, stem)
        _check_bits(contents, words)
        n, k = self.shape(contents, stem)
        groups = scales.shape[0]
        group = _group(k, scales, groups)
        zeros = contents.need(f"{stem}.qzeros")
        check_shape(zeros, (groups, n // 8), f"for {words}")
        return words, zeros, scales, group


class Gptq(_Transposed):
    """AutoGPTQ and GPTQModel: words hold eight weights of a column."""

    name = "gptq"

    def claims(self, contents: Contents, stem: str) -> bool:
        words, scales = self._sizes(contents, stem)
        return words.shape[1] == scales.shape[1]

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        words, _ = self._sizes(contents, stem)
        return words.shape[1], 8 * words.shape[0]

    def read(self, contents: Contents, stem: str, expert: int | None) -> Coded:
        words, zeros, stored, group = self._parts(contents, stem)
        (n, k), groups = self.shape(contents, stem), stored.shape[0]
        # The first version of the format stores zero points less 1.
        less = 0 if contents.quantisation.get("checkpoint_format") == "gptq_v2" else 1
        zero = nibbles(zeros.array()).reshape(groups, n).T + np.int8(less)
        integers = nibbles(words.array()).transpose(1, 0, 2).reshape(n, k)
        order = None
        if f"{stem}.g_idx" in contents.tensors:
            g_idx = contents.need(f"{stem}.g_idx")
            check_shape(g_idx, (k,), f"for {words}")
            order = grouped_columns(g_idx.array(), group, groups)
        if order is not None:
            integers = integers[:, order]
        return Coded(integers - np.repeat(zero, group, axis=1), stored.float32().T, group,
                     order=order)


class Awq(_Transposed):
    """AutoAWQ: words hold one weight of each of eight columns."""

    name = "awq"

    def claims(self, contents: Contents, stem: str) -> bool:
        words, scales = self._sizes(contents, stem)
        return 8 * words.shape[1] == scales.shape[1]

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        words, _ = self._sizes(contents, stem)
        return 8 * words.shape[1], words.shape[0]

    def read(self, contents: Contents, stem: str, expert: int | None) -> Coded:
        words, zeros, stored, group = self._parts(contents, stem)
        n, _ = self.shape(contents, stem)
        columns = np.argsort(_AWQ_COLUMNS)

        def rows(tensor: StoredTensor) -> NDArray[np.int8]:
            return nibbles(tensor.array())[:, :, columns].reshape(tensor.shape[0], n).T

        return Coded(np.ascontiguousarray(rows(words)) - np.repeat(rows(zeros), group, axis=1),
                     stored.float32().T, group)


class PackQuantized(Family):
    """compressed-tensors: ``weight_packed`` in words of eight weights of a row, 8 added to each."""

    name = "compressed-tensors int4"
    mark = ".weight_packed"

    def claims(self, contents: Contents, stem: str) -> bool:
        return contents.dtype(f"{stem}.weight_packed") == "I32"

    def shape(self, contents: Contents, stem: str) -> tuple[int, ...]:
        words = contents.need(f"{stem}.weight_packed")
        if len(words.shape) != 2:
            raise ForeignCheckpoint(f"{words} must have two dimensions")
        sizes = contents.tensors.get(f"{stem}.weight_shape")
        k = 8 * words.shape[1]
        if sizes is None:
            return words.shape[0], k
        check_shape(sizes, (2,), f"for {words}")
        n, said = (int(size) for size in sizes.array())
        if n != words.shape[0] or not k - 8 < said <= k:
            raise ForeignCheckpoint(f"{sizes} must say {words.shape[0]} and {k}, or up to 7 less, "
                                    f"for {words}, not {n} and {said}; are its weights of 4 bits?")
        return n, said

    def read(self, contents: Contents, stem: str, expert: int | None) -> Coded:
        words, stored = (contents.need(f"{stem}.{name}")
                         for name in ("weight_packed", "weight_scale"))
        n, k = self.shape(contents, stem)
        if len(stored.shape) != 2 or stored.shape[0] != n:
            raise ForeignCheckpoint(f"{stored} must have a row for each of {n} rows of {words}")
        groups = stored.shape[1]
        group = _group(k, stored, groups)
        integers = nibbles(words.array()).reshape(n, -1)[:, :k]
        zero = np.full((n, groups), 8, np.int8)
        if f"{stem}.weight_zero_point" in contents.tensors:
            zeros = contents.need(f"{stem}.weight_zero_point")
            check_shape(zeros, (-(-n // 8), groups), f"for {words}")
            zero = nibbles(zeros.array()).transpose(0, 2, 1).reshape(-1, groups)[:n]
        order = None
        if f"{stem}.weight_g_idx" in contents.tensors:
            g_idx = contents.need(f"{stem}.weight_g_idx")
            check_shape(g_idx, (k,), f"for {words}")
            order = grouped_columns(g_idx.array(), group, groups)
        if order is not None:
            integers = integers[:, order]
        return Coded(integers - np.repeat(zero, group, axis=1), stored.float32(), group,
                     order=order)


FAMILIES = (Gptq(), Awq(), PackQuantized())

"""A call's arrays in the host's staging, and what is to be sent of them: laid out once for each
shape of call, side and layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeaccel.formats import whole_blocks
from moeaccel.host.report import sampling_step
from moeaccel.host.sides import Place, Side, aligned
from moeaccel.host.tensors import Target, Tensor, put_floats, put_indices
from moeaccel.host.transports.base import Bytes
from moeaccel.interface.commands import SUBMISSION, ElementType, Opcode, encode

__all__ = ["CallShape", "Layouts", "Staged", "offsets"]

_MOST_SHAPES = 64


def offsets(sizes: Sequence[int]) -> list[int]:
    """Return the offset of each array when they follow one another, and behind them the size."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + aligned(size))
    return found


class Staged:
    """Where a call's arrays are put, and its submission.

    Parameters
    ----------
    place : :class:`Place`
    x : float32 or uint16 array, (T, d_in)
        Of the staging; whatever fills its rows up to whole blocks is zeroed by :meth:`put`.
    padding : array, (T, any)
    ids, weights : array, (T, K), optional
    num_experts : :class:`int`
    """

    __slots__ = ("_ids", "_num_experts", "_padding", "_weights", "_x", "place", "x")

    def __init__(self, place: Place, x: np.ndarray, padding: np.ndarray, ids: np.ndarray | None,
                 weights: np.ndarray | None, num_experts: int) -> None:
        self.place, self.x = place, x
        self._x = Target(x)
        self._padding = padding if padding.size else None
        self._ids = None if ids is None else Target(ids)
        self._weights = None if weights is None else Target(weights)
        self._num_experts = num_experts

    def put(self, x: Tensor, ids: Tensor | None, weights: Tensor | None) -> None:
        """Convert a call's tensors into the staging.

        Raises
        ------
        InvalidTensor
            For elements of another kind.
        """
        put_floats("x", x, self._x)
        if self._padding is not None:
            self._padding.fill(0)
        if self._ids is not None and self._weights is not None:
            assert ids is not None and weights is not None
            put_indices("ids", ids, self._num_experts, self._ids)
            put_floats("weights", weights, self._weights)


class CallShape:
    """What calls of one shape have in common.

    Parameters
    ----------
    input_bytes, output_bytes, sum_bytes : :class:`int`
        Of x, ids and weights; of y; of partial sums.
    step : :class:`int`
        A call keeps every so many-th token of x.

    Attributes
    ----------
    staged : dict of :class:`Side` and :class:`Staged`
    """

    __slots__ = ("input_bytes", "output_bytes", "staged", "step", "sum_bytes")

    def __init__(self, input_bytes: int, output_bytes: int, sum_bytes: int, step: int) -> None:
        self.input_bytes, self.output_bytes = input_bytes, output_bytes
        self.sum_bytes, self.step = sum_bytes, step
        self.staged: dict[Side, Staged] = {}


class Layouts:
    """The layouts of a layer's calls.

    Parameters
    ----------
    opcode : :class:`Opcode`
    layer_address, d_in, d_out, num_experts : :class:`int`
        Dimensions are the caller's.
    """

    def __init__(self, opcode: Opcode, layer_address: int, *, d_in: int, d_out: int,
                 num_experts: int) -> None:
        self._opcode = opcode
        self._layer_address = layer_address
        self._d_in, self._num_experts = d_in, num_experts
        self._columns_in, self._columns_out = whole_blocks(d_in), whole_blocks(d_out)
        self._shapes: dict[tuple[int, int, int], CallShape] = {}

    def shape(self, tokens: int, top_k: int, io: ElementType) -> CallShape:
        """Return what calls of a shape have in common; ``io`` is the type of x and y."""
        key = tokens, top_k, int(io)
        found = self._shapes.get(key)
        if found is None:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes = {}
            pairs = 2 * aligned(4 * tokens * top_k) if self._opcode is Opcode.EXPERTS else 0
            size = io.bytes * tokens
            found = CallShape(size * self._columns_in + pairs, size * self._columns_out,
                              8 * tokens * self._columns_out,
                              sampling_step(tokens, io.bytes * self._d_in))
            self._shapes[key] = found
        return found

    def staged(self, shape: CallShape, side: Side, tokens: int, top_k: int, io: ElementType,
               staging: Bytes, workspace: int) -> Staged:
        """Return where a call goes on a side."""
        found = shape.staged.get(side)
        if found is None:
            found = self._new(shape, side, tokens, top_k, io, staging, workspace)
            shape.staged[side] = found
        return found

    def _new(self, shape: CallShape, side: Side, tokens: int, top_k: int, io: ElementType,
             staging: Bytes, workspace: int) -> Staged:
        low, address = side.inputs(shape.input_bytes)
        reply = side.reply(shape.output_bytes)
        routed = self._opcode is Opcode.EXPERTS
        pairs, x_bytes = 4 * tokens * top_k, io.bytes * tokens * self._columns_in
        at = offsets([x_bytes, *([pairs, pairs] if routed else [])])
        fields = {"opcode": int(self._opcode), "tokens": tokens, "top_k": top_k,
                  "x_type": io, "y_type": io,
                  "layer_address": self._layer_address, "x_address": address,
                  "y_address": reply.address, "workspace_address": workspace}
        ids = weights = None
        if routed:
            fields |= {"ids_address": address + at[1], "weights_address": address + at[2]}
            ids, weights = (
                staging[low + start : low + start + pairs].view(dtype).reshape(tokens, top_k)
                for start, dtype in ((at[1], np.int32), (at[2], np.float32)))
        x = staging[low : low + x_bytes].view(
            np.uint16 if io is ElementType.BFLOAT16 else np.float32).reshape(tokens, -1)
        place = Place(side, low, low + shape.input_bytes,
                      int.from_bytes(encode(SUBMISSION, fields), "little"), reply)
        return Staged(place, x[:, : self._d_in], x[:, self._d_in :], ids, weights,
                      self._num_experts)

"""A whole MoE layer on the device: it routes, and computes the experts it has chosen.

A call is three commands, of which each finds in memory what the one before it has left: the
router's product (EXPERTS, of two planes of weights), ROUTE, EXPERTS.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import TOP_K_MAX
from moeaccel.formats import whole_blocks
from moeaccel.host import routing, weights as loading
from moeaccel.host.errors import (
    DeviceClosed,
    InvalidOption,
    InvalidTensor,
    LimitExceeded,
    OutOfDeviceMemory,
)
from moeaccel.host.layers import Experts, Linear
from moeaccel.host.memory import COMMAND_ALIGNMENT, Allocation
from moeaccel.host.rings import Command
from moeaccel.host.routing import Router
from moeaccel.host.tensors import (
    Like,
    Tensor,
    element_type,
    elements,
    float32,
    is_torch,
    shape_of,
)
from moeaccel.host.weights import Shared, Stack
from moeaccel.interface.commands import ENTRY_BYTES, ROUTER, Opcode, encode
from moeaccel.router.choices import WeightOn
from moeaccel.router.descriptor import descriptor, table_words

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Moe", "load_moe"]

LOGIT_GRID = -30
"""Grid of the logits: what ROUTE takes reaches to 2**11, and has 20 bits behind the point."""

_PLANES = 2
"""Matrices that a router's weights are."""


def load_moe(device: Device, router: Router, gate_up: Stack, down: Stack, *,
             shared: Shared | None = None, **options: Any) -> Moe:
    """Put a layer into a device's memory; :meth:`moeaccel.host.Device.load_moe`."""
    settings = router.settings
    routing.check_router(device.config, settings)
    if router.weight is None:
        raise InvalidOption("router must have a weight, (E, H), to route x; give it one, or route "
                            "by logits with device.route")
    if settings.weight_on_kind is WeightOn.INPUT and settings.top_k > 1:
        raise LimitExceeded("top_k must be 1 with weights on the input, which the host multiplies "
                            f"x by, not {settings.top_k}")
    if settings.prior:
        raise LimitExceeded(
            f"prior must be 0, not {settings.prior:g}: a layer has no residents; name them with "
            "device.route, and compute with load_experts")
    if len(down) != settings.experts:
        raise InvalidTensor(f"down must have E = {settings.experts} experts, the router's, not "
                            f"{len(down)}")
    loaded = device.load_experts(gate_up, down, shared=shared, **options)
    try:
        behind = len(loaded.shared_shapes)
        if loaded._row_blocks > 1 or loaded._identity:
            raise InvalidOption("row_blocks and identity experts must be left out where the device "
                                "routes: its ids are entries of the table; route on the host")
        if settings.top_k + behind > TOP_K_MAX:
            raise LimitExceeded(f"top_k and shared experts must be at most {TOP_K_MAX} together, "
                                f"not {settings.top_k} and {behind}")
        plane = loading.load_router_weight(device, router.weight, grid_exponent=LOGIT_GRID)
        try:
            if plane.shape.d_in != loaded.shapes[0].d_model:
                d_model = loaded.shapes[0].d_model
                raise InvalidTensor(
                    f"weight must have the shape ({settings.experts}, {d_model}) of a router for "
                    f"these experts, not {tuple(router.weight.shape)}")
            return Moe(device, router, plane, loaded, behind)
        except BaseException:
            plane.close()
            raise
    except BaseException:
        loaded.close()
        raise


class Moe:
    """A layer that routes by itself; from :meth:`Device.load_moe`.

    Attributes
    ----------
    experts : :class:`moeaccel.host.Experts`
        The experts routed to, and behind them the shared ones.
    router : :class:`moeaccel.host.Router`
    """

    def __init__(self, device: Device, router: Router, plane: Linear, experts: Experts,
                 shared: int) -> None:
        self.router = router
        self.experts = experts
        self._device = device
        self._plane = plane
        self._shared = shared
        words = table_words(router.settings, router.bias, router.selection_bias)
        tables = bool(words.any())
        self._constants: Allocation | None = device.memory.allocate(
            ENTRY_BYTES + (words.nbytes if tables else 0))
        fields = descriptor(
            router.settings, biased=router.selection_bias is not None, tables=tables,
            table_address=self._constants.address + ENTRY_BYTES, shared=shared)
        data = encode(ROUTER, fields) + (words.tobytes() if tables else b"")
        device.transport.memory_write(self._constants.address, data)

    @property
    def device(self) -> Device:
        """Where it lives."""
        return self._device

    def __call__(self, x: Tensor) -> Any:
        """Return y, (T, H), as x is: its experts and the shared ones, weighted and summed exactly.

        Raises
        ------
        InvalidTensor
            Before anything is sent.
        NonFiniteInput
            If x or a logit is NaN or infinite; it names the token.
        LogitOverflow, GridOverflow
            If logits are 2048 or more in magnitude, or outputs beyond the layer's grid.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        if self.router.settings.weight_on_kind is WeightOn.INPUT:
            return self._weighted(x)
        return self._call(x, compute=True)[2]

    def route(self, x: Tensor) -> tuple[Any, Any]:
        """Return ids, (T, k) int64, and weights, (T, k) float32, that x is routed by.

        Shared experts are not among them. Errors are those of a call.
        """
        ids, weights, _ = self._call(x, compute=False)
        places: Any = ids.astype(np.int64)
        if is_torch(x):
            import torch

            return torch.from_numpy(places).to(x.device), torch.from_numpy(weights).to(x.device)
        return places, weights

    def _weighted(self, x: Tensor) -> Any:
        """Return y where weights multiply x (Llama 4): the host does it, between two calls.

        Shared experts take x as it is, and are added in float32.
        """
        ids, weights, _ = self._call(x, compute=False)
        rows = float32("x", x)
        tokens = len(rows)
        if not self._shared:
            one = np.ones((tokens, 1), np.float32)
            return Like.of(x)(self.experts(rows * weights, ids, one))
        # x times the weight goes to the one chosen, x itself to the shared ones.
        pairs = np.full((2 * tokens, self._shared), -1, np.int32)
        pairs[:tokens, :1] = ids
        pairs[tokens:] = self.router.settings.experts + np.arange(self._shared)
        y = self.experts._call(self.experts._submit(
            np.concatenate([rows * weights, rows]), pairs, np.ones(pairs.shape, np.float32),
            2 * tokens, self._shared))
        return Like.of(x)(y[:tokens] + y[tokens:])

    def close(self) -> None:
        """Free the device memory; a second call does nothing."""
        self.experts.close()
        self._plane.close()
        if self._constants is not None and not self._device.closed:
            self._constants.free()
        self._constants = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

    # -- commands ----------------------------------------------------------------------------------
    def _call(self, x: Tensor, *, compute: bool
              ) -> tuple[NDArray[np.int32], NDArray[np.float32], Any]:
        if self._constants is None:
            raise DeviceClosed("layer must not be used after it was closed; load it again")
        d_model = self._plane.shape.d_in
        tokens, found = shape_of("x", x, "T", str(d_model))
        if found != d_model:
            raise InvalidTensor(
                f"x must have the shape (T, {d_model}) of this layer, not {tuple(x.shape)}")
        values = elements("x", x)
        rows = np.zeros((tokens, whole_blocks(d_model)), values.dtype)
        rows[:, :d_model] = values
        top_k = self.router.settings.top_k
        ids, weights = np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k), np.float32)
        y: Any = np.zeros((tokens, d_model), values.dtype)
        config = self._device.config
        most = min(config.max_tokens, config.max_assignments // max(_PLANES, top_k + self._shared))
        routing.check_tokens(self.router.settings, tokens, most)
        first, cycles = 0, 0
        while first < tokens:
            part = slice(first, min(first + most, tokens))
            try:
                cycles += self._send(rows[part], ids[part], weights[part],
                                     y[part] if compute else None, first)
            except OutOfDeviceMemory:
                most = (part.stop - first) // 2
                if not most or self.router.settings.capacity is not None:
                    raise
            else:
                first = part.stop
        self._device._last_cycles = cycles
        return ids, weights, Like.of(x)(y)

    def _send(self, x: NDArray[Any], ids: NDArray[np.int32], weights: NDArray[np.float32],
              y: NDArray[Any] | None, first: int) -> int:
        """Send the commands of one part, take what they wrote, and return their cycles."""
        device, constants = self._device, self._constants
        assert constants is not None
        tokens, width = len(x), whole_blocks(x.shape[1])
        slots = self.router.settings.top_k + self._shared
        planes = np.tile(np.arange(_PLANES, dtype=np.int32), (tokens, 1))
        ones = np.ones((tokens, _PLANES), np.float32)
        inputs = [x, planes, ones]
        logits = 4 * tokens * whole_blocks(self.router.settings.experts)
        sizes = [*(array.nbytes for array in inputs), logits, 2 * logits, 4 * tokens * slots,
                 4 * tokens * slots, tokens * width * x.itemsize, 8 * tokens * width]
        *offsets, end = _offsets(sizes)
        device._take()
        buffers = device.memory.allocate(end, top=True)
        base = buffers.address
        kind = int(element_type(x))
        chosen = {"ids_address": base + offsets[5], "weights_address": base + offsets[6]}
        commands: list[tuple[dict[str, int], tuple[object, ...]]] = [
            ({"opcode": int(Opcode.EXPERTS), "top_k": _PLANES, "x_type": kind,
              "layer_address": self._plane._descriptor.address, "x_address": base,
              "ids_address": base + offsets[1], "weights_address": base + offsets[2],
              "y_address": base + offsets[3], "workspace_address": base + offsets[4]},
             (self._plane._images, self._plane._descriptor)),
            ({"opcode": int(Opcode.ROUTE), "top_k": slots, "layer_address": constants.address,
              "x_address": base + offsets[3], **chosen}, (constants,)),
        ]
        if y is not None:
            commands.append((
                {"opcode": int(Opcode.EXPERTS), "top_k": slots, "x_type": kind, "y_type": kind,
                 "layer_address": self.experts._descriptor.address, "x_address": base,
                 "y_address": base + offsets[7], "workspace_address": base + offsets[8], **chosen},
                (self.experts._images, self.experts._descriptor)))
        sent: list[Command] = []
        try:
            data = np.zeros(offsets[3], np.uint8)
            for array, offset in zip(inputs, offsets, strict=False):
                data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            device.transport.memory_write(base, data)
            for fields, keep in commands:
                name = Opcode(fields["opcode"]).name
                command = Command(name, (*keep, buffers), first_token=first)
                device.submit({"tokens": tokens, **fields}, command)
                sent.append(command)
            cycles = sum(device.wait(command).cycles for command in sent)
            for command in sent:
                if error := command.error():
                    raise routing.named(error, command)
            self._take_results(base, offsets, ids, weights, y)
            return cycles
        finally:
            # Whatever is still in flight keeps them alive.
            if not any(buffers in command.keep for command in device.in_flight):
                buffers.free()

    def _take_results(self, base: int, offsets: list[int], ids: NDArray[np.int32],
                      weights: NDArray[np.float32], y: NDArray[Any] | None) -> None:
        """Read what the commands wrote, at once."""
        stop = offsets[7] if y is None else offsets[8]
        raw = self._device.transport.memory_read(base + offsets[5], stop - offsets[5])
        tokens, top_k = ids.shape
        slots = top_k + self._shared

        def part(index: int, count: int) -> NDArray[np.uint8]:
            start = offsets[index] - offsets[5]
            return raw[start : start + count]

        ids[:] = part(5, 4 * tokens * slots).view("<i4").reshape(tokens, slots)[:, :top_k]
        weights[:] = part(6, 4 * tokens * slots).view("<f4").reshape(tokens, slots)[:, :top_k]
        if y is not None:
            width = whole_blocks(y.shape[1])
            rows = part(7, tokens * width * y.itemsize).view(y.dtype).reshape(tokens, width)
            y[:] = rows[:, : y.shape[1]]


def _offsets(sizes: list[int]) -> Iterator[int]:
    """Yield the aligned offset of each buffer when they follow one another, and the end."""
    offset = 0
    for size in sizes:
        yield offset
        offset += -(-size // COMMAND_ALIGNMENT) * COMMAND_ALIGNMENT
    yield offset

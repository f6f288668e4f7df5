"""A router in a device's memory: it says where x goes, in one command, MOE_ROUTE.

Of the three descriptors that the command names, the last is only checked: with a layer's experts it
is theirs (:mod:`moeaccel.host.moe`), and that of the router's own matrix where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig
from moeaccel.formats import whole_blocks
from moeaccel.host import routing, weights as loading
from moeaccel.host.calls import Pending, Sent
from moeaccel.host.errors import DeviceClosed, InvalidOption, InvalidTensor, LimitExceeded
from moeaccel.host.layer import Layer
from moeaccel.host.layers import Linear
from moeaccel.host.memory import Allocation
from moeaccel.host.options import whole
from moeaccel.host.process import Bound
from moeaccel.host.routing import Router
from moeaccel.host.staging import offsets
from moeaccel.host.tensors import Like, Tensor, element_type, elements, is_torch, shape_of
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    MOE_ALIGNMENT,
    MOE_BLOCK,
    ROUTER,
    Opcode,
    encode,
)
from moeaccel.router.descriptor import descriptor, table_bytes, table_words
from moeaccel.router.settings import RouterSettings

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["LOGIT_GRID", "RouterLayer", "Task", "check_alone", "check_settings", "like_x",
           "load_router", "weight_of"]

LOGIT_GRID = -30
"""Grid of the logits: what ROUTE takes reaches to 2**11, and has 20 bits behind the point."""


def weight_of(router: Router) -> Tensor:
    """Return the weight of a router that is to be in a device's memory.

    Raises
    ------
    InvalidOption
        If it is no router, or has no weight.
    """
    routing.settings_of(router)
    if router.weight is None:
        raise InvalidOption("router must have a weight, (E, H), to route x; give it one, or route "
                            "by logits with device.route")
    return router.weight


def check_settings(config: AcceleratorConfig, settings: RouterSettings) -> None:
    """Refuse a router that cannot be in the memory of a device of this configuration.

    Raises
    ------
    LimitExceeded
        If the device has not its settings, or it prefers residents, which are of a call.
    """
    routing.check_router(config, settings)
    if settings.prior:
        raise LimitExceeded(
            f"prior must be 0, not {settings.prior:g}: a layer has no residents; name them with "
            "device.route, and compute with load_experts")


def check_alone(settings: RouterSettings) -> None:
    """Refuse settings that are about the experts of a layer, for a router without any.

    Raises
    ------
    InvalidOption
        If there are gates.
    """
    if settings.shared:
        raise InvalidOption(f"gates must be none, not those of {settings.shared} shared experts, "
                            "for a router without experts; use device.load_moe")


def load_router(device: Device, router: Router) -> RouterLayer:
    """Put a router into a device's memory; :meth:`moeaccel.host.Device.load_router`."""
    weight = weight_of(router)
    check_alone(router.settings)
    check_settings(device.config, router.settings)
    plane = loading.load_router_weight(device, weight, grid_exponent=LOGIT_GRID)
    try:
        return RouterLayer(device, [router], [plane])
    except BaseException:
        plane.close()
        raise


@dataclass(frozen=True)
class Task:
    """A router of a layer: what it is, its matrix, and what a command names it by."""

    router: Router
    plane: Linear
    block: Allocation


class RouterLayer(Bound, Closing):
    """A router that says where x goes; from :meth:`Device.load_router`.

    Attributes
    ----------
    routers : tuple of :class:`moeaccel.host.Router`
        By task: a command names the one that it is routed by.
    """

    def __init__(self, device: Device, routers: Sequence[Router], planes: Sequence[Linear],
                 experts: Layer | None = None, shared: int = 0) -> None:
        self._device = device
        self._behind, self._shared = experts, shared
        self._tasks: list[Task] = []
        try:
            for router, plane in zip(routers, planes, strict=True):
                block = self._describe(router, plane)
                self._tasks.append(Task(router, plane, block))
        except BaseException:
            self._free()
            raise
        self._closed = False

    def _describe(self, router: Router, plane: Linear) -> Allocation:
        """Write what a command names a router by, and its table behind it."""
        device = self._device
        words = table_words(router.settings, router.bias, router.selection_bias)
        tables = bool(words.any())
        table = table_bytes(words if tables else None, None).tobytes()
        size = ENTRY_BYTES * len(MOE_BLOCK)
        block = device.memory.allocate(size + len(table), alignment=MOE_ALIGNMENT)
        try:
            fields = descriptor(
                router.settings, biased=router.selection_bias is not None, tables=tables,
                table_address=block.address + size, shared=self._shared)
            with device._lock:
                layers = [
                    device.transport.memory_read(layer._descriptor.address, ENTRY_BYTES).tobytes()
                    for layer in (plane, self._behind or plane)]
                device.transport.memory_write(
                    block.address, layers[0] + encode(ROUTER, fields) + layers[1] + table)
        except BaseException:
            block.free()
            raise
        return block

    def _free(self) -> None:
        for task in self._tasks:
            task.block.free()

    @property
    def device(self) -> Device:
        """Where it lives."""
        return self._device

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def routers(self) -> tuple[Router, ...]:
        """By task."""
        return tuple(task.router for task in self._tasks)

    @property
    def router(self) -> Router:
        """That of task 0."""
        return self._tasks[0].router

    def route(self, x: Tensor, *, task: int = 0) -> tuple[Any, Any]:
        """Return ids, (T, k) int64, and weights, (T, k) float32, that x is routed by.

        Shared experts are not among them.

        Parameters
        ----------
        x : float tensor, (T, H)
        task : :class:`int`
            Whose router chooses, where there are several.

        Raises
        ------
        InvalidTensor, InvalidOption
            Before anything is sent.
        NonFiniteInput
            If x or a logit is NaN or infinite; it names the token.
        LogitOverflow
            If logits are 2048 or more in magnitude.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        ids, weights, _ = self._submit(x, self._task(task), compute=False).only_result()
        return like_x(x, ids, weights)

    def _task(self, task: int) -> Task:
        return self._tasks[whole("task", task, least=0, most=len(self._tasks) - 1,
                                 unit=", of the routers of this layer")]

    def close(self) -> None:
        """Free the device memory; a second call does nothing."""
        with self._device._lock:
            if self._behind is not None:
                self._behind.close()
            for task in self._tasks:
                task.plane.close()
            if not self._closed and not self._device.closed:
                self._free()
            self._closed = True

    # -- commands ----------------------------------------------------------------------------------
    def _submit(self, x: Tensor, task: Task, *, compute: bool) -> Pending:
        """Send a call whose result is ids and weights without shared experts, and y."""
        if self._closed:
            raise DeviceClosed("layer must not be used after it was closed; load it again")
        d_model = task.plane.shape.d_in
        tokens, found = shape_of("x", x, "T", str(d_model))
        if found != d_model:
            raise InvalidTensor(
                f"x must have the shape (T, {d_model}) of this layer, not {tuple(x.shape)}")
        values = elements("x", x)
        rows = np.zeros((tokens, whole_blocks(d_model)), values.dtype)
        rows[:, :d_model] = values
        settings = task.router.settings
        top_k = settings.top_k
        ids, weights = np.zeros((tokens, top_k), np.int32), np.zeros((tokens, top_k), np.float32)
        y: Any = np.zeros((tokens, d_model), values.dtype)
        config = self._device.config
        most = min(config.max_tokens, config.max_assignments // (top_k + self._shared))
        routing.check_tokens(settings, tokens, most)
        like = Like.of(x)
        return Pending(self._device, self, lambda: (ids, weights, like(y))).send(
            tokens, most, lambda part: self._send(
                task, rows[part], ids[part], weights[part], y[part] if compute else None,
                part.start), together=settings.capacity is not None)

    def _send(self, task: Task, x: NDArray[Any], ids: NDArray[np.int32],
              weights: NDArray[np.float32], y: NDArray[Any] | None, first: int) -> Sent:
        """Send the command of some tokens."""
        device, settings = self._device, task.router.settings
        behind = () if self._behind is None else self._behind._kept()
        kept = task.block, *task.plane._kept(), *behind
        tokens, width = x.shape
        slots = settings.top_k + self._shared
        widest = max(width, whole_blocks(settings.outputs))
        sizes = [x.nbytes, 4 * tokens * slots, 4 * tokens * slots, x.nbytes, 8 * tokens * widest]
        *at, end = offsets(sizes)
        buffers = device.memory.allocate(end, top=True)
        opcode = Opcode.MOE_ROUTE if y is None else Opcode.MOE
        addresses = dict(zip(("x_address", "ids_address", "weights_address", "y_address",
                              "workspace_address"),
                             (buffers.address + offset for offset in at), strict=True))
        kind = int(element_type(x))
        return Sent(
            device, opcode.name, {
                "opcode": int(opcode), "tokens": tokens, "top_k": slots, "x_type": kind,
                "y_type": kind, "layer_address": task.block.address, **addresses},
            buffers=buffers,
            inputs={buffers.address: np.ascontiguousarray(x).view(np.uint8).reshape(-1)},
            take=lambda: self._take_results(buffers.address, at, ids, weights, y),
            keep=kept, first_token=first)

    def _take_results(self, base: int, at: Sequence[int], ids: NDArray[np.int32],
                      weights: NDArray[np.float32], y: NDArray[Any] | None) -> None:
        """Read what the command wrote, at once."""
        begin, stop = at[1], at[3] if y is None else at[4]
        raw = self._device.transport.memory_read(base + begin, stop - begin)
        tokens, top_k = ids.shape
        slots = top_k + self._shared
        for index, values in ((1, ids), (2, weights)):
            part = raw[at[index] - begin :][: 4 * tokens * slots].view(values.dtype)
            values[:] = part.reshape(tokens, slots)[:, :top_k]
        if y is not None:
            part = raw[at[3] - begin : at[4] - begin].view(y.dtype)
            width = whole_blocks(y.shape[1])
            y[:] = part[: tokens * width].reshape(tokens, width)[:, : y.shape[1]]


def like_x(x: Tensor, ids: NDArray[np.int32], weights: NDArray[np.float32]) -> tuple[Any, Any]:
    """Return ids, int64, and weights, as tensors of the kind of x and where it is."""
    places: Any = ids.astype(np.int64)
    if is_torch(x):
        import torch

        return torch.from_numpy(places).to(x.device), torch.from_numpy(weights).to(x.device)
    return places, weights

"""A whole MoE layer on the device: it routes, and computes the experts it has chosen.

A call is one command, MOE, for as many tokens as a command takes; where only ids and weights are
asked for, MOE_ROUTE.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.errors import FormatError, about
from moeaccel.host import routing, weights as loading
from moeaccel.host.calls import Pending
from moeaccel.host.errors import HandleConsumed, InvalidOption, InvalidTensor, LimitExceeded
from moeaccel.host.layers import Experts, Linear
from moeaccel.host.options import check_names
from moeaccel.host.router_layer import (
    LOGIT_GRID,
    RouterLayer,
    Task,
    check_settings,
    like_x,
    load_router,
    weight_of,
)
from moeaccel.host.routing import Router
from moeaccel.host.stacks import Stack, stack_shape
from moeaccel.host.tensors import Like, Tensor, float32, shape_of
from moeaccel.host.weights import Shared
from moeaccel.interface.commands import ENTRY_BYTES, MOE_BLOCK
from moeaccel.router.choices import WeightOn
from moeaccel.router.descriptor import table_bytes
from moeaccel.router.settings import RouterError, RouterSettings

if TYPE_CHECKING:
    from moeaccel.host.device import Device

GatedShared: TypeAlias = (
    Shared | tuple[Tensor, Tensor, Tensor] | Sequence[tuple[Tensor, Tensor, Tensor]])
"""Shared experts, each with its gate behind its matrices, or none with one."""

__all__ = ["Moe", "Routes", "load_moe", "router_bytes"]


def router_bytes(config: AcceleratorConfig, outputs: int, d_model: int) -> int:
    """Return how many bytes of each channel's memory a router takes at most: both planes with their
    descriptor and table, what a command names it by, and biases.

    Raises
    ------
    LimitExceeded
        If the configuration has no 8-bit format.
    """
    planes = 2 * loading.plane_shape(config, outputs, d_model).memory_bytes + 3 * ENTRY_BYTES
    biases = table_bytes(np.zeros((outputs, 2), np.int32), None).size
    return planes + ENTRY_BYTES * len(MOE_BLOCK) + biases


def load_moe(device: Device, router: Router | Sequence[Router], gate_up: Stack, down: Stack, *,
             shared: GatedShared | None = None, **options: Any) -> Moe:
    """Put a layer into a device's memory; :meth:`moeaccel.host.Device.load_moe`."""
    check_names("load_moe", options, device.load_experts)
    given: list[Any] = list(router) if isinstance(router, tuple | list) else [router]
    experts = stack_shape("down", down, "H", "I")[0]
    if not given:
        raise InvalidOption("router must be at least one, not an empty sequence")

    def of_task(task: int) -> AbstractContextManager[None]:
        """Let errors say which router it is about, where there are several."""
        return nullcontext() if len(given) == 1 else about(
            f"router of task {task}", FormatError, InvalidOption, InvalidTensor, LimitExceeded,
            RouterError)

    ready: list[tuple[Router, Tensor]] = []
    pairs: Shared | None = None
    for task, one in enumerate(given):
        with of_task(task):
            own, weight, pairs = _checked(device, one, shared)
            if own.settings.experts != experts:
                raise InvalidTensor(f"down must have E = {own.settings.experts} experts, the "
                                    f"router's, not {experts}")
            ready.append((own, weight))
    loaded = device.load_experts(gate_up, down, shared=pairs, **options)
    planes: list[Linear] = []
    try:
        if loaded.row_blocks > 1 or loaded.num_identity:
            raise InvalidOption("row_blocks and identity experts must be left out where the device "
                                "routes: its ids are entries of the table; route on the host")
        for task, (one, weight) in enumerate(ready):
            with of_task(task):
                _check_behind(one.settings, len(loaded.shared_shapes))
                planes.append(
                    loading.load_router_weight(device, weight, grid_exponent=LOGIT_GRID))
                if planes[-1].shape.d_in != loaded.shapes[0].d_model:
                    shape = one.settings.outputs, loaded.shapes[0].d_model
                    raise InvalidTensor(
                        f"weight must have the shape {shape} of a router for these experts, not "
                        f"{tuple(weight.shape)}")
        return Moe(device, [one for one, _ in ready], planes, loaded)
    except BaseException:
        for layer in (*planes, loaded):
            layer.close()
        raise


def _checked(device: Device, router: Router, shared: GatedShared | None
             ) -> tuple[Router, Tensor, Shared | None]:
    """Return a router that a device has, with the gates of shared experts in it, its weight, and
    the experts without."""
    router, weight, pairs = _with_gates(router, weight_of(router), shared)
    settings = router.settings
    if settings.weight_on_kind is WeightOn.INPUT and settings.shared:
        raise LimitExceeded("gates must be none with weights on the input, which the host "
                            f"multiplies x by, not {settings.gates!r}")
    if settings.weight_on_kind is WeightOn.INPUT and settings.top_k > 1:
        raise LimitExceeded("top_k must be 1 with weights on the input, which the host multiplies "
                            f"x by, not {settings.top_k}")
    check_settings(device.config, settings)
    return router, weight, pairs


def _check_behind(settings: RouterSettings, behind: int) -> None:
    """Refuse another number of shared experts than a router is for."""
    if settings.shared not in (0, behind):
        raise InvalidTensor(f"shared must have {settings.shared} experts, for which router has "
                            f"gates, not {behind}")
    if settings.top_k + behind > TOP_K_MAX:
        raise LimitExceeded(f"top_k and shared experts must be at most {TOP_K_MAX} together, "
                            f"not {settings.top_k} and {behind}")


def _with_gates(router: Router, weight: Tensor, shared: GatedShared | None
                ) -> tuple[Router, Tensor, Shared | None]:
    """Return the router and its weight with the gates of shared experts as rows of its own, and the
    experts without."""
    if not isinstance(shared, Sequence):  # None, or what load_experts() refuses
        return router, weight, shared
    single = all(len(getattr(one, "shape", ())) for one in shared)
    several: list[Any] = [shared] if single else list(shared)
    gates = [one[2] for one in several if isinstance(one, Sequence) and len(one) == 3]
    if not gates:
        return router, weight, cast("Shared", shared)
    d_model = shape_of("weight", weight, "E", "H")[1]
    rows = [float32("shared gate", gate).reshape(-1) for gate in gates]
    if len(gates) != len(several) or any(len(row) != d_model for row in rows):
        raise InvalidTensor(f"shared must have a gate of {d_model} elements for each expert, or "
                            "none at all")
    if router.settings.shared:
        raise InvalidOption("shared must be pairs (gate_up, down) where router has gates")
    settings = replace(router.settings, gates="sigmoid", shared=len(gates))
    weight = np.concatenate([float32("weight", weight), np.stack(rows)])
    gated = Router(weight, bias=router.bias, selection_bias=router.selection_bias,
                   **asdict(settings))
    return gated, weight, [(one[0], one[1]) for one in several]


class Moe(RouterLayer):
    """A layer that routes by itself; from :meth:`Device.load_moe`.

    Attributes
    ----------
    experts : :class:`moeaccel.host.Experts`
        The experts routed to, and behind them the shared ones.
    """

    def __init__(self, device: Device, routers: Sequence[Router], planes: Sequence[Linear],
                 experts: Experts) -> None:
        self.experts = experts
        super().__init__(device, routers, planes, experts, len(experts.shared_shapes))

    def __call__(self, x: Tensor, *, task: int = 0) -> Any:
        """Return y, (T, H), as x is: its experts and the shared ones, weighted and summed exactly.

        Parameters
        ----------
        x : float tensor, (T, H)
        task : :class:`int`
            Whose router chooses, where the layer has several; another one than that of the call
            before costs nothing.

        Raises
        ------
        InvalidTensor, InvalidOption
            Before anything is sent.
        NonFiniteInput
            If x or a logit is NaN or infinite; it names the token.
        LogitOverflow, GridOverflow
            If logits are 2048 or more in magnitude, or outputs beyond the layer's grid.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        return self.compute(x, task=task)[0]

    def compute(self, x: Tensor, *, task: int = 0) -> tuple[Any, Any, Any]:
        """Return y, and the ids and weights that x was routed by, as :meth:`route` has them; of one
        command.

        Parameters and errors are those of a call.
        """
        chosen = self._task(task)
        if chosen.router.settings.weight_on_kind is WeightOn.INPUT:
            ids, weights, y = self._weighted(x, chosen)
        else:
            ids, weights, y = self._submit(x, chosen, compute=True).only_result()
        return (y, *like_x(x, ids, weights))

    def submit(self, x: Tensor, *, task: int = 0) -> Pending:
        """Send a call to the device and return a handle for :meth:`sync`; otherwise as a call.

        Raises
        ------
        InvalidOption
            With weights on the input, too: the host multiplies x by them, between two commands.
        """
        chosen = self._task(task)
        if chosen.router.settings.weight_on_kind is WeightOn.INPUT:
            raise InvalidOption("weight_on must be 'output' for submit, not 'input': the host "
                                "multiplies x between two commands; call the layer")
        return self._submit(x, chosen, compute=True)

    def sync(self, handle: Pending, *, timeout_s: float | None = None) -> Any:
        """Wait for what :meth:`submit` has sent and return y, (T, H); once.

        Parameters
        ----------
        handle : :class:`Pending`
            Of this layer's ``submit``.
        timeout_s : :class:`float`, optional
            For each of its commands; the device's when left out, 0: look once, do not wait.

        Raises
        ------
        DeviceTimeout
            If it takes too long; the handle can be used again.
        HandleConsumed
            If the handle is not one that this layer waits for. Otherwise as a call.
        """
        if not isinstance(handle, Pending):
            raise InvalidOption(
                f"handle must be what submit() returned, not {type(handle).__name__}")
        if handle.owner is not self:
            raise HandleConsumed("handle must be one that this layer's submit() returned")
        return handle.result(timeout_s=timeout_s)[2]

    def _weighted(self, x: Tensor, task: Task
                  ) -> tuple[NDArray[np.int32], NDArray[np.float32], Any]:
        """Return ids, weights and y where weights multiply x (Llama 4): the host does it, between
        two calls.

        Shared experts take x as it is, and are added in float32.
        """
        ids, weights, _ = self._submit(x, task, compute=False).only_result()
        rows = float32("x", x)
        tokens = len(rows)
        if not self._shared:
            one = np.ones((tokens, 1), np.float32)
            return ids, weights, Like.of(x)(self.experts(rows * weights, ids, one))
        # x times the weight goes to the one chosen, x itself to the shared ones.
        pairs = np.full((2 * tokens, self._shared), -1, np.int32)
        pairs[:tokens, :1] = ids
        pairs[tokens:] = task.router.settings.experts + np.arange(self._shared)
        y = self.experts._call(self.experts._submit(
            np.concatenate([rows * weights, rows]), pairs, np.ones(pairs.shape, np.float32),
            2 * tokens, self._shared))
        return ids, weights, Like.of(x)(y[:tokens] + y[tokens:])


class Routes:
    """What a device does that has a router; a base of :class:`moeaccel.host.device.Device`."""

    def route(self, router: Router, logits: Tensor, *, resident: Tensor | None = None
              ) -> tuple[Any, Any]:
        """Choose experts by logits, bit for bit as :mod:`moeaccel.golden.router`.

        Parameters
        ----------
        router : :class:`moeaccel.host.Router`
        logits : float tensor, (T, E)
            Any T, also 0; of the router's product with x, without bias.
        resident : bool tensor, (E,), optional; only these are chosen

        Returns
        -------
        (ids, weights)
            (T, K) int64, in the order of choice, -1 where there was none; (T, K), as the logits, 0
            there.

        Raises
        ------
        LimitExceeded, InvalidTensor, NonFiniteInput, LogitOverflow
            If the device has no such router; for shapes and types; if a logit is not finite, or
            with its bias 2048 or more: it names the token.
        RouterError
            If residents are given to a sparsemixer, which does not look at them.
        """
        return routing.route(cast("Device", self), router, logits, resident=resident)

    def load_moe(self, router: Router | Sequence[Router], gate_up: Stack, down: Stack, *,
                 shared: GatedShared | None = None, **options: Any) -> Moe:
        """Put a layer with its router into memory: ``moe(x)`` routes and computes on the device.

        Parameters
        ----------
        router : :class:`moeaccel.host.Router`, or a sequence of them
            With a weight, (E, H). Several are for the same experts (M3ViT, one for each task):
            ``moe(x, task=1)`` is routed by the second.
        gate_up, down, shared, **options
            As in :meth:`load_experts`, but that a shared expert may have a gate, (H,), behind its
            two matrices: its weight is the sigmoid of that times x.

        Raises
        ------
        LimitExceeded
            If the device has no such router, or top_k and shared experts are more than 16.
        InvalidOption
            For an option that :meth:`load_experts` has not.
        """
        return load_moe(
            cast("Device", self), router, gate_up, down, shared=shared, **options)

    def load_router(self, router: Router) -> RouterLayer:
        """Put a router alone into memory, without experts: ``route(x)`` says where x goes, bit for
        bit as that of :meth:`load_moe`.

        Parameters
        ----------
        router : :class:`moeaccel.host.Router`
            With a weight, (E, H).

        Raises
        ------
        LimitExceeded
            If the device has no such router.
        InvalidOption
            If there is no weight, or there are gates of shared experts.
        """
        return load_router(cast("Device", self), router)

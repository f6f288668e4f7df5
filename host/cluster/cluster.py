"""Several devices as one: who has which expert, on one grid."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig
from moeaccel.grid import gated_output, grid_exponent as choose_grid, squares_of
from moeaccel.host.cluster.layer import ClusterExperts, Piece
from moeaccel.host.cluster.router import ClusterMoe, ClusterRouter, able_shards, checked
from moeaccel.host.cluster.shard import LOST, Floats, LocalShard, Pairs, Routed, Shard
from moeaccel.host.device import Device
from moeaccel.host.errors import InvalidOption, InvalidTensor, ShardLost
from moeaccel.host.options import whole
from moeaccel.host.policies.sharding import Sharding, sharding as find_sharding
from moeaccel.host.policies.sharding.row_split import RowSplit
from moeaccel.host.router_layer import weight_of
from moeaccel.host.routing import Router
from moeaccel.host.row_blocks import bias_block, down_block, gate_up_block
from moeaccel.host.stacks import Biases, Stack
from moeaccel.host.tensors import float32, indices, shape_of
from moeaccel.host.weights import (
    Format,
    Formats,
    Shared,
    formats_of,
    shared_format_of,
    shared_matrices,
)
from moeaccel.image import interleave_gate_up
from moeaccel.router.settings import RouterSettings

__all__ = ["Cluster"]

_Result = TypeVar("_Result")
_Matrices = tuple[Floats, Floats]
_Shares = NDArray[np.floating]


class Cluster(Closing):
    """Devices that have the experts of layers together.

    Parameters
    ----------
    devices : sequence of :class:`Device` or :class:`Shard`
        Devices of this process stay yours to close. :func:`moeaccel.host.cluster.ray_cluster` makes
        a cluster of devices elsewhere.
    on_loss : ``"error"`` or ``"reload"``
        What happens when a device is lost: an error that names it, until :meth:`reload` is called;
        or its experts and routers are loaded on the others at once, and the call goes on.

    Raises
    ------
    InvalidOption
        If there is no device, or one twice, or something else.
    """

    def __init__(self, devices: Sequence[Device | Shard], *, on_loss: str = "error") -> None:
        if not isinstance(devices, Sequence) or not all(
                isinstance(device, Device | Shard) for device in devices):
            kinds = ([type(device).__name__ for device in devices]
                     if isinstance(devices, Sequence) else type(devices).__name__)
            raise InvalidOption("devices of a cluster must be a sequence of Device, from "
                                f"open_device(), not {kinds}")
        if not len(devices) or len({id(device) for device in devices}) < len(devices):
            raise InvalidOption("devices of a cluster must be one or more, each once, not "
                                f"{len(devices)}")
        if on_loss not in ("error", "reload"):
            raise InvalidOption(f"on_loss must be 'error' or 'reload', not {on_loss!r}")
        self.on_loss_reload = on_loss == "reload"
        self._shards: list[Shard] = [
            LocalShard(device, number) if isinstance(device, Device) else device
            for number, device in enumerate(devices)]
        self._lost: set[int] = set()
        self._keys = itertools.count()
        self._layers: weakref.WeakSet[ClusterExperts | ClusterRouter] = weakref.WeakSet()
        self._closed = False

    def __len__(self) -> int:
        """Devices, lost ones included."""
        return len(self._shards)

    @property
    def lost(self) -> frozenset[int]:
        """Numbers of devices that are gone."""
        return frozenset(self._lost)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def devices(self) -> tuple[Device, ...]:
        """Those of this process."""
        return tuple(shard.device for shard in self._shards if isinstance(shard, LocalShard))

    @property
    def configs(self) -> dict[int, AcceleratorConfig]:
        """Configurations of the devices that are not lost, by number."""
        return {number: shard.config for number, shard in enumerate(self._shards)
                if number not in self._lost}

    def name(self, shard: int) -> str:
        """Return what errors call a device."""
        return self._shards[shard].name

    def close(self) -> None:
        """Free what layers have, and end actors; devices of this process stay open."""
        self._closed = True
        for layer in list(self._layers):
            layer.close()
        for shard in self._shards:
            shard.close()

    # -- weights -----------------------------------------------------------------------------------
    def load_experts(self, gate_up: Stack, down: Stack, *,
                     share: str | Sharding | _Shares = "contiguous",
                     routes: NDArray[np.integer] | None = None, keep_host_weights: bool = True,
                     grid_exponent: int | None = None, coarser: int = 0, x_rms: float = 1.0,
                     weight_format: Formats = "int4_g32", gate_up_bias: Stack | None = None,
                     down_bias: Stack | None = None, shared: Shared | None = None,
                     shared_format: Format | None = None, **options: Any) -> ClusterExperts:
        """Deal the experts of a layer to the devices, and load them there.

        Parameters
        ----------
        gate_up, down, weight_format, gate_up_bias, down_bias
            See :meth:`Device.load_experts`.
        share : :class:`str`, :class:`Sharding`, or float (devices, experts)
            One of :data:`moeaccel.host.policies.sharding.SHARDINGS`, or a layer of
            :attr:`moeaccel.host.policies.sharding.Shards.share`. An expert with several devices has
            a replica on each. ``"row-split"``: a block of the rows of all experts on each.
        routes : integer, (T, K), optional
            Routes of this layer, for those that go by them.
        keep_host_weights : :class:`bool`
            Keep the weights, so that they can be loaded elsewhere when a device is lost.
        grid_exponent, x_rms
            Of all devices; chosen from all experts when left out.
        coarser : :class:`int`
            How many bits coarser than it was chosen: 6 leave parts of a sum up to 8 times the
            typical output exact, and an absolute error of 2^-20 of it.
        shared, shared_format
            See :meth:`Device.load_experts`. Each device has a replica of every shared expert, whole
            ones also with ``"row-split"``, and tokens go to the devices in turn: one command more
            on each device that has a token's turn.
        **options
            Others of :meth:`Device.load_experts`: activation, limit, gated, activation_bits,
            quantiser, prune. No more can be given: experts of a cluster have no second_up,
            limit_behind, row_blocks or identity experts, and are quantised without a calibration.

        Raises
        ------
        InvalidOption
            If the share is not one of these devices and experts, or for another option.
        ShardLost
            If a device is gone.
        """
        if unknown := options.keys() - _OPTIONS:
            known = sorted({*_OPTIONS, *inspect.signature(self.load_experts).parameters}
                           - {"gate_up", "down", "options"})
            raise InvalidOption(f"options of a layer on a cluster must be among "
                                f"{', '.join(known)}, not {', '.join(sorted(unknown))}")
        coarser = whole("coarser", coarser, least=0)
        count = len(gate_up)
        if not count or len(down) != count:
            raise InvalidTensor(f"gate_up and down must be of as many experts, one or more, not "
                                f"{count} and {len(down)}")
        gated = options.get("gated", True)
        shares, blocks = self._shares(share, routes, count)
        d_model, d_expert = float32("down", down[0]).shape
        if d_expert % blocks:
            raise InvalidOption(f"the {blocks} devices of a row split must divide I = {d_expert}")
        parts = 2 if gated else 1
        whole_biases = (Biases("gate_up_bias", gate_up_bias, count, d_expert * parts),
                        Biases("down_bias", down_bias, count, d_model))
        formats = formats_of(weight_format, count)
        always = shared_matrices(shared, d_model, parts)
        of_shared = shared_format_of(shared_format, weight_format) if always else None

        def part(expert: int, block: int) -> _Matrices:
            return (gate_up_block(float32("gate_up", gate_up[expert]), block, blocks, parts),
                    down_block(float32("down", down[expert]), block, blocks))

        def biases(expert: int, block: int) -> dict[str, Floats]:
            first, second = (bias.of(expert) for bias in whole_biases)
            found = bias_block(first, second, block, blocks, parts)
            return {name: bias for name, bias in zip(("gate_up_bias", "down_bias"), found,
                                                     strict=True) if bias is not None}

        if grid_exponent is None:
            outputs = [_output(part(e, b), gated, x_rms, options, **biases(e, b))
                       for e in range(count) for b in range(blocks)]
            outputs += [_output(matrices, gated, x_rms, options) for matrices in always]
            grid_exponent = choose_grid(outputs) + coarser
        given = options | {"grid_exponent": grid_exponent}

        def of_piece(piece: Piece) -> tuple[list[_Matrices], dict[str, Any]]:
            """Return the matrices of a piece, and how they are loaded."""
            if piece.shared:
                assert of_shared is not None
                return [always[piece.experts[0]]], given | {"weight_format": of_shared.name}
            more: dict[str, Any] = {"weight_format": [formats[e].name for e in piece.experts]}
            theirs = [biases(e, piece.block) for e in piece.experts]
            more |= {name: [found[name] for found in theirs] for name in theirs[0]}
            return [part(e, piece.block) for e in piece.experts], given | more

        def loaded(pieces: Sequence[Piece]) -> list[Piece]:
            """Load pieces, all shards at a time, or nothing."""
            def load(piece: Piece) -> Callable[[], None]:
                matrices, how = of_piece(piece)
                gate_ups, downs = zip(*matrices, strict=True)
                return self._shards[piece.shard].load(piece.key, gate_ups, downs, how)

            try:
                waits = [self._guarded(piece.shard, functools.partial(load, piece))
                         for piece in pieces]
                for piece, wait in zip(pieces, waits, strict=True):
                    self._guarded(piece.shard, wait)
            except BaseException:
                for piece in pieces:
                    self.drop(piece)
                raise
            return list(pieces)

        def elsewhere(gone: Sequence[Piece]) -> list[Piece]:
            """Load what a shard had; of shared experts the others have replicas."""
            without = self._lost | {piece.shard for piece in gone}
            left = [shard for shard in range(len(self)) if shard not in without]
            return loaded([
                Piece(shard, next(self._keys), experts, piece.block)
                for piece in gone if not piece.shared for place, shard in enumerate(left)
                if (experts := piece.experts[place :: len(left)])])

        pieces = [Piece(shard, next(self._keys), tuple(np.nonzero(row > 0)[0].tolist()),
                        shard if blocks > 1 else 0)
                  for shard, row in enumerate(shares) if (row > 0).any()]
        pieces += [Piece(shard, next(self._keys), (number,), shared=True)
                   for number in range(len(always)) for shard in range(len(self))
                   if shard not in self._lost]
        layer = ClusterExperts(
            self, loaded(pieces), blocks=blocks, num_experts=count, d_model=d_model,
            grid_exponent=grid_exponent, reload=elsewhere if keep_host_weights else None)
        self._layers.add(layer)
        return layer

    def load_moe(self, router: Router, gate_up: Stack, down: Stack, **options: Any) -> ClusterMoe:
        """Deal the experts of a layer to the devices, and load its router on one of them: a call is
        two, since that device says first where x goes.

        Parameters
        ----------
        router : :class:`moeaccel.host.Router`
            With a weight, (E, H), and without gates: of shared experts each token has all of.
        gate_up, down, **options
            As in :meth:`load_experts`.

        Raises
        ------
        LimitExceeded
            If no device has such a router, or weights are for x.
        InvalidOption, InvalidTensor, ShardLost
            As :meth:`load_experts` and :meth:`Device.load_router`.
        """
        ready = checked(router)
        able_shards(self, ready.settings)
        count, width = shape_of("weight", weight_of(ready), "E", "H")
        experts = self.load_experts(gate_up, down, **options)
        try:
            if (experts.num_experts, experts.d_model) != (count, width):
                raise InvalidTensor(
                    f"down must have E = {count} experts and H = {width}, the router's, not "
                    f"{experts.num_experts} and {experts.d_model}")
            made = ClusterRouter(self, ready)
        except BaseException:
            experts.close()
            raise
        self._layers.add(made)
        return ClusterMoe(made, experts)

    def check_router(self, settings: RouterSettings) -> None:
        """Refuse a router that no device has; see :func:`moeaccel.host.routing.check_router`."""
        able_shards(self, settings)

    def _shares(self, share: str | Sharding | _Shares, routes: NDArray[np.integer] | None,
                experts: int) -> tuple[_Shares, int]:
        """Return which share of which expert each device has, and blocks of rows."""
        if isinstance(share, str):
            share = find_sharding(share)(n_devices=len(self))
        if isinstance(share, Sharding):
            if share.n_devices != len(self):
                raise InvalidOption(f"share must be for the {len(self)} devices of this cluster, "
                                    f"not for {share.n_devices}")
            if isinstance(share, RowSplit):
                return np.ones((len(self), experts)), len(self)
            seen = np.arange(experts)[:, None]
            if routes is not None:
                shape_of("routes", routes, "T", "K")
                seen = indices("routes", routes, experts)
            share = share.shard(seen[:, None, :], experts).share[0]
        found = np.asarray(share, np.float64)
        if found.shape != (len(self), experts) or not np.allclose(found.sum(0), 1):
            raise InvalidOption(f"share must be ({len(self)} devices, {experts} experts) and add "
                                f"up to 1 for each expert, not {found.shape}")
        return found, 1

    # -- what layers ask for -----------------------------------------------------------------------
    def submit(self, piece: Piece, pairs: Pairs) -> Callable[[], Floats]:
        """Send a part of a call to its shard."""
        shard = self._shards[piece.shard]
        return self._guarded(piece.shard, lambda: shard.submit(piece.key, pairs))

    def answer(self, piece: Piece, wait: Callable[[], Floats]) -> Floats:
        """Return what a shard answers."""
        return self._guarded(piece.shard, wait)

    def drop(self, piece: Piece) -> None:
        """Free experts, where their shard is still there."""
        self.drop_key(piece.shard, piece.key)

    def drop_key(self, number: int, key: int) -> None:
        """Free what a shard has under a number, where it is still there."""
        if number in self._lost:
            return
        try:
            self._shards[number].drop(key)
        except LOST:
            self._lost.add(number)

    def routers(self) -> Counter[int]:
        """Return how many routers each shard has."""
        return Counter(layer.shard for layer in list(self._layers)
                       if isinstance(layer, ClusterRouter) and layer.shard is not None)

    def load_router(self, number: int, router: Router) -> int:
        """Load a router on a shard, and return its number there."""
        key = next(self._keys)
        try:
            wait = self._guarded(number, lambda: self._shards[number].load_router(key, router))
            self._guarded(number, wait)
        except BaseException:
            self.drop_key(number, key)
            raise
        return key

    def route(self, number: int, key: int, x: Floats) -> Routed:
        """Let a shard say where x goes."""
        def ask() -> Routed:
            return self._shards[number].route(key, x)()

        return self._guarded(number, ask, "route a layer")

    def _guarded(self, number: int, ask: Callable[[], _Result], what: str = "answer") -> _Result:
        """Ask a shard, and say so when it is gone."""
        shard = self._shards[number]
        if number in self._lost:
            raise ShardLost(f"shard {shard.name} must {what}, but was lost before; {_WAY_OUT}",
                            number)
        try:
            return ask()
        except LOST as error:
            self._lost.add(number)
            raise ShardLost(f"shard {shard.name} must {what}, but is lost: {error}; {_WAY_OUT}",
                            number) from error

    def reload(self, shard: int) -> None:
        """Load what all layers have on a device on the others, evenly.

        It is not asked any more, lost or not; where it is not, its memory is free again. A layer
        that an error keeps from being moved stays where it is.

        Raises
        ------
        InvalidOption
            If there is no such device.
        ShardLost
            If no other device is left, if the weights of a layer were not kept, or another device
            is gone.
        """
        shard = whole("shard", shard, least=0, most=len(self) - 1)
        if len(self._lost | {shard}) == len(self):
            raise ShardLost(f"shard {self.name(shard)} must not be the last, but no other of "
                            f"{len(self)} is left; open devices again", shard)
        for layer in list(self._layers):
            layer.move(shard)
        self._lost.add(shard)


_OPTIONS = {"activation", "gated", "limit", "activation_bits", "quantiser", "prune"}
_WAY_OUT = ("cluster.reload(shard) loads its experts and routers elsewhere, and so does "
            "on_loss='reload'")


def _output(matrices: _Matrices, gated: bool, x_rms: float, options: dict[str, Any],
            gate_up_bias: Floats | None = None, down_bias: Floats | None = None) -> float:
    """Return the typical output of an expert, as one device finds it."""
    gate_up, down = matrices
    if gated:
        gate_up = interleave_gate_up(gate_up)
        gate_up_bias = None if gate_up_bias is None else interleave_gate_up(gate_up_bias)
    return gated_output(
        squares_of(gate_up, gate_up_bias), squares_of(down, down_bias), x_rms=x_rms,
        activation=options.get("activation", "silu"), limit=options.get("limit"))

"""A layer of a cluster that routes by itself: one shard has its router, all have its experts.

The shard that routes is asked first (x to ids and weights), then all are asked for what was chosen:
two calls, as where a policy looks at the routes. Routers are dealt to the shards in turn, so that
of several layers not one shard has all; each is kept on the host, a few rows, and loaded elsewhere
when its shard is gone.
"""

from __future__ import annotations

import copy
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from moeaccel.arithmetic import from_bfloat16
from moeaccel.closing import Closing
from moeaccel.host.cluster.layer import ClusterExperts
from moeaccel.host.cluster.shard import Floats
from moeaccel.host.errors import DeviceClosed, InvalidTensor, LimitExceeded, ShardLost
from moeaccel.host.router_layer import check_alone, check_settings, like_x, weight_of
from moeaccel.host.routing import Router
from moeaccel.host.tensors import Tensor, element_type, elements, float32, shape_of
from moeaccel.interface.commands import ElementType
from moeaccel.router.choices import WeightOn
from moeaccel.router.settings import RouterSettings

if TYPE_CHECKING:
    from moeaccel.host.cluster.cluster import Cluster

__all__ = ["ClusterMoe", "ClusterRouter", "able_shards", "checked"]


def able_shards(cluster: Cluster, settings: RouterSettings) -> list[int]:
    """Return which shards that are left can have a router in their memory.

    Raises
    ------
    LimitExceeded
        If none can: what the first says.
    """
    found: list[int] = []
    refused: LimitExceeded | None = None
    for number, config in cluster.configs.items():
        try:
            check_settings(config, settings)
        except LimitExceeded as error:
            refused = refused or error
        else:
            found.append(number)
    if not found and refused is not None:
        raise refused
    return found


class ClusterRouter:
    """A router on one of the shards.

    Parameters
    ----------
    cluster : :class:`Cluster`
    router : :class:`moeaccel.host.Router`
        As :func:`checked` returns it.

    Raises
    ------
    LimitExceeded
        If no shard has such a router.
    ShardLost
        If no shard is left, or one is lost meanwhile.
    """

    def __init__(self, cluster: Cluster, router: Router) -> None:
        self._cluster, self.router = cluster, router
        self.d_model = shape_of("weight", weight_of(router), "E", "H")[1]
        self._place: list[tuple[int, int]] = []
        weakref.finalize(self, _drop, cluster, self._place)
        self._load(frozenset())

    @property
    def shard(self) -> int | None:
        """Which one routes; None after :meth:`close`."""
        return self._place[0][0] if self._place else None

    def _load(self, without: frozenset[int]) -> None:
        """Load it on the shard that has fewest, and free it where it was."""
        able = [shard for shard in able_shards(self._cluster, self.router.settings)
                if shard not in without]
        if not able:
            gone = min(without, default=0)
            raise ShardLost(
                f"shard {self._cluster.name(gone)} must not be the last that can route, but no "
                "other is left; open devices again", gone)
        counts = self._cluster.routers()
        shard = min(able, key=lambda one: (counts[one], one))
        place = shard, self._cluster.load_router(shard, self.router)
        _drop(self._cluster, self._place)
        self._place.append(place)

    def move(self, shard: int) -> None:
        """Load it elsewhere, if a shard has it, and free it there."""
        if shard == self.shard:
            self._load(frozenset({shard}))

    def close(self) -> None:
        """Free its memory."""
        _drop(self._cluster, self._place)

    def route(self, x: Floats) -> tuple[Any, Any]:
        """Return ids, (T, k) int64, and weights, (T, k) float32, of x, (T, H).

        Raises
        ------
        ShardLost
            If the shard that routes is gone, and on_loss is not ``"reload"``.
        """
        while True:
            if not self._place:
                raise DeviceClosed("layer must not be used after it was closed; load it again")
            try:
                return self._cluster.route(*self._place[0], x)
            except ShardLost as lost:
                if not self._cluster.on_loss_reload:
                    raise
                self._cluster.reload(lost.shard)


class ClusterMoe(Closing):
    """A layer of a cluster that routes by itself; from :meth:`Cluster.load_moe`.

    Attributes
    ----------
    experts : :class:`ClusterExperts`
    """

    def __init__(self, router: ClusterRouter, experts: ClusterExperts) -> None:
        self._router, self.experts = router, experts

    @property
    def router(self) -> Router:
        """What routes."""
        return self._router.router

    @property
    def router_shard(self) -> int | None:
        """The number of the device that routes; None after :meth:`close`."""
        return self._router.shard

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self.experts.closed

    def close(self) -> None:
        """Free the memory of every shard that is still there."""
        self._router.close()
        self.experts.close()

    def __call__(self, x: Tensor) -> Any:
        """Return y, (T, H), like x; see :meth:`compute`."""
        return self.compute(x)[0]

    def route(self, x: Tensor) -> tuple[Any, Any]:
        """Return ids, (T, k) int64, and weights, (T, k) float32, that x is routed by; see
        :meth:`compute` for errors."""
        given = elements("x", x)
        narrow = element_type(given) is ElementType.BFLOAT16
        rows = from_bfloat16(given.view(np.uint16)) if narrow else given.view(np.float32)
        found = shape_of("x", x, "T", str(self._router.d_model))
        if found[1] != self._router.d_model:
            raise InvalidTensor(f"x must have the shape (T, {self._router.d_model}) of this layer, "
                                f"not {found}")
        ids, weights = self._router.route(np.ascontiguousarray(rows))
        return like_x(x, ids, weights)

    def compute(self, x: Tensor) -> tuple[Any, Any, Any]:
        """Return y, (T, H), like x, and the ids and weights that it was routed by.

        Raises
        ------
        ShardLost
            If a shard is gone, and what it has is not loaded elsewhere; it is named, and whether it
            routes.
        InvalidTensor
            Before anything is sent.
        CommandFailed, OutOfDeviceMemory
            Of the first shard that says so.
        """
        ids, weights = self.route(x)
        return self.experts(x, ids, weights), ids, weights


def checked(router: Router) -> Router:
    """Return a router that a shard may have: with its weight as float32 of NumPy, which travels.

    Raises
    ------
    InvalidOption
        If it has no weight, or gates of shared experts.
    LimitExceeded
        If x is multiplied by its weights.
    """
    weight = weight_of(router)
    settings = router.settings
    check_alone(settings)
    if settings.weight_on_kind is WeightOn.INPUT:
        raise LimitExceeded("weight_on must be 'output' on a cluster, not 'input'; route with a "
                            "device of it, and multiply x")
    made = copy.copy(router)
    made.weight = np.array(float32("weight", weight))  # a copy: the caller's may change
    return made


def _drop(cluster: Cluster, place: list[tuple[int, int]]) -> None:
    """Free a router where it is."""
    while place:
        cluster.drop_key(*place.pop())

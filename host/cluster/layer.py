"""The call of a layer on a cluster: pairs to shards, their parts to one sum."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import BFLOAT16_BITS, ELEMENT_BITS, from_bfloat16, grid_to_float32
from moeaccel.errors import MoeAccelError
from moeaccel.host.cluster.shard import Floats, Pairs
from moeaccel.host.errors import (
    DeviceClosed,
    InvalidTensor,
    NonFiniteInput,
    ShardLost,
    command_error,
)
from moeaccel.host.tensors import (
    Like,
    Tensor,
    element_type,
    elements,
    float32,
    indices,
    shape_of,
)
from moeaccel.interface.commands import ElementType, Status

if TYPE_CHECKING:
    from moeaccel.host.cluster.cluster import Cluster

__all__ = ["ClusterExperts", "ClusterStatistics", "Piece"]


@dataclass(frozen=True)
class ClusterStatistics:
    """What a call was.

    Parameters
    ----------
    tokens : :class:`int`
    pairs : tuple of :class:`int`
        Of a token and an expert, a shared one, too, or a block of one, on each shard.
    rows : tuple of :class:`int`
        Tokens that went to each shard.
    rounded : :class:`int`
        Elements of y of which a part had more than 24 bits and was not the only one: only these
        may differ from what one device gives.
    """

    tokens: int
    pairs: tuple[int, ...]
    rows: tuple[int, ...]
    rounded: int


class Piece(NamedTuple):
    """Experts that a shard has.

    Parameters
    ----------
    shard, key : :class:`int`
        Where, and their number there.
    experts : tuple of :class:`int`
        In the shard's order.
    block : :class:`int`
        Which block of their hidden rows; 0 where they are whole.
    shared : :class:`bool`
        They are one shared expert, by its number: tokens go to its replicas in turn.
    """

    shard: int
    key: int
    experts: tuple[int, ...]
    block: int = 0
    shared: bool = False


class ClusterExperts:
    """The experts of one layer on a cluster; from :meth:`Cluster.load_experts`.

    Parameters
    ----------
    cluster : :class:`Cluster`
    pieces : sequence of :class:`Piece`
    blocks : :class:`int`
        Into which the hidden rows of experts are cut.
    num_experts, d_model : :class:`int`
    grid_exponent : :class:`int`
    reload : callable, optional
        Loads pieces of a shard elsewhere, and returns them.
    """

    def __init__(self, cluster: Cluster, pieces: Sequence[Piece], *, blocks: int,
                 num_experts: int, d_model: int, grid_exponent: int,
                 reload: Callable[[Sequence[Piece]], list[Piece]] | None) -> None:
        self._cluster = cluster
        self._pieces = list(pieces)
        self._blocks = blocks
        self.num_experts, self.d_model = num_experts, d_model
        self.grid_exponent = grid_exponent
        self._reload = reload
        self._closed = False
        self.last: ClusterStatistics | None = None
        weakref.finalize(self, _drop, cluster, self._pieces)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Which shard has what."""
        return tuple(self._pieces)

    def close(self) -> None:
        """Free the memory of every shard that is still there."""
        self._closed = True
        _drop(self._cluster, self._pieces)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """Return y, (T, H), like x; see :meth:`moeaccel.host.layers.Experts.submit`.

        Raises
        ------
        ShardLost
            If a shard is gone, and its experts are not loaded elsewhere. Nothing else is lost: the
            next call works if it does not need that shard, or after
            :meth:`Cluster.reload`.
        InvalidTensor
            Before anything is sent.
        CommandFailed, OutOfDeviceMemory
            Of the first shard that says so.
        """
        if self._closed:
            raise DeviceClosed("layer must not be used after it was closed; load it again")
        given = elements("x", x)
        narrow = element_type(given) is ElementType.BFLOAT16
        values = from_bfloat16(given.view(np.uint16)) if narrow else given.view(np.float32)
        tokens, d_in = shape_of("x", x, "T", str(self.d_model))
        if d_in != self.d_model:
            raise InvalidTensor(f"x must have the shape (T, {self.d_model}) of this layer, not "
                                f"{(tokens, d_in)}")
        chosen, scores = indices("ids", ids, self.num_experts), float32("weights", weights)
        if chosen.shape != scores.shape or chosen.ndim != 2 or len(chosen) != tokens:
            raise InvalidTensor(f"ids and weights must have one shape (T, K) with T = {tokens}, "
                                f"not {chosen.shape} and {scores.shape}")
        while True:
            try:
                total = self._sum(values, chosen, scores)
            except ShardLost as lost:
                if not self._cluster.on_loss_reload:
                    raise
                self._cluster.reload(lost.shard)
            else:
                break
        y = grid_to_float32(total, self.grid_exponent, BFLOAT16_BITS if narrow else ELEMENT_BITS)
        if narrow:
            return Like.of(x)((y.view(np.uint32) >> 16).astype(np.uint16))
        return Like.of(x)(y)

    # -- a call ------------------------------------------------------------------------------------
    def _sum(self, x: Floats, ids: NDArray[np.int32], weights: Floats) -> NDArray[np.int64]:
        """Return the sums on the grid, (T, H)."""
        shards = len(self._cluster)
        pairs, sent = [0] * shards, [0] * shards
        waiting: list[tuple[Piece, NDArray[np.int64], Callable[[], Floats]]] = []
        for piece, own in zip(self._pieces, self._dealt(ids), strict=True):
            rows = np.nonzero((own >= 0).any(axis=1))[0]
            if not len(rows):
                continue
            scores = np.ones((len(rows), 1), np.float32) if piece.shared else weights[rows]
            part = Pairs(np.ascontiguousarray(x[rows]), own[rows], scores)
            pairs[piece.shard] += int((part.ids >= 0).sum())
            sent[piece.shard] += len(rows)
            waiting.append((piece, rows, self._cluster.submit(piece, part)))
        total = np.zeros(x.shape, np.int64)
        parts, large = np.zeros(len(x), np.int32), np.zeros(x.shape, bool)
        failed: MoeAccelError | None = None
        for piece, rows, wait in waiting:  # also after an error: nothing may be left on its way
            try:
                y = self._cluster.answer(piece, wait)
            except NonFiniteInput as error:
                failed = failed or command_error(
                    Status.NONFINITE, int(rows[error.token]), error.address)
                continue
            except MoeAccelError as error:
                failed = failed or error
                continue
            units = np.ldexp(y.astype(np.float64), -self.grid_exponent)
            total[rows] += units.astype(np.int64)
            parts[rows] += 1
            large[rows] |= np.abs(units) >= 1 << ELEMENT_BITS
        if failed is not None:
            raise failed
        self.last = ClusterStatistics(len(x), tuple(pairs), tuple(sent),
                                      int(large[parts > 1].sum()))
        return total

    def _dealt(self, ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """Return each piece's part of ids, (T, K), as numbers of its own; -1 for others.

        Pairs of an expert of which there are replicas go to them in turn; (T, 1) of a shared one.
        """
        replicas = np.zeros((self._blocks, self.num_experts), np.int64)
        shared = [piece.experts[0] for piece in self._pieces if piece.shared]
        for piece in self._pieces:
            if not piece.shared:
                replicas[piece.block, list(piece.experts)] += 1
        tokens, turns = np.arange(len(ids)), dict.fromkeys(shared, 0)
        turn = _turns(ids, self.num_experts)
        met = np.zeros_like(replicas)
        found = []
        for piece in self._pieces:
            if piece.shared:
                (number,) = piece.experts
                mine = (tokens + number) % shared.count(number) == turns[number]
                turns[number] += 1
                found.append(np.where(mine, 0, -1).astype(np.int32)[:, None])
                continue
            experts = np.array(piece.experts)
            local = np.full(self.num_experts + 1, -1, np.int32)  # the last is that of -1
            local[experts] = np.arange(len(experts))
            of, which = replicas[piece.block], met[piece.block]
            mine = turn % np.append(np.maximum(of, 1), 1)[ids] == np.append(which, 0)[ids]
            found.append(np.where(mine, local[ids], -1))
            met[piece.block, experts] += 1
        return found

    # -- shards that are lost ----------------------------------------------------------------------
    def move(self, shard: int) -> None:
        """Load what a shard has on the others, and free it there.

        Raises
        ------
        ShardLost
            If the weights were not kept.
        """
        gone = [piece for piece in self._pieces if piece.shard == shard]
        if not gone:
            return
        if self._reload is None:
            raise ShardLost(
                f"experts of shard {self._cluster.name(shard)} must be kept on the host to be "
                "loaded elsewhere, but were not; load the layer with keep_host_weights=True",
                shard)
        came = self._reload(gone)
        self._pieces[:] = [piece for piece in self._pieces if piece.shard != shard] + came
        _drop(self._cluster, gone)


def _drop(cluster: Cluster, pieces: list[Piece]) -> None:
    """Free pieces where they are."""
    while pieces:
        cluster.drop(pieces.pop())


def _turns(ids: NDArray[np.int32], experts: int) -> NDArray[np.int64]:
    """Return of each pair the how manieth of its expert it is."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    begin = np.searchsorted(flat[order], np.arange(-1, experts))
    turn = np.empty(flat.size, np.int64)
    turn[order] = np.arange(flat.size) - begin[flat[order] + 1]
    return turn.reshape(ids.shape)

"""ROUTE: what it reads, computes and writes, and what is counted of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import BLOCK, AcceleratorConfig
from moeaccel.formats import whole_blocks
from moeaccel.golden.router import NONE, RoutedTokens, route_words
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.host.transports.golden.timing import Timing
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    ROUTER,
    SUBMISSION,
    ElementType,
    Selection,
    Status,
    field_of,
)
from moeaccel.router.descriptor import settings_of

if TYPE_CHECKING:
    from moeaccel.cycles.prediction import Prediction

__all__ = ["RouteUnit"]

_TABLE_BYTES = 8


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the arrays of a command, rounded up to what is read or written at once."""

    table: int
    residents: int
    logits: int
    pairs: int


def _whole(count: int) -> int:
    return -(-count // ENTRY_BYTES) * ENTRY_BYTES


def _outputs(router: Mapping[str, int]) -> int:
    """Return the logits of a token."""
    return router["num_experts"] + (router["shared"] if router["gates"] else 0)


class RouteUnit:
    """Runs a checked ROUTE.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    port : :class:`MemoryPort`
    timing : :class:`Timing`, optional
        Says how long it takes.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, port: MemoryPort,
                 timing: Timing | None) -> None:
        self._config = config
        self._registers = registers
        self._port = port
        self._timing = timing

    def check(self, submission: Mapping[str, int], router: Mapping[str, int], *,
              logits: int | None = None) -> None:
        """End the command if submission and router do not fit each other, or the address space.

        Parameters
        ----------
        logits : :class:`int`, optional
            Of a token, filled up, where it is not the host that says so.
        """
        sizes = self._sizes(submission, router)
        top = 1 << self._config.address_bits
        kept = router["keep_groups"] * router["group_size"]
        chosen = submission["top_k"] - router["shared"]
        if (not 1 <= chosen <= min(kept, self._config.router_top_k)
                or (router["selection"] == Selection.MIXER and chosen != 2)):
            raise Fault(Status.BAD_FIELD, detail=field_of(SUBMISSION, "top_k").word)
        # Of y and workspace there is a block for each token, as of any command.
        block = BLOCK * submission["tokens"]
        y_bytes = ElementType(submission["y_type"]).bytes * block
        for name, size in (("x_address", sizes.logits), ("ids_address", sizes.pairs),
                           ("weights_address", sizes.pairs), ("y_address", y_bytes),
                           ("workspace_address", 8 * block)):
            if submission[name] + size > top:
                raise Fault(Status.BAD_FIELD, detail=field_of(SUBMISSION, name).word)
        for name, bad in (
                ("num_experts", _outputs(router) > self._config.max_experts
                 or logits not in (None, whole_blocks(_outputs(router)))),
                ("groups", router["groups"] * router["group_size"] != router["num_experts"]),
                ("keep_groups", router["keep_groups"] > router["groups"]),
                ("table_address",
                 router["table_address"] + sizes.table + sizes.residents > top)):
            if bad:
                raise Fault(Status.BAD_ROUTER, detail=field_of(ROUTER, name).word)

    def run(self, submission: Mapping[str, int], router: Mapping[str, int], *, given: bool = False
            ) -> tuple[RoutedTokens, Prediction | None]:
        """Run a command; return its result, and with a cycle model what that predicts.

        Parameters
        ----------
        given : :class:`bool`
            Logits are taken on their way to memory.

        Raises
        ------
        Fault
            If it ends early; the first in the order: table, logits, ids and weights.
        """
        sizes = self._sizes(submission, router)
        tokens, experts = submission["tokens"], router["num_experts"]
        ids, weights = submission["ids_address"], submission["weights_address"]
        faults, units = self._port.first_faults, range(0, sizes.pairs, ENTRY_BYTES)
        table = sizes.table if router["tables"] else 0
        read = table + sizes.residents
        # With a capacity the logits are read again, when it is known who is left.
        sweeps = (2 if router["capacity"] else 1) - given
        logit_units = self._units(submission["x_address"], sizes.logits)
        self._port.raise_first(
            faults(self._units(router["table_address"], read)), faults(logit_units * sweeps),
            faults(((base + unit, ENTRY_BYTES) for unit in units for base in (ids, weights)),
                   write=True))
        words = np.zeros((experts, 2), np.int64)
        raw = self._port.ram.read(router["table_address"], read)
        if table:
            words = raw[: _TABLE_BYTES * experts].view("<i4").reshape(experts, 2).astype(np.int64)
        preferred = None
        if router["prior"]:
            preferred = np.unpackbits(raw[table:], count=experts, bitorder="little").astype(bool)
        row = sizes.logits // tokens // 4
        settings = settings_of(router, submission["top_k"])
        logits = self._port.floats(
            submission["x_address"], (tokens, row))[:, : settings.outputs]
        routed = route_words(
            logits, settings, biased=router["selection"] == Selection.BIASED_SCORE,
            bias=words[:, 0], extra=words[:, 1], preferred=preferred)
        shared = tokens, router["shared"] - settings.shared  # those without a gate
        behind = np.broadcast_to(experts + np.arange(shared[1], dtype=np.int32), shared)
        self._write(ids, np.concatenate([routed.ids, behind], axis=1), sizes.pairs, NONE)
        self._write(weights, np.concatenate([routed.weights, np.ones(shared, np.float32)], axis=1),
                    sizes.pairs, 0)
        self._registers.count(
            bytes_read_other=read + sweeps * sizes.logits, bytes_written=2 * sizes.pairs,
            overflows=routed.saturated)
        if self._timing is None:
            return routed, None
        return routed, self._timing.predict_route(submission, router)

    def _sizes(self, submission: Mapping[str, int], router: Mapping[str, int]) -> _Sizes:
        tokens, experts = submission["tokens"], router["num_experts"]
        outputs = _outputs(router)
        return _Sizes(
            _whole(_TABLE_BYTES * experts), _whole(-(-experts // 8)) if router["prior"] else 0,
            4 * tokens * whole_blocks(outputs),
            _whole(4 * tokens * submission["top_k"]))

    @staticmethod
    def _units(address: int, size: int) -> list[tuple[int, int]]:
        return [(address + unit, ENTRY_BYTES) for unit in range(0, size, ENTRY_BYTES)]

    def _write(self, address: int, values: NDArray[np.int32] | NDArray[np.float32], size: int,
               rest: int) -> None:
        """Write an array, and fill it up."""
        whole = np.full(size // 4, rest, values.dtype)
        whole[: values.size] = values.reshape(-1)
        self._port.ram.write(address, whole.view(np.uint8))

"""MOE: a router's product, its choice and the experts it has chosen, in one command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeaccel.config import AcceleratorConfig
from moeaccel.golden import DeviceResult
from moeaccel.golden.router import RoutedTokens
from moeaccel.host.transports.golden.checks import check_descriptor, check_layer
from moeaccel.host.transports.golden.engine import Engine
from moeaccel.host.transports.golden.memory_port import Fault, MemoryPort
from moeaccel.host.transports.golden.route_unit import RouteUnit
from moeaccel.host.transports.golden.timing import Timing
from moeaccel.interface.commands import (
    COUNT_MAX,
    ENTRY_BYTES,
    MOE_PLANES,
    ElementType,
    Opcode,
    Overflow,
    Status,
)

if TYPE_CHECKING:
    from moeaccel.cycles.prediction import Prediction

__all__ = ["Moe", "MoeResult"]

_DESCRIPTORS = (Status.BAD_LAYER, Status.BAD_ROUTER, Status.BAD_LAYER)
"""What is said where one of the three is bad."""

_EXPERT_WORDS = 16
"""Words of an entry of an expert table: those of the router's matrix are numbered behind them."""


@dataclass(frozen=True)
class MoeResult:
    """What a MOE leaves behind: results of its parts; without experts, of the first two."""

    product: DeviceResult
    routed: RoutedTokens
    experts: DeviceResult | None

    @property
    def outcome(self) -> tuple[Status, int, int]:
        """Status, detail and address of the completion."""
        parts = [self.product, self.routed] + ([self.experts] if self.experts else [])
        for part in parts:
            if part.outcome[0] is Status.NONFINITE:
                return part.outcome
        logits = self.product.overflows + self.routed.saturated
        count = logits + (self.experts.overflows if self.experts else 0)
        if count:
            return (Status.OVERFLOW, min(count, COUNT_MAX),
                    Overflow.LOGIT if logits else Overflow.OUTPUT)
        return Status.OK, 0, 0

    @property
    def underflows(self) -> int:
        """Of logits and outputs."""
        return self.product.underflows + (self.experts.underflows if self.experts else 0)


class Moe:
    """Runs a MOE.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    port : :class:`MemoryPort`
    engine : :class:`Engine`
    routes : :class:`RouteUnit`
    timing : :class:`Timing`, optional
        Says how long it takes.
    """

    def __init__(self, config: AcceleratorConfig, port: MemoryPort, engine: Engine,
                 routes: RouteUnit, timing: Timing | None) -> None:
        self._config = config
        self._port = port
        self._engine = engine
        self._routes = routes
        self._timing = timing

    def run(self, submission: Mapping[str, int], descriptors: Sequence[Mapping[str, int]]
            ) -> tuple[MoeResult, Prediction | None]:
        """Run a command; return its result, and with a cycle model what that predicts.

        Raises
        ------
        Fault
            If it ends early: of the first part that does.
        """
        planes, router, experts = descriptors
        logits = submission["workspace_address"]
        try:
            product, first = self._engine.run({
                **submission, "opcode": Opcode.GEMM, "top_k": MOE_PLANES,
                "y_type": ElementType.FLOAT32, "y_address": logits}, planes)
        except Fault as fault:
            if fault.status is Status.BAD_EXPERT:
                fault.address += _EXPERT_WORDS
            raise
        routed, second = self._routes.run(
            {**submission, "x_address": logits}, router, given=submission["tokens"] == 1)
        result, third = None, None
        if submission["opcode"] == Opcode.MOE:
            result, third = self._engine.run(submission, experts, held=True)
        whole = None
        if self._timing is not None:
            whole = self._timing.predict_moe(
                submission, descriptors, [part for part in (first, second, third) if part])
        return MoeResult(product, routed, result), whole

    def check(self, submission: Mapping[str, int]) -> list[dict[str, int]]:
        """Return the three descriptors of a command, each checked by itself and with those before.

        Raises
        ------
        Fault
            Naming the first one that is wrong, by its address.
        """
        base = submission["layer_address"]
        raw = self._port.load(base, ENTRY_BYTES * len(_DESCRIPTORS)).tobytes()
        found: list[dict[str, int]] = []
        for index, status in enumerate(_DESCRIPTORS):
            at = ENTRY_BYTES * index
            try:
                values = check_descriptor(status, raw[at : at + ENTRY_BYTES], self._config)
                if status is Status.BAD_ROUTER:
                    # Logits are within the workspace: that was looked at.
                    self._routes.check({**submission, "x_address": 0}, values,
                                       logits=found[0]["d_out"])
                elif index:
                    check_layer(submission, values, self._config, d_in=found[0]["d_in"])
                else:
                    check_layer({**submission, "y_address": 0}, values, self._config)
            except Fault as fault:
                if fault.status is not Status.BAD_FIELD:
                    fault.address = base + at
                raise
            found.append(values)
        return found

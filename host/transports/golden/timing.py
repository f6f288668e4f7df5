"""How long commands take: the cycle model's figures, for those who ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.config import AcceleratorConfig
from moeaccel.host.transports.golden.expert_table import Entry
from moeaccel.host.transports.golden.register_file import RegisterFile
from moeaccel.interface.commands import ElementType, Opcode, Selection

if TYPE_CHECKING:
    from moeaccel.cycles.prediction import Prediction

_COUNTED = ("busy", "starved_weights", "starved_activations", "stalled_output", "idle")


class Timing:
    """Predicts commands, and counts their cycles.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
    latency : :class:`int`
        Of the ideal memory.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile, latency: int) -> None:
        self._config = config
        self._registers = registers
        self._latency = latency

    def predict(self, submission: Mapping[str, int], layer: Mapping[str, int],
                entries: Mapping[int, Entry], ids: NDArray[np.int64], *, held: bool = False,
                buffered: Sequence[int] = (), loads: Sequence[int] | None = None) -> Prediction:
        """Return what EXPERTS, GEMM or PREFETCH is predicted to take.

        Parameters
        ----------
        buffered, loads : sequence of :class:`int`
            As in :class:`moeaccel.cycles.job.Job`, but bytes.
        """
        from moeaccel.cycles import predict_command

        port = self._config.port_bytes

        return predict_command(
            self._config, {expert: entry.sections for expert, entry in entries.items()}, ids,
            layer["num_experts"], d_in=layer["d_in"], d_out=layer["d_out"],
            planes=layer["planes"], latency=self._latency,
            gemm=submission["opcode"] == Opcode.GEMM, x_type=ElementType(submission["x_type"]),
            y_type=ElementType(submission["y_type"]), held=held,
            buffered=[size // port for size in buffered],
            loads=None if loads is None else [size // port for size in loads])

    def predict_route(self, submission: Mapping[str, int], router: Mapping[str, int]
                      ) -> Prediction:
        """Return what a ROUTE is predicted to take."""
        from moeaccel.cycles.route_unit import predict_route

        return self._routed(predict_route, submission, router)

    def predict_moe(self, submission: Mapping[str, int], descriptors: Sequence[Mapping[str, int]],
                    parts: Sequence[Prediction]) -> Prediction:
        """Return what a MOE is predicted to take, of what its parts would alone."""
        from moeaccel.cycles.moe import join
        from moeaccel.cycles.route_unit import route_times

        planes, router, experts = descriptors
        return join(self._config, parts, self._routed(route_times, submission, router),
                    tokens=submission["tokens"], d_in=planes["d_in"], logits=planes["d_out"],
                    d_out=experts["d_out"], top_k=submission["top_k"], latency=self._latency)

    def _routed(self, predict: Callable[..., Any], submission: Mapping[str, int],
                router: Mapping[str, int]) -> Any:
        """Return what a part of the cycle model says of a ROUTE."""
        from moeaccel.router.descriptor import settings_of

        settings = settings_of(router, submission["top_k"])
        return predict(
            self._config, settings, submission["tokens"],
            biased=router["selection"] == Selection.BIASED_SCORE, tables=bool(router["tables"]),
            residents=bool(router["prior"]), shared=router["shared"] - settings.shared,
            latency=self._latency)

    def count(self, found: Prediction) -> int:
        """Return a command's cycles; the counters of time get theirs."""
        values = asdict(found)
        self._registers.count(**{name: values[name] for name in _COUNTED})
        return found.cycles

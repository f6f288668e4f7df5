"""One expert of a model at its true size through golden model and RTL, for one token."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import hidden, limit_behind
from moeaccel.config import AcceleratorConfig
from moeaccel.errors import MoeAccelError
from moeaccel.formats import QuantisedMatrix, weight_format
from moeaccel.host.device import Device
from moeaccel.host.errors import UnsupportedExperts
from moeaccel.host.opening import open_device
from moeaccel.host.zoo.support import expert_options, known, largest
from moeaccel.host.zoo.verify import Verdict, wrong
from moeaccel.image import Expert
from moeaccel.zoo.schema import ExpertKind, Model

__all__ = ["TrueSizes"]

_FORMAT = "int4_g32"
_ROWS = 1024
_SIGNIFICAND = 1 << 10
"""Of every scale: a power of two."""


class TrueSizes:
    """Devices for experts of true size; use it as a context manager.

    Weights are 4-bit integers times a power of two, drawn as the device has them.

    Parameters
    ----------
    config : :class:`str` or :class:`AcceleratorConfig`
        Larger dimensions take one with ``max_dim`` raised.
    device : :class:`str`
        What is held against the golden model.
    seed : :class:`int`
        Of weights and x.
    """

    def __init__(self, config: str | AcceleratorConfig = "wide512", *, device: str = "rtl",
                 seed: int = 0) -> None:
        self._config, self._device, self._seed = config, device, seed
        self._open: dict[AcceleratorConfig, tuple[Device, Device]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._stack.close()

    def added(self, verdict: Verdict, model: Model) -> Verdict:
        """Return a model's verdict with that of its experts at true size, of every width."""
        if verdict.relative_error is None:
            return verdict  # the device does not have such experts
        problems, errors = [], [verdict.relative_error]
        if not model.expert_widths:
            problems.append("experts: their size is not published")
        for d_in, d_expert in model.expert_widths:
            where = f"experts of {d_in}x{d_expert}"
            try:
                differ, error = self(model, d_in, d_expert)
            except MoeAccelError as failure:
                problems.append(f"{where}: {failure}")
                continue
            errors.append(error)
            problems += wrong(where, differ, error)
        reason = "; ".join(filter(None, (verdict.reason, *problems)))
        return replace(verdict, ok=not reason, relative_error=max(errors), reason=reason)

    def __call__(self, model: Model, d_in: int, d_expert: int) -> tuple[int, float]:
        """Run one expert for one token.

        Returns
        -------
        :class:`int`, :class:`float`
            Elements of y that differ between the devices, and y's relative error.
        """
        golden, rtl = self._devices(max(d_in, d_expert), model.expert.second_up)
        known(golden, expert_options(model.expert))
        rng = np.random.default_rng([self._seed, zlib.crc32(model.key.encode()), d_in])
        expert = _drawn(rng, model.expert, d_in, d_expert)
        x = rng.standard_normal((1, d_in), np.float32)
        ids, weight = np.zeros((1, 1), np.int64), np.full((1, 1), 0.75, np.float32)
        found = []
        for device in (golden, rtl):
            with device.load_quantised([expert]) as loaded:
                found.append(loaded(x, ids, weight))
        exact = 0.75 * _exact(expert, x)
        differ = int((found[0].view(np.uint32) != found[1].view(np.uint32)).sum())
        return differ, float(np.linalg.norm(found[1] - exact) / np.linalg.norm(exact))

    def _devices(self, dim: int, second_up: bool) -> tuple[Device, Device]:
        """Return open devices that are large enough, the RTL built once for each size."""
        config = largest(self._config, dim)
        if second_up:
            config = config.replace(name=f"{config.name} with second up", second_up=True)
        if config not in self._open:
            options: dict[str, Any] = {"config": config, "memory_bytes": 1 << 30}
            self._open[config] = (
                self._stack.enter_context(open_device("golden", **options)),
                self._stack.enter_context(open_device(self._device, timeout_s=600.0, **options)))
        return self._open[config]


def _drawn(rng: np.random.Generator, kind: ExpertKind, d_in: int, d_expert: int) -> Expert:
    """Return an expert with rows of about the size that activations are interesting for.

    Raises
    ------
    UnsupportedExperts
        For parts that are not drawn here.
    """
    if kind.form == "embedding":
        raise UnsupportedExperts(
            f"experts must be of two to four matrices at true size, not {kind.text}")
    rows = (4 if kind.second_up else 2 if kind.gated else 1) * d_expert
    gate_up = _matrix(rng, rows, d_in, 4.0 if kind.limit or kind.limit_behind else 1.5)
    down = _matrix(rng, d_in, d_expert, 1.0)
    if kind.bias is not None:
        gate_up = gate_up.with_bias(rng.standard_normal(rows, np.float32))
    if kind.bias == "both":
        down = down.with_bias(rng.standard_normal(d_in, np.float32))
    options, behind = expert_options(kind), kind.limit_behind
    name = options["activation"]
    return Expert(gate_up, down, activation=name, limit=options.get("limit"),
                  gate_limit=None if behind is None else limit_behind(name, behind))


def _matrix(rng: np.random.Generator, rows: int, columns: int, deviation: float) -> QuantisedMatrix:
    """Return a matrix of integers from -7 to 7, whose products with x of variance 1 have that
    deviation, within a factor of 1.5."""
    fmt = weight_format(_FORMAT)
    groups = rows, -(-columns // fmt.group)
    exponent = round(np.log2(deviation / (4.3 * np.sqrt(columns))))
    return QuantisedMatrix(
        fmt, rng.integers(-7, 8, (rows, columns), np.int8),
        np.full(groups, _SIGNIFICAND, np.int16), np.zeros(groups, np.int8),
        np.full(rows, exponent - _SIGNIFICAND.bit_length() + 1, np.int16), 0)


def _exact(expert: Expert, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the expert's output in float64, (1, d_in)."""
    rows = _product(expert.gate_up, x.astype(np.float64)) + expert.gate_up.bias_values
    h = hidden(expert.parts(rows), expert.down.integers.shape[1], expert.activation, expert.limit,
               expert.gate_limit)
    return _product(expert.down, h) + expert.down.bias_values


def _product(matrix: QuantisedMatrix, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``x W^T``, a few rows of W at a time."""
    def parts() -> Iterator[NDArray[np.float64]]:
        for first in range(0, len(matrix.integers), _ROWS):
            yield x @ matrix[first : first + _ROWS].dequantise().T

    return np.concatenate(list(parts()), axis=1)

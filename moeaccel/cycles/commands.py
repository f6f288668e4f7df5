"""Predictions of commands, and of calls that are several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from moeaccel.config import MEMORY_LATENCY_CYCLES, AcceleratorConfig
from moeaccel.cycles.job import Job, Pairs
from moeaccel.cycles.machine import Machine
from moeaccel.cycles.prediction import Prediction
from moeaccel.errors import FormatError
from moeaccel.image import ExpertShape, LinearShape, Section
from moeaccel.interface.commands import ElementType

Shape: TypeAlias = ExpertShape | LinearShape


def expert_cycles(
    config: AcceleratorConfig,
    shape: Shape | Sequence[Shape],
    ids: Pairs,
    num_experts: int,
    *,
    planes: int,
    latency: int = MEMORY_LATENCY_CYCLES,
    io: ElementType = ElementType.FLOAT32,
) -> int:
    """Return the predicted cycles of EXPERTS, see :func:`predict_experts`."""
    return predict_experts(config, shape, ids, num_experts, planes=planes, latency=latency,
                           io=io).cycles


def linear_cycles(
    config: AcceleratorConfig, section: Section, tokens: int, *, planes: int,
    latency: int = MEMORY_LATENCY_CYCLES, io: ElementType = ElementType.FLOAT32
) -> int:
    """Return the predicted cycles of GEMM, see :func:`predict_linear`."""
    return predict_linear(config, section, tokens, planes=planes, latency=latency, io=io).cycles


def predict_experts(
    config: AcceleratorConfig,
    shape: Shape | Sequence[Shape],
    ids: Pairs,
    num_experts: int,
    *,
    planes: int,
    latency: int = MEMORY_LATENCY_CYCLES,
    io: ElementType = ElementType.FLOAT32,
) -> Prediction:
    """Predict EXPERTS.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    shape : :class:`ExpertShape` or :class:`LinearShape`, or a sequence of them
        Of all experts, or of each: formats, widths and activations may differ.
    ids : integer array, (T, K)
        Those outside [0, num_experts) are skipped. What exceeds the limits of one command is cut
        as the driver does it; the result is the sum.
    num_experts : :class:`int`
        Of the layer.
    planes : :class:`int`
        1 (``a8``) or 2 (``a16``).
    latency : :class:`int`
        Of the ideal memory, reads and writes, cycles.
    io : :class:`ElementType`
        Of x and y.

    Raises
    ------
    FormatError
        If there are not as many shapes as experts, or they differ in d_in or d_out.
    """
    ids = np.asarray(ids, np.int64)
    shapes = (shape,) * num_experts if isinstance(shape, ExpertShape | LinearShape) else shape
    ends = {(s.sections[0].k, s.sections[-1].rows) for s in shapes}
    if len(shapes) != num_experts or len(ends) != 1:
        raise FormatError(f"shapes must be those of {num_experts} experts with one d_in and d_out, "
                          f"not {len(shapes)} with {sorted(ends)}")
    d_in, d_out = ends.pop()
    experts = {e: s.sections for e, s in enumerate(shapes)}
    tokens, top_k = ids.shape
    total = Prediction()
    if tokens and top_k:
        most = min(config.max_tokens, config.max_assignments // top_k)
        for begin in range(0, tokens, most):
            total += predict_command(
                config, experts, ids[begin : begin + most], num_experts, d_in=d_in, d_out=d_out,
                planes=planes, latency=latency, x_type=io, y_type=io)
    return total


def predict_linear(
    config: AcceleratorConfig, section: Section, tokens: int, *, planes: int,
    latency: int = MEMORY_LATENCY_CYCLES, io: ElementType = ElementType.FLOAT32
) -> Prediction:
    """Predict GEMM with ``tokens`` rows of x; see :func:`predict_experts`."""
    total = Prediction()
    most = min(config.max_tokens, config.max_assignments)
    for begin in range(0, tokens, most):
        ids = np.zeros((min(most, tokens - begin), 1), np.int64)
        total += predict_command(config, {0: (section,)}, ids, 1, d_in=section.k,
                                 d_out=section.rows, planes=planes, latency=latency, gemm=True,
                                 x_type=io, y_type=io)
    return total


def predict_command(
    config: AcceleratorConfig,
    experts: Mapping[int, tuple[Section, ...]],
    ids: Pairs,
    num_experts: int,
    *,
    d_in: int,
    d_out: int,
    planes: int,
    latency: int = MEMORY_LATENCY_CYCLES,
    gemm: bool = False,
    x_type: ElementType = ElementType.FLOAT32,
    y_type: ElementType = ElementType.FLOAT32,
    held: bool = False,
    buffered: Sequence[int] = (),
    loads: Sequence[int] | None = None,
) -> Prediction:
    """Predict one command, within the limits of the configuration.

    Parameters
    ----------
    experts : mapping of int to tuple of :class:`Section`
        What the images hold of the experts with tokens.
    ids : integer array, (T, K)
        (T, 1) of zeros in a GEMM.
    d_in, d_out : :class:`int`
    gemm, held, buffered, loads
        See :class:`~moeaccel.cycles.job.Job`; EXPERTS, with nothing in an expert buffer, without
        them.
    x_type, y_type : :class:`ElementType`
    config, num_experts, planes, latency
        See :func:`predict_experts`.
    """
    return Machine(Job(config, experts, ids, num_experts, d_in, d_out, planes, latency, gemm,
                       x_type, y_type, held, buffered, loads)).run()

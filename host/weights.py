"""Weights on their way into a device's memory: checked, quantised, packed, uploaded unless they are
there.

The calls behind :meth:`Device.load_experts`, :meth:`Device.load_quantised` and
:meth:`Device.load_linear`, which say what their arguments mean.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from moeaccel.config import PRESETS
from moeaccel.errors import FormatError
from moeaccel.formats import (
    WeightFormat,
    check_dims,
    check_matrix,
    quantise,
    weight_format as find_format,
)
from moeaccel.grid import (
    Squares,
    gated_output,
    grid_exponent as choose_grid,
    linear_output,
    squares,
)
from moeaccel.host.calibration import calibrated
from moeaccel.host.errors import InvalidOption, InvalidTensor, LimitExceeded, UploadError
from moeaccel.host.layers import Experts, Linear
from moeaccel.host.memory import COMMAND_ALIGNMENT, PAGE, Allocation
from moeaccel.host.report import WeightErrors, WeightReport
from moeaccel.host.tensors import Tensor, float32, shape_of
from moeaccel.host.transports.base import Bytes
from moeaccel.image import (
    HEADER_BYTES,
    Expert,
    ExpertShape,
    LinearShape,
    build_image,
    build_linear_image,
    interleave_gate_up,
)
from moeaccel.interface.commands import GRID_EXPONENTS, LAYER, Activation, LayerKind, encode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = [
    "Progress", "Stack", "check_limits", "load_experts", "load_linear", "load_quantised"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (experts uploaded, experts in all)."""

Stack = Tensor | Sequence[Tensor]
"""One matrix for each expert."""

_Measured = tuple[Expert, dict[str, Squares]]
"""An expert, and the sums of squares of its matrices by their kind."""


def _stack_shape(name: str, stack: Stack, *dims: str) -> tuple[int, ...]:
    """Return (E, rows, K) of a tensor, or of a sequence of matrices by its first."""
    if isinstance(stack, Sequence):
        return len(stack), *(shape_of(f"{name}[0]", stack[0], *dims) if len(stack) else (0, 0))
    return shape_of(name, stack, "E", *dims)


@contextlib.contextmanager
def _freed_on_error(allocation: Allocation) -> Iterator[None]:
    """Free an allocation when something goes wrong, also while the traceback lives."""
    try:
        yield
    except BaseException:
        allocation.free()
        raise


def load_experts(device: Device, gate_up: Stack, down: Stack, *, activation: str,
                 weight_format: str, activation_bits: int, grid_exponent: int | None,
                 x_rms: float, progress: Progress | None, quantiser: str,
                 calibration: tuple[Tensor, Tensor] | None) -> Experts:
    """Quantise the experts of one layer and put them into a device's memory."""
    experts, rows, d_model = _stack_shape("gate_up", gate_up, "2 I", "H")
    shape = _stack_shape("down", down, "H", "I")
    if shape != (experts, d_model, rows // 2) or rows % 2:
        raise InvalidTensor(
            f"down must have the shape (E, H, I) = {(experts, d_model, rows // 2)} for gate_up "
            f"{(experts, rows, d_model)} = (E, 2 I, H), not {shape}")
    seen = calibrated(quantiser, calibration, d_model=d_model, num_experts=experts)

    def quantised() -> Iterator[_Measured]:
        for e in range(experts):
            matrices = float32("gate_up", gate_up[e]), float32("down", down[e])
            if matrices[0].shape != (rows, d_model) or matrices[1].shape != shape[1:]:
                raise InvalidTensor(
                    f"expert {e} must have the shapes of expert 0, {(rows, d_model)} and "
                    f"{shape[1:]}, not {matrices[0].shape} and {matrices[1].shape}")
            moments = (None, None) if seen is None else seen.moments(
                e, matrices[0], second=quantiser == "gptq")
            expert = Expert.quantise(*matrices, weight_format, quantiser=quantiser,
                                     moments=moments)
            yield expert, {"gate_up": squares(expert.gate_up, interleave_gate_up(matrices[0])),
                           "down": squares(expert.down, matrices[1])}

    return _load_experts(
        device, quantised(), experts, d_model, rows // 2, format_name=weight_format,
        activation=activation, activation_bits=activation_bits, grid_exponent=grid_exponent,
        x_rms=x_rms, progress=progress)


def load_quantised(device: Device, experts: Sequence[Expert], *, activation: str,
                   activation_bits: int, grid_exponent: int | None, x_rms: float,
                   progress: Progress | None) -> Experts:
    """Put experts that are quantised already into a device's memory."""
    if not len(experts):
        raise InvalidTensor("experts must be at least one, not none")
    kinds: set[tuple[str, tuple[int, ...], str, tuple[int, ...]]] = set()
    seen: Expert | None = None  # not its id, which another may have that is made later
    for e, expert in enumerate(experts):
        if expert is not seen:
            check_matrix(expert.gate_up, f"gate_up of expert {e}")
            check_matrix(expert.down, f"down of expert {e}")
            kinds.add((expert.gate_up.format.name, expert.gate_up.integers.shape,
                       expert.down.format.name, expert.down.integers.shape))
            seen = expert
    if len(kinds) > 1:
        raise InvalidTensor(f"experts must have one format and shape, not {sorted(kinds)}")
    name, (rows, d_model), down_name, down_shape = kinds.pop()
    if rows % 2:
        raise InvalidTensor(f"gate_up must have a row of up for each row of gate, not {rows} rows")
    if down_shape != (d_model, rows // 2) or name != down_name:
        raise InvalidTensor(
            f"down must be {name} of the shape {(d_model, rows // 2)}, not {down_name} of "
            f"{down_shape}")

    def measured() -> Iterator[_Measured]:
        previous: Expert | None = None
        found: dict[str, Squares] = {}
        for expert in experts:
            if expert is not previous:
                found = {"gate_up": squares(expert.gate_up), "down": squares(expert.down)}
                previous = expert
            yield expert, found

    return _load_experts(
        device, measured(), len(experts), d_model, rows // 2, format_name=name,
        activation=activation, activation_bits=activation_bits, grid_exponent=grid_exponent,
        x_rms=x_rms, progress=progress)


def load_linear(device: Device, weight: Tensor, *, weight_format: str, activation_bits: int,
                grid_exponent: int | None, x_rms: float, quantiser: str) -> Linear:
    """Quantise the matrix of a linear layer and put it into a device's memory."""
    d_out, d_in = shape_of("weight", weight, "N", "K")
    fmt = _check_format(device, weight_format)
    planes = _check_options("silu", activation_bits, grid_exponent, x_rms)
    check_limits(device, 1, d_in=d_in, d_out=d_out)
    config = device.config
    shape = LinearShape(fmt, d_out, d_in, config.row_multipliers, config.channels)
    values = float32("weight", weight)
    matrix = quantise(values, fmt, quantiser=quantiser)
    found = squares(matrix, values)
    if grid_exponent is None:
        grid_exponent = choose_grid([linear_output(found, x_rms=x_rms)])
    errors = WeightErrors(fmt.name)
    errors.add(0, {"weight": found}, groups=matrix.shift.size, coarsened=matrix.coarsened)
    images = device.memory.allocate(shape.stride, alignment=PAGE, keeps=True)
    with _freed_on_error(images):
        _enter(device, images, shape.stride, 1)
        parts = [build_linear_image(matrix, config.row_multipliers, channel=channel,
                                    channels=config.channels)
                 for channel in range(config.channels)]
        _upload(device, images.address, parts, "the linear layer")
        descriptor = _describe(device, {
            "kind": LayerKind.LINEAR, "format": fmt.code, "planes": planes, "num_experts": 1,
            "d_in": shape.section.k, "d_expert": shape.section.k, "d_out": shape.section.rows,
            "grid_exponent": grid_exponent, "stride": shape.stride,
            "image_address": images.address + shape.header_bytes})
    return Linear(device, shape, images, descriptor, planes, grid_exponent, _report(errors))


def _load_experts(device: Device, experts: Iterable[_Measured], count: int, d_model: int,
                  d_expert: int, *, format_name: str, activation: str, activation_bits: int,
                  grid_exponent: int | None, x_rms: float, progress: Progress | None) -> Experts:
    fmt = _check_format(device, format_name)
    planes = _check_options(activation, activation_bits, grid_exponent, x_rms)
    check_limits(device, count, d_model=d_model, d_expert=d_expert)
    config = device.config
    shape = ExpertShape(fmt, d_model, d_expert, config.row_multipliers, config.channels)
    images = device.memory.allocate(count * shape.stride, alignment=PAGE, keeps=True)
    with _freed_on_error(images):
        _enter(device, images, shape.stride, count)
        errors = WeightErrors(fmt.name)
        outputs: list[float] = []
        previous: Expert | None = None
        parts: list[Bytes] = []
        for e, (expert, found) in enumerate(experts):
            if expert is not previous:
                parts = [build_image(expert.gate_up, expert.down, config.row_multipliers,
                                     channel=channel, channels=config.channels)
                         for channel in range(config.channels)]
                previous = expert
            _upload(device, images.address + e * shape.stride, parts, f"expert {e}")
            outputs.append(gated_output(found["gate_up"], found["down"], x_rms=x_rms))
            errors.add(e, found, groups=expert.gate_up.shift.size + expert.down.shift.size,
                       coarsened=expert.gate_up.coarsened + expert.down.coarsened)
            if progress is not None:
                progress(e + 1, count)
        # The grid is that of all experts: only now are they all seen.
        if grid_exponent is None:
            grid_exponent = choose_grid(outputs)
        descriptor = _describe(device, {
            "kind": LayerKind.EXPERTS, "format": fmt.code, "planes": planes,
            "activation": Activation[activation.upper()], "num_experts": count,
            "d_in": shape.gate_up.k, "d_expert": shape.down.k, "d_out": shape.down.rows,
            "grid_exponent": grid_exponent, "stride": shape.stride,
            "image_address": images.address + shape.header_bytes})
    return Experts(device, shape, count, images, descriptor, planes, grid_exponent,
                   _report(errors))


def _report(errors: WeightErrors) -> WeightReport:
    report = errors.report()
    if report.warning:
        logger.warning("%s", report.warning)
    return report


def _check_format(device: Device, name: str) -> WeightFormat:
    """Return the format of that name, which the device must have."""
    fmt = find_format(name)
    config = device.config
    if fmt not in config.weight_formats:
        having = [c.name for c in PRESETS.values() if fmt in c.weight_formats]
        raise FormatError(
            f"weight_format must be one that config {config.name!r} has, "
            f"{', '.join(config.formats)}, not {name!r}; presets with it: "
            f"{', '.join(having) or 'none'}")
    return fmt


def _check_options(activation: str, activation_bits: int, grid_exponent: int | None,
                   x_rms: float) -> int:
    """Return the number of planes."""
    names = [a.name.lower() for a in Activation]
    if activation not in names:
        raise InvalidOption(f"activation must be one of {', '.join(names)}, not {activation!r}")
    if activation_bits not in (8, 16):
        raise InvalidOption(f"activation_bits must be 8 or 16, not {activation_bits!r}")
    if grid_exponent is not None and grid_exponent not in GRID_EXPONENTS:
        raise InvalidOption(
            f"grid_exponent must be from {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}, not "
            f"{grid_exponent!r}; leave it out to have it chosen from the weights")
    if not (isinstance(x_rms, Real) and 0 < x_rms < math.inf):
        raise InvalidOption(f"x_rms must be a positive number, not {x_rms!r}")
    return activation_bits // 8


def check_limits(device: Device, experts: int, **dims: int) -> None:
    """Raise :class:`LimitExceeded` if a layer is too large for the device's configuration."""
    check_dims(**dims)
    config = device.config
    fitting = [c.name for c in sorted(PRESETS.values(), key=lambda c: c.max_dim)
               if c.max_dim >= max(dims.values()) and c.max_experts >= experts]
    advice = (f"config {fitting[0]!r} fits this layer" if fitting
              else "no preset fits this layer, make a configuration that does")
    if experts < 1:
        raise InvalidTensor("number of experts must be at least 1, not 0")
    if experts > config.max_experts:
        raise LimitExceeded(
            f"number of experts must be at most max_experts = {config.max_experts} of config "
            f"{config.name!r}, not {experts}; {advice}")
    for name, value in dims.items():
        if value > config.max_dim:
            raise LimitExceeded(f"{name} must be at most max_dim = {config.max_dim} of config "
                                f"{config.name!r}, not {value}; {advice}")


def _enter(device: Device, images: Allocation, stride: int, count: int) -> None:
    with device._lock:
        device._check_open()
        device._residents.enter(images.address, stride, count)


def _upload(device: Device, address: int, parts: Sequence[Bytes], what: str) -> None:
    """Write each channel's part of an image to the same address of its memory."""
    for channel, part in enumerate(parts):
        where = f" on channel {channel}" if len(parts) > 1 else ""
        _upload_part(device, device.config.device_address(channel, address), part, f"{what}{where}")


def _upload_part(device: Device, address: int, image: Bytes, what: str) -> None:
    """Write an image, unless it is there; its header last, so that it is never half there."""
    header = image[:HEADER_BYTES]
    with device._lock:
        transport = device.transport
        found = transport.memory_read(address, HEADER_BYTES)
        if np.array_equal(found, header):
            logger.debug("%s is resident at %#x", what, address)
            return
        if found.any():
            transport.memory_write(address, np.zeros(HEADER_BYTES, np.uint8))
        transport.memory_write(address + HEADER_BYTES, image[HEADER_BYTES:])
        transport.memory_write(address, header)
        found = transport.memory_read(address, HEADER_BYTES)
    if not np.array_equal(found, header):
        raise UploadError(
            f"header of {what} at {address:#x} must read back as it was written, with its "
            f"CRC, but reads {found[:28].tobytes().hex()}; check the device's memory")


def _describe(device: Device, values: Mapping[str, int]) -> Allocation:
    descriptor = device.memory.allocate(COMMAND_ALIGNMENT)
    with device._lock:
        device.transport.memory_write(descriptor.address, encode(LAYER, values))
    return descriptor


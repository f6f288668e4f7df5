"""Weights on their way into a device's memory: checked, quantised, packed, uploaded unless they are
there.

The calls behind :meth:`Device.load_experts`, :meth:`Device.load_quantised` and
:meth:`Device.load_linear`, which say what their arguments mean.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.activations import limit_behind as limit_of_gate
from moeaccel.config import TOP_K_MAX, AcceleratorConfig
from moeaccel.errors import FormatError, about
from moeaccel.formats import (
    ALL_FORMATS,
    BLOCK,
    PRUNINGS,
    QuantisedMatrix,
    WeightFormat,
    check_matrix,
    prune as pruned,
    quantise,
    weight_format as find_format,
)
from moeaccel.grid import (
    gated_output,
    grid_exponent as choose_grid,
    linear_output,
    squares,
)
from moeaccel.host.calibration import calibrated
from moeaccel.host.errors import InvalidOption, InvalidTensor, LimitExceeded, UploadError
from moeaccel.host.layers import Experts, Linear, Linears
from moeaccel.host.limits import check_layer
from moeaccel.host.memory import PAGE, Allocation
from moeaccel.host.options import flag, whole
from moeaccel.host.report import WeightErrors, WeightReport
from moeaccel.host.row_blocks import RowBlocks, bias_block
from moeaccel.host.stacks import Biases, Stack, stack_shape
from moeaccel.host.stored import Measured, Ready, StoredExperts, built, measured
from moeaccel.host.tensors import Tensor, float32, shape_of
from moeaccel.host.transports.base import Bytes
from moeaccel.image import (
    HEADER_BYTES,
    HEADER_USED,
    Expert,
    ExpertShape,
    LinearShape,
    build_linear_image,
    expert_table,
    interleave_gate_up,
    limit_bits,
)
from moeaccel.interface.commands import ENTRY_BYTES, GRID_EXPONENTS, LAYER, encode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Format", "Formats", "Progress", "Shared", "formats_of",
           "load_experts", "load_linear", "load_linears", "load_quantised", "load_router_weight",
           "plane_shape",
           "shared_format_of", "shared_matrices", "upload"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (experts uploaded, experts in all)."""

Format = str | WeightFormat
"""A weight format."""

Formats = Format | Sequence[Format]
"""A weight format for all experts, or one for each."""

Shared = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]
"""gate_up and down of a shared expert, or of each of several."""

_Matrices = tuple[NDArray[np.float32], NDArray[np.float32]]
"""gate_up and down of an expert."""


@contextlib.contextmanager
def _freed_on_error(allocation: Allocation) -> Iterator[None]:
    """Free an allocation when something goes wrong, also while the traceback lives."""
    try:
        yield
    except BaseException:
        allocation.free()
        raise


def load_experts(device: Device, gate_up: Stack, down: Stack, *, activation: str, gated: bool,
                 limit: float | None, limit_behind: bool, second_up: bool,
                 weight_format: Formats, activation_bits: int, grid_exponent: int | None,
                 x_rms: float, progress: Progress | None, quantiser: str,
                 calibration: tuple[Tensor, Tensor] | None,
                 prune: str | None, row_blocks: int = 1,
                 gate_up_bias: Stack | None = None, down_bias: Stack | None = None,
                 shared: Shared | None = None, shared_format: Format | None = None,
                 identity: int = 0) -> Experts:
    """Quantise the experts of one layer and put them into a device's memory."""
    experts, rows, d_model = stack_shape("gate_up", gate_up, "2 I", "H")
    shape = stack_shape("down", down, "H", "I")
    gated, second_up = flag("gated", gated), flag("second_up", second_up)
    limit_behind = flag("limit_behind", limit_behind)
    if (second_up and not gated) or (limit_behind and limit is None):
        raise InvalidOption("second_up goes with gated=True, and limit_behind=True with a limit; "
                            f"not with gated={gated!r}, limit={limit!r}")
    parts = 3 if second_up else 2 if gated else 1
    limit_bits(limit)
    gate_limit = limit_of_gate(activation, limit) if limit is not None and limit_behind else None
    d_expert = rows // parts
    if shape != (experts, d_model, d_expert) or rows % parts:
        raise InvalidTensor(
            f"down must have the shape (E, H, I) = {(experts, d_model, d_expert)} for gate_up "
            f"{(experts, rows, d_model)} = (E, {_rows(parts)}, H), not {shape}; experts are "
            f"{_KINDS[parts]}")
    formats = formats_of(weight_format, experts)
    _check_prune(prune, [*formats, *([] if shared is None else
                                     [shared_format_of(shared_format, weight_format)])])
    if progress is not None and not callable(progress):
        raise InvalidOption("progress must be callable with (experts uploaded, experts in all), "
                            f"not {type(progress).__name__}")
    every = (Biases("gate_up_bias", gate_up_bias, experts, rows),
             Biases("down_bias", down_bias, experts, d_model))
    row_blocks = whole("row_blocks", row_blocks, least=1)
    if row_blocks != 1:
        if d_expert % row_blocks or calibration is not None:
            raise InvalidOption(f"row_blocks must divide I = {d_expert}, and be 1 with a "
                                f"calibration, not {row_blocks!r}")
        gate_up, down = (RowBlocks(name, stack, row_blocks, parts) for name, stack in
                         (("gate_up", gate_up), ("down", down)))
        formats = [fmt for fmt in formats for _ in range(row_blocks)]
        experts, rows, d_expert = len(formats), rows // row_blocks, d_expert // row_blocks
        shape = experts, d_model, d_expert
    array = device.config.row_multipliers, device.config.channels
    kind: dict[str, Any] = {
        "activation": activation, "limit": limit, "gate_limit": gate_limit}
    sizes = {**kind, "gated": gated, "second_up": second_up}
    shapes = {fmt: ExpertShape(fmt, d_model, d_expert, *array, **sizes,
                               gate_up_biased=gate_up_bias is not None,
                               down_biased=down_bias is not None)
              for fmt in dict.fromkeys(formats)}
    seen = calibrated(quantiser, calibration, d_model=d_model, num_experts=experts)
    more = shared_matrices(shared, d_model, parts)
    if len(more) >= TOP_K_MAX:
        raise LimitExceeded(f"shared must be at most {TOP_K_MAX - 1} experts, as a token has "
                            f"{TOP_K_MAX} places with those that it is routed to, not {len(more)}")
    extra = [ExpertShape(shared_format_of(shared_format, weight_format), d_model, down.shape[1],
                         *array, **sizes)
             for _, down in more]

    def made(e: int | None, matrices: _Matrices, shape: ExpertShape,
             biases: Sequence[NDArray[np.float32] | None]) -> Measured:
        """Return an expert; shared ones have no number."""
        moments = (None, None) if seen is None else seen.moments(
            e, matrices[0], shape.d_expert, **kind, second=quantiser == "gptq",
            bias=biases[0])
        with about("a shared expert" if e is None else f"expert {e // row_blocks}", FormatError):
            expert = Expert.quantise(
                *matrices, shape.format, **kind, quantiser=quantiser,
                moments=moments, gate_up_bias=biases[0], down_bias=biases[1], prune=prune,
                channels=device.config.channels)
        return expert, {"gate_up": squares(
            expert.gate_up, interleave_gate_up(matrices[0], parts)),
                        "down": squares(expert.down, matrices[1])}

    def quantised() -> Iterator[Measured]:
        for e, fmt in enumerate(formats):
            matrices = float32("gate_up", gate_up[e]), float32("down", down[e])
            if matrices[0].shape != (rows, d_model) or matrices[1].shape != shape[1:]:
                raise InvalidTensor(
                    f"expert {e} must have the shapes of expert 0, {(rows, d_model)} and "
                    f"{shape[1:]}, not {matrices[0].shape} and {matrices[1].shape}; experts of "
                    "different widths go by load_quantised()")
            expert, block = divmod(e, row_blocks)
            first, second = (bias.of(expert) for bias in every)
            yield made(e, matrices, shapes[fmt],
                       bias_block(first, second, block, row_blocks, parts))
        for matrices, wide in zip(more, extra, strict=True):
            yield made(None, matrices, wide, (None, None))

    return _load_experts(
        device, built(quantised(), device.config), [*(shapes[fmt] for fmt in formats), *extra],
        activation_bits=activation_bits, grid_exponent=grid_exponent, x_rms=x_rms,
        progress=progress, shared=len(extra), row_blocks=row_blocks, identity=identity)


def shared_format_of(given: Format | None, weight_format: Formats) -> WeightFormat:
    """Return the format of shared experts: that of all others, where no other is given."""
    if given is None:
        if not isinstance(weight_format, str | WeightFormat):
            raise InvalidOption("shared_format must be given where experts have a weight_format "
                                "each")
        given = weight_format
    return find_format(given)


def _rows(parts: int) -> str:
    """Return the rows of gate_up as errors have them."""
    return f"{parts} I" if parts > 1 else "I"


_KINDS = {1: "not gated", 2: "gated unless gated=False", 3: "gated, with second up rows"}
"""Experts by the parts of gate_up."""


def shared_matrices(shared: Shared | None, d_model: int, parts: int) -> list[_Matrices]:
    """Return (gate_up, down) of each shared expert, whose widths are their own."""
    if shared is None:
        return []
    if not isinstance(shared, Sequence):
        raise InvalidTensor("shared must be a pair (gate_up, down) of matrices, or a sequence of "
                            f"pairs, not {type(shared).__name__}")
    single = len(shared) == 2 and all(len(getattr(part, "shape", ())) == 2 for part in shared)
    found: list[_Matrices] = []
    pairs: Sequence[Any] = [shared] if single else shared
    for s, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidTensor("shared must be a pair (gate_up, down) of matrices, or a sequence "
                                f"of pairs, not {type(pair).__name__} in place {s}")
        gate_up, down = float32("shared gate_up", pair[0]), float32("shared down", pair[1])
        rows = down.shape[-1] * parts
        if down.shape[:-1] != (d_model,) or gate_up.shape != (rows, d_model):
            raise InvalidTensor(
                f"shared expert {s} must have gate_up ({_rows(parts)}, {d_model}) and down "
                f"({d_model}, I), not {gate_up.shape} and {down.shape}; experts are "
                f"{_KINDS[parts]}")
        found.append((gate_up, down))
    return found


def load_quantised(device: Device, experts: Sequence[Expert], *, activation: str | None,
                   activation_bits: int, grid_exponent: int | None, x_rms: float,
                   progress: Progress | None, shared: Sequence[Expert] = (), identity: int = 0
                   ) -> Experts:
    """Put experts that are quantised already into a device's memory."""
    if not len(experts):
        raise InvalidTensor("experts must be at least one, not none")
    shapes: list[ExpertShape] = []
    stored = experts if isinstance(experts, StoredExperts) else None
    if stored is not None:
        shape = replace(stored.shape(), row_multipliers=device.config.row_multipliers,
                        channels=device.config.channels)
        shapes += [shape if activation is None else replace(shape, activation=activation)
                   ] * len(stored)
    others = [*(experts if stored is None else ()), *shared]
    seen: Expert | None = None  # many may be one object; its id may be another's that is made later
    for e, expert in enumerate(others, len(shapes)):
        shapes.append(
            shapes[-1] if expert is seen else _checked_shape(device, e, expert, activation))
        seen = expert
    if len({shape.d_model for shape in shapes}) > 1:
        raise InvalidTensor(
            f"experts must be of one d_model, not {sorted({shape.d_model for shape in shapes})}")

    made = built(measured(others), device.config)
    ready = made if stored is None else itertools.chain(stored.ready(device.config), made)
    return _load_experts(
        device, ready, shapes, activation_bits=activation_bits, grid_exponent=grid_exponent,
        x_rms=x_rms, progress=progress, shared=len(shared), identity=identity)


def _checked_shape(device: Device, e: int, expert: Expert, activation: str | None) -> ExpertShape:
    """Return the shape of an expert whose matrices hold what their formats can say."""
    check_matrix(expert.gate_up, f"gate_up of expert {e}")
    check_matrix(expert.down, f"down of expert {e}")
    rows, d_model = expert.gate_up.integers.shape
    found = expert.down.integers.shape
    if found not in ((d_model, rows / 2), (d_model, rows), (d_model, rows / 4)):
        raise InvalidTensor(
            f"down of expert {e} must have the shape {(d_model, rows // 2)}, {(d_model, rows)} "
            f"without up rows, or {(d_model, rows // 4)} with second ones, not {found}")
    if activation is not None:
        expert = replace(expert, activation=activation)
    return expert.shape(device.config.row_multipliers, device.config.channels)


def load_linear(device: Device, weight: Tensor, *, weight_format: str, activation_bits: int,
                grid_exponent: int | None, x_rms: float, quantiser: str,
                prune: str | None, bias: Tensor | None = None) -> Linear:
    """Quantise the matrix of a linear layer and put it into a device's memory."""
    d_out, d_in = shape_of("weight", weight, "N", "K")
    planes = _check_options(activation_bits, grid_exponent, x_rms)
    config = device.config
    _check_prune(prune, [find_format(weight_format)])
    shape = LinearShape(find_format(weight_format), d_out, d_in, config.row_multipliers,
                        config.channels, bias is not None)
    check_layer(config, [shape])
    if quantiser == "gptq":
        raise InvalidOption("quantiser must be 'search' or 'amax' for a linear layer, which has no "
                            "calibration, not 'gptq'")
    values = float32("weight", weight)
    if bias is not None:
        bias = Biases("bias", [bias], 1, d_out).of(0)
    matrix = quantise(
        values if prune is None else pruned(values, shape.format, prune, channels=config.channels),
        shape.format, quantiser=quantiser).with_bias(bias)
    found = squares(matrix, values)
    if grid_exponent is None:
        grid_exponent = choose_grid([linear_output(found, x_rms=x_rms)])
    errors = WeightErrors(shape.format.name)
    errors.add(0, {"weight": found}, groups=matrix.shift.size, coarsened=matrix.coarsened)
    images, descriptor = _put_matrices(device, [(matrix, "the linear layer")], [shape], planes,
                                       grid_exponent)
    return Linear(device, shape, images, descriptor, planes, grid_exponent, _report(errors))


def _plane_format(config: AcceleratorConfig) -> WeightFormat:
    """Return the format of a router's planes."""
    fmt = next((f for f in config.weight_formats if f.weight_bits == 8 and f.parts == 1), None)
    if fmt is None:
        raise LimitExceeded(f"formats must have one of 8 bits for a router's weights in config "
                            f"{config.name!r}, not {', '.join(config.formats)}")
    return fmt


def plane_shape(config: AcceleratorConfig, experts: int, d_model: int) -> LinearShape:
    """Return the shape of each plane of a router's matrix, (E, H).

    Raises
    ------
    LimitExceeded
        If the configuration has no 8-bit format.
    """
    return LinearShape(_plane_format(config), experts, d_model, config.row_multipliers,
                       config.channels)


def router_planes(config: AcceleratorConfig, weight: Tensor
                  ) -> tuple[QuantisedMatrix, QuantisedMatrix]:
    """Return a router's matrix as two, of which the second holds what the first leaves."""
    fmt, values = _plane_format(config), float32("weight", weight)
    with about("weight of the router", FormatError):
        high = quantise(values, fmt)
    return high, quantise(values - high.dequantise().astype(np.float32), fmt)


def load_router_weight(device: Device, weight: Tensor, *, grid_exponent: int) -> Linear:
    """Put a router's matrix, (E, H), into a device's memory as two of 8 bits.

    They are a layer's experts 0 and 1; what a token's logits are is the sum of both. The second
    holds what the first leaves, so that together they have 15 bits or more of each block's largest.

    Raises
    ------
    LimitExceeded
        If the device has no 8-bit format, or not room for so many experts or elements of x.
    """
    config = device.config
    shape = plane_shape(config, *shape_of("weight", weight, "E", "H"))
    fmt = shape.format
    check_layer(config, [shape, shape])
    high, low = router_planes(config, weight)
    rest = float32("weight", weight) - high.dequantise().astype(np.float32)
    found = replace(squares(high), error=squares(low, rest).error)
    errors = WeightErrors(fmt.name)
    errors.add(0, {"weight": found}, groups=high.shift.size, coarsened=high.coarsened)
    images, descriptor = _put_matrices(
        device, [(high, "plane 0 of the router"), (low, "plane 1 of the router")], [shape, shape],
        2, grid_exponent)
    return Linear(device, shape, images, descriptor, 2, grid_exponent, _report(errors))


def load_linears(device: Device, matrices: Sequence[QuantisedMatrix], *, activation_bits: int = 16,
                 grid_exponent: int | None = None, x_rms: float = 1.0) -> Linears:
    """Put quantised matrices of one shape, (N, K) each, into a device's memory as one layer, of
    which each row of x names its own; the grid is chosen from all of them.

    Raises
    ------
    InvalidTensor
        If there are none, or they differ in shape.
    FormatError, LimitExceeded
        If the device has not the format, or not room for so many.
    """
    planes = _check_options(activation_bits, grid_exponent, x_rms)
    config = device.config
    for e, matrix in enumerate(matrices):
        check_matrix(matrix, f"matrix {e}")
    sizes = {matrix.integers.shape for matrix in matrices}
    if len(sizes) != 1:
        raise InvalidTensor("matrices must be some of one shape, not of "
                            f"{', '.join(map(str, sorted(sizes))) or 'none'}")
    ((d_out, d_in),) = sizes
    shapes = [LinearShape(matrix.format, d_out, d_in, config.row_multipliers, config.channels,
                          matrix.bias is not None) for matrix in matrices]
    check_layer(config, shapes)
    if grid_exponent is None:
        grid_exponent = choose_grid(linear_output(squares(matrix), x_rms=x_rms)
                                    for matrix in matrices)
    errors = WeightErrors(", ".join(dict.fromkeys(shape.format.name for shape in shapes)))
    for e, matrix in enumerate(matrices):
        errors.add(e, {}, groups=matrix.shift.size, coarsened=matrix.coarsened)
    images, descriptor = _put_matrices(
        device, [(matrix, f"matrix {e}") for e, matrix in enumerate(matrices)], shapes, planes,
        grid_exponent)
    return Linears(device, shapes, images, descriptor, planes, grid_exponent, _report(errors))


def _put_matrices(device: Device, matrices: Sequence[tuple[QuantisedMatrix, str]],
                  shapes: Sequence[LinearShape], planes: int, grid_exponent: int
                  ) -> tuple[Allocation, Allocation]:
    """Upload matrices, named for messages, and describe them as one layer."""
    config = device.config
    images, addresses = _allocate(device, shapes)
    with _freed_on_error(images):
        for (matrix, what), address in zip(matrices, addresses, strict=True):
            upload(device, address, [
                build_linear_image(matrix, config.row_multipliers, channel=channel,
                                   channels=config.channels)
                for channel in range(config.channels)], what)
        return images, _describe(device, planes, grid_exponent, shapes, addresses)


def _load_experts(device: Device, experts: Iterable[Ready], shapes: Sequence[ExpertShape], *,
                  activation_bits: int, grid_exponent: int | None, x_rms: float,
                  progress: Progress | None, shared: int = 0, row_blocks: int = 1,
                  identity: int = 0) -> Experts:
    planes = _check_options(activation_bits, grid_exponent, x_rms)
    config = device.config
    identity = whole("identity", identity, least=0, unit=" experts")
    one = _identity(config, shapes[0].d_model) if identity and shapes else None
    entries: list[ExpertShape | LinearShape] = list(shapes)
    if one is not None:
        d_out, d_in = one.integers.shape
        entries.append(
            LinearShape(one.format, d_out, d_in, config.row_multipliers, config.channels))
    check_layer(config, entries)
    images, addresses = _allocate(device, entries)
    with _freed_on_error(images):
        errors = WeightErrors(", ".join(dict.fromkeys(
            section.format.name for shape in shapes for section in shape.sections)))
        outputs: list[float] = []
        for e, (expert, shape) in enumerate(zip(experts, shapes, strict=True)):
            upload(device, addresses[e], expert.parts, f"expert {e}")
            outputs.append(gated_output(
                expert.squares["gate_up"], expert.squares["down"], x_rms=x_rms,
                activation=shape.activation, limit=shape.limit, gate_limit=shape.gate_limit))
            errors.add(e, expert.squares, groups=expert.groups, coarsened=expert.coarsened)
            if progress is not None:
                progress(e + 1, len(shapes))
        if one is not None:
            upload(device, addresses[-1], [
                build_linear_image(one, config.row_multipliers, channel=channel,
                                   channels=config.channels)
                for channel in range(config.channels)], "the identity")
        # The grid is that of all experts: only now are they all seen.
        if grid_exponent is None:
            grid_exponent = choose_grid(outputs)
        descriptor = _describe(device, planes, grid_exponent, entries, addresses)
    return Experts(device, shapes, images, descriptor, planes, grid_exponent, _report(errors),
                   shared, row_blocks, identity)


def _identity(config: AcceleratorConfig, d_model: int) -> QuantisedMatrix:
    """Return the identity in the shortest format of the hardware that holds it exactly: its
    products are x as the device has quantised it."""
    small = np.eye(BLOCK, dtype=np.float32)
    holding = [fmt for fmt in config.weight_formats if fmt.parts == 1 and np.array_equal(
        quantise(small, fmt, quantiser="amax").dequantise(), small)]
    if not holding:
        raise InvalidOption(
            f"identity must be 0 in config {config.name!r}, none of whose formats, "
            f"{', '.join(config.formats)}, holds 1 exactly; take one with mxint8 or mxfp4")
    fmt = min(holding, key=lambda fmt: fmt.bits_per_weight())
    return quantise(np.eye(d_model, dtype=np.float32), fmt, quantiser="amax")


def _report(errors: WeightErrors) -> WeightReport:
    report = errors.report()
    if report.warning:
        logger.warning("%s", report.warning)
    return report


def formats_of(weight_format: Formats, experts: int) -> list[WeightFormat]:
    """Return the format of each expert."""
    if isinstance(weight_format, str | WeightFormat) or not isinstance(weight_format, Sequence):
        return [find_format(weight_format)] * experts
    if len(weight_format) != experts:
        raise InvalidOption(f"weight_format must be one name, or one for each of {experts} "
                            f"experts, not {len(weight_format)}")
    return [find_format(name) for name in weight_format]


def _check_prune(prune: str | None, formats: Sequence[WeightFormat]) -> None:
    """Refuse a way of pruning that there is not, or where no format has a pattern to make."""
    if prune is None:
        return
    if prune not in PRUNINGS:
        raise InvalidOption(f"prune must be {' or '.join(map(repr, PRUNINGS))}, or left out, not "
                            f"{prune!r}")
    if all(fmt.parts == 1 for fmt in formats):
        sparse = [fmt.name for fmt in ALL_FORMATS.values() if fmt.parts > 1]
        raise InvalidOption(
            f"prune must be left out with {' and '.join(sorted({fmt.name for fmt in formats}))}, "
            f"which has no N:M pattern, not {prune!r}; formats with one: {', '.join(sparse)}")


def _check_options(activation_bits: int, grid_exponent: int | None, x_rms: float) -> int:
    """Return the number of planes."""
    if not isinstance(activation_bits, int) or activation_bits not in (8, 16):
        raise InvalidOption(f"activation_bits must be 8 or 16, not {activation_bits!r}")
    if grid_exponent is not None and grid_exponent not in GRID_EXPONENTS:
        raise InvalidOption(
            f"grid_exponent must be from {GRID_EXPONENTS[0]} to {GRID_EXPONENTS[-1]}, not "
            f"{grid_exponent!r}; leave it out to have it chosen from the weights")
    if not (isinstance(x_rms, Real) and 0 < x_rms < math.inf):
        raise InvalidOption(f"x_rms must be a positive number, not {x_rms!r}")
    return activation_bits // 8


def _allocate(device: Device, shapes: Sequence[ExpertShape | LinearShape]
              ) -> tuple[Allocation, list[int]]:
    """Return memory for images one behind the other, listed as such, and the address of each."""
    sizes = [shape.memory_bytes for shape in shapes]
    images = device.memory.allocate(sum(sizes), alignment=PAGE, keeps=True)
    with _freed_on_error(images), device._lock:
        device._check_open()
        device._residents.enter(images.address, sizes)
    return images, list(itertools.accumulate(sizes[:-1], initial=images.address))


def upload(device: Device, address: int, parts: Sequence[Bytes], what: str) -> None:
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
        device.forget_experts()  # it may be one that the expert buffer holds
        if found.any():
            transport.memory_write(address, np.zeros(HEADER_BYTES, np.uint8))
        transport.memory_write(address + HEADER_BYTES, image[HEADER_BYTES:])
        transport.memory_write(address, header)
        found = transport.memory_read(address, HEADER_BYTES)
    if not np.array_equal(found, header):
        raise UploadError(
            f"header of {what} at {address:#x} must read back as it was written, with its "
            f"CRC, but reads {found[:HEADER_USED].tobytes().hex()}; check the device's memory")


def _describe(device: Device, planes: int, grid_exponent: int,
              shapes: Sequence[ExpertShape | LinearShape], addresses: Sequence[int]) -> Allocation:
    """Write the descriptor of a layer and, behind it, the table of its experts."""
    sections = shapes[0].sections
    descriptor = device.memory.allocate(ENTRY_BYTES * (1 + len(shapes)))
    layer = encode(LAYER, {
        "planes": planes, "num_experts": len(shapes), "d_in": sections[0].k,
        "d_out": sections[-1].rows, "grid_exponent": grid_exponent,
        "table_address": descriptor.address + ENTRY_BYTES})
    table = expert_table(shapes, [address + shape.header_bytes for shape, address
                                  in zip(shapes, addresses, strict=True)])
    with device._lock:
        device.transport.memory_write(descriptor.address, layer + table)
    return descriptor

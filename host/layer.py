"""What all layers in device memory have in common: images, calls in parts, handles of calls."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import from_bfloat16
from moeaccel.closing import Closing
from moeaccel.formats import whole_blocks
from moeaccel.host.errors import (
    CommandFailed,
    DeviceClosed,
    HandleConsumed,
    InvalidOption,
    InvalidTensor,
    OutOfDeviceMemory,
)
from moeaccel.host.memory import Allocation
from moeaccel.host.options import seconds
from moeaccel.host.process import Bound
from moeaccel.host.report import (
    ActivationReport,
    WeightReport,
    measure_activations,
    sampling_step,
)
from moeaccel.host.rings import Command
from moeaccel.host.staging import Layouts, offsets
from moeaccel.host.tensors import (
    Like,
    Tensor,
    element_type,
    elements,
    float32,
    indices,
    io_type,
    shape_of,
)
from moeaccel.interface.commands import ElementType, Opcode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["CallStatistics", "Handle", "Layer"]

logger = logging.getLogger(__name__)

_FLOAT32, _BFLOAT16 = np.dtype("<f4"), np.dtype("<u2")


@dataclass(frozen=True)
class CallStatistics:
    """What one call cost.

    Parameters
    ----------
    cycles : :class:`int`
        Sum over its commands, each from fetching the submission to writing the completion.
    commands, tokens : :class:`int`
    underflows : :class:`int`
        Weighted outputs that were not zero and became zero on the layer's output grid.
    """

    cycles: int
    commands: int
    tokens: int
    underflows: int = 0
    _sample: tuple[int, NDArray[Any], int] | None = field(
        default=None, repr=False, compare=False)

    @functools.cached_property
    def activations(self) -> ActivationReport | None:
        """What quantising x cost, measured when it is first asked for.

        A call keeps up to 16 of its tokens for it (a copy, of microseconds); measuring 16 tokens of
        4,096 elements takes some 30 ms. When ``flushed`` or ``coarsened`` is a large share, load
        the layer with ``activation_bits=16``. None for a call without tokens.
        """
        if self._sample is None:
            return None
        step, rows, planes = self._sample
        if element_type(rows) is ElementType.BFLOAT16:
            rows = from_bfloat16(rows)
        return measure_activations(rows, planes, step=step)


@dataclass(slots=True)
class _Part:
    """One command of a call: rows ``[first, first + count)`` of x."""

    command: Command
    y_address: int
    first: int
    count: int
    fetched: bool = False


@dataclass(slots=True)
class _Cost:
    """What the statistics of a call are made of, when somebody asks; it keeps nothing alive."""

    parts: list[_Part]
    tokens: int
    sample: tuple[int, NDArray[Any], int] | None

    @property
    def statistics(self) -> CallStatistics:
        done = [part.command.completion for part in self.parts
                if part.command.completion is not None]
        return CallStatistics(sum(c.cycles for c in done), len(self.parts), self.tokens,
                              sum(c.underflows for c in done), self.sample)


class Handle(Bound):
    """A call on its way, from ``submit``; ``sync`` takes its result, in any order.

    When it is dropped without ``sync``, its buffers go back once the device has finished with them.
    While it is kept they go back when the device's memory runs short: its result then waits here.
    """

    def __init__(self, layer: Layer, tokens: int, d_out: int, io: ElementType, like: Like
                 ) -> None:
        self._layer = layer
        self._parts: list[_Part] = []
        self._shape = tokens, d_out
        self._columns = whole_blocks(d_out)
        self._dtype = _BFLOAT16 if io is ElementType.BFLOAT16 else _FLOAT32
        self._y: NDArray[Any] | None = None
        self._like = like
        self._sample: tuple[int, NDArray[Any], int] | None = None
        self._consumed = False

    @property
    def cycles(self) -> int:
        """Cycles of the commands whose results were taken: all of them after ``sync``."""
        cycles = 0
        for part in self._parts:
            if part.command.completion is not None:
                cycles += part.command.completion.cycles
        return cycles

    @property
    def statistics(self) -> CallStatistics:
        """What the call cost; complete after ``sync``."""
        return _Cost(self._parts, self._shape[0], self._sample).statistics

    def _fetch(self) -> None:
        """Take the rows of y that are there, and give their buffers back."""
        for part in self._parts:
            if not part.fetched and part.command.completion is not None:
                if part.command.error() is None:
                    if self._y is None:
                        self._y = np.zeros(self._shape, self._dtype)
                    self._y[part.first : part.first + part.count] = self._rows(part)
                part.fetched = True
            if part.fetched:
                part.command.give_back()

    def _rows(self, part: _Part) -> NDArray[Any]:
        """Return what a command has written."""
        raw = part.command.raw
        columns = self._columns
        if raw is None:
            raw = self._layer.device.transport.memory_read(
                part.y_address, self._dtype.itemsize * part.count * columns)
        rows = raw.view(self._dtype).reshape(part.count, columns)
        return rows if columns == self._shape[1] else rows[:, : self._shape[1]]

    def _result(self) -> Any:
        """Return y, when every command has succeeded."""
        parts = self._parts
        if len(parts) == 1 and parts[0].command.raw is not None:
            rows = self._rows(parts[0])
            flags = rows.flags
            return self._like(rows if flags.carray else rows.copy())
        self._fetch()
        y: NDArray[Any] = (
            np.zeros(self._shape, self._dtype) if self._y is None else self._y)
        return self._like(y)

    def _error(self) -> CommandFailed | None:
        """Return what went wrong first."""
        for part in self._parts:
            if (error := part.command.error()) is not None:
                return error
        return None

    def _abandon(self) -> None:
        """Give every buffer back as soon as its command is complete: nobody waits for it."""
        for part in self._parts:
            part.command.give_back()


class Layer(Bound, Closing):
    """What experts and linear layers have in common: images, a descriptor, calls in parts.

    ``d_in`` and ``d_out`` are the caller's; in memory x and y are filled up to whole blocks.
    """

    def __init__(self, device: Device, images: Allocation, descriptor: Allocation, *, d_in: int,
                 d_out: int, planes: int, grid_exponent: int, report: WeightReport,
                 opcode: Opcode, num_experts: int) -> None:
        self._device = device
        self._images: Any = images  # an allocation, or what stands in its place; None when closed
        self._descriptor = descriptor
        self._d_in, self._d_out = d_in, d_out
        self._columns = str(d_in)
        self._planes = planes
        self._grid_exponent = grid_exponent
        self._report = report
        self._layouts = Layouts(opcode, descriptor.address, d_in=d_in, d_out=d_out,
                                num_experts=num_experts)
        self._opcode, self._name, self._num_experts = opcode, opcode.name, num_experts
        self._calls, self._looks = 0, True
        self._last: _Cost | CallStatistics | None = None

    @property
    def device(self) -> Device:
        """Where it lives."""
        return self._device

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._images is None

    @property
    def coarsened(self) -> int:
        """Scales that the format's range within a row made coarser (docs/arithmetic.md)."""
        return self._report.coarsened

    @property
    def report(self) -> WeightReport:
        """What quantising the weights cost."""
        return self._report

    @property
    def grid_exponent(self) -> int:
        """Outputs are summed in units of ``2**grid_exponent``."""
        return self._grid_exponent

    @property
    def last(self) -> CallStatistics | None:
        """What the call cost whose result was taken last."""
        last = self._last
        if isinstance(last, _Cost):
            last = self._last = last.statistics
        return last

    def sync(self, handle: Handle, *, timeout_s: float | None = None) -> Any:
        """Wait for a call and return y.

        Parameters
        ----------
        handle : :class:`Handle`
            Of this layer's ``submit``; it can be used once.
        timeout_s : :class:`float`, optional
            For each of its commands; the device's when left out, 0: look once, do not wait.

        Returns
        -------
        tensor, (T, d_out)
            Kind, type and place are those of x.

        Raises
        ------
        DeviceTimeout
            If it takes too long; the handle can be used again.
        CommandFailed
            If the device reports an error; :class:`NonFiniteInput`, :class:`GridOverflow`, ...
        HandleConsumed
            If the handle is not one that this layer waits for.
        InvalidOption
            If ``timeout_s`` is no such number.
        """
        if not isinstance(handle, Handle):
            raise InvalidOption(
                f"handle must be what submit() returned, not {type(handle).__name__}")
        if handle._layer is not self:
            raise HandleConsumed("handle must be one that this layer's submit() returned")
        if timeout_s is not None:
            seconds("timeout_s", timeout_s)
        device = self._device
        if not handle._consumed:
            for part in handle._parts:
                device.wait(part.command, timeout_s=timeout_s)
                if part.command.raw is None:
                    with device._lock:
                        handle._fetch()
        with device._lock:
            if handle._consumed:
                raise HandleConsumed("handle must be used once; its result was already taken")
            error = handle._error()
            result = None if error else handle._result()
            self._last = _Cost(handle._parts, handle._shape[0], handle._sample)
            device._last_cycles = handle.cycles
            look = self._is_looked_at()
            handle._consumed = True
            handle._y = None
            for part in handle._parts:
                part.command.raw = None
        if look:  # others need not wait for it
            self._look_at_x(handle.statistics)
        if error is not None:
            raise error
        return result

    def _call(self, handle: Handle) -> Any:
        """Return the result of a call that nobody else has a handle of."""
        try:
            return self.sync(handle)
        except BaseException:
            handle._abandon()  # also while the traceback keeps it alive
            raise

    def close(self) -> None:
        """Wait for what is in flight and free the device memory; a second call does nothing."""
        device = self._device
        with device._lock:
            if self._images is None:
                return
            if not device.closed:
                self._drain()
                self._images.free()
                self._descriptor.free()
            self._images = None

    def _drain(self) -> None:
        """Wait for the commands in flight that compute with this layer.

        They are known by the descriptor: what stands for the images may be another object by now.
        """
        for command in self._device.in_flight:
            if self._descriptor in command.keep:
                self._device.wait(command)

    def _is_looked_at(self) -> bool:
        """Return whether this call's x is looked at: that of calls 1, 2, 4, 8, ..., so that it
        costs next to nothing."""
        self._calls += self._looks
        return self._looks and not self._calls & (self._calls - 1)

    def _look_at_x(self, last: CallStatistics) -> None:
        """Warn once if quantising x loses much."""
        report = last.activations
        if report is not None and report.warning:
            self._looks = False
            logger.warning("%s; %s", report.warning, "load the layer with activation_bits=16"
                           if self._planes == 1 else "scale x, or leave these experts to the host")

    # -- calls in parts ----------------------------------------------------------------------------
    def _check_x(self, x: Tensor) -> int:
        tokens, d_in = shape_of("x", x, "T", self._columns)
        if d_in != self._d_in:
            raise InvalidTensor(
                f"x must have the shape (T, {self._d_in}) of this layer, not {tuple(x.shape)}")
        return tokens

    def _submit(self, x: Tensor, ids: Tensor | None, weights: Tensor | None, tokens: int,
                top_k: int) -> Handle:
        """Cut a call into commands that fit the device, and send them."""
        io = io_type(x)
        handle = Handle(self, tokens, self._d_out, io, Like.of(x))
        if not (tokens and top_k):
            float32("x", x[:0])
            return handle
        config = self._device.config
        most = min(config.max_tokens, config.max_assignments // top_k)
        first = 0
        try:
            with self._device._lock:
                while first < tokens:
                    count = min(most, tokens - first)
                    rows, pairs, scores = x, ids, weights
                    if count < tokens:
                        part = slice(first, first + count)
                        rows = x[part]
                        pairs, scores = (None if value is None else value[part]
                                         for value in (ids, weights))
                    try:
                        if not self._send_beside(handle, first, count, top_k, io, rows, pairs,
                                                 scores):
                            self._send(handle, first, rows, pairs, scores)
                    except OutOfDeviceMemory:
                        most = count // 2
                        if not most:
                            raise
                    else:
                        first += count
            if handle._sample is None:
                step = sampling_step(tokens, io.bytes * self._d_in)
                handle._sample = step, np.array(elements("x", x[::step])), self._planes
        except BaseException:
            handle._abandon()
            raise
        return handle

    def _kept(self) -> tuple[Allocation, Allocation]:
        """Return what a command needs alive, whatever happens to handle and layer."""
        images = self._images
        if images is None:
            raise DeviceClosed("layer must not be used after it was closed; load it again")
        return images, self._descriptor

    def _send_beside(self, handle: Handle, first: int, tokens: int, top_k: int, io: ElementType,
                     x: Tensor, ids: Tensor | None, weights: Tensor | None) -> bool:
        """Send a command beside the rings and note it in the handle; False where none is free."""
        rings = self._device._room(self._name)
        shape = self._layouts.shape(tokens, top_k, io)
        side = rings.side(shape)
        if side is None:
            rings.take()  # what completed meanwhile makes room
            if (side := rings.side(shape)) is None:
                return False
        staged = shape.staged.get(side) or self._layouts.staged(
            shape, side, tokens, top_k, io, rings.staging, rings.workspace)
        staged.put(x, ids, weights)
        if handle._shape[0] == tokens:
            handle._sample = shape.step, staged.x[:: shape.step].copy(), self._planes
        command = Command(self._name, self._kept(), first_token=first)
        handle._parts.append(_Part(command, staged.place.reply.address, first, tokens))
        rings.submit_beside(staged.place, command)
        return True

    def _send(self, handle: Handle, first: int, x: Tensor, ids: Tensor | None,
              weights: Tensor | None) -> None:
        """Send a command in buffers of its own, and note it in the handle."""
        device = self._device
        kept = self._kept()
        inputs: list[NDArray[Any]] = [_whole_rows(elements("x", x))]
        tokens, top_k = len(inputs[0]), 1
        if ids is not None and weights is not None:
            inputs += [indices("ids", ids, self._num_experts), float32("weights", weights)]
            top_k = inputs[1].shape[1]
        io = element_type(inputs[0])
        y_elements = tokens * whole_blocks(self._d_out)
        at = offsets([*(array.nbytes for array in inputs), io.bytes * y_elements, 8 * y_elements])
        device._take()  # what completed meanwhile gives its buffers back
        device._handles.add(handle)
        buffers = device.memory.allocate(at[-1], top=True)
        command = Command(self._name, kept, buffers=buffers, first_token=first)
        try:
            data = np.zeros(at[len(inputs)], np.uint8)
            for array, offset in zip(inputs, at, strict=False):
                data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            base = buffers.address
            device.transport.memory_write(base, data)
            fields = {"opcode": int(self._opcode), "tokens": tokens, "top_k": top_k,
                      "x_type": io, "y_type": io,
                      "layer_address": self._descriptor.address, "x_address": base,
                      "y_address": base + at[-3], "workspace_address": base + at[-2]}
            if len(inputs) > 1:
                fields |= {"ids_address": base + at[1], "weights_address": base + at[2]}
            device.submit(fields, command)
            handle._parts.append(_Part(command, fields["y_address"], first, tokens))
        except BaseException:
            command.give_back()
            if command not in device.in_flight:
                buffers.free()
            raise


def _whole_rows(x: NDArray[Any]) -> NDArray[Any]:
    """Return x with its rows filled up with zeros to whole blocks."""
    tokens, d_in = x.shape
    if d_in == whole_blocks(d_in):
        return x
    filled = np.zeros((tokens, whole_blocks(d_in)), x.dtype)
    filled[:, :d_in] = x
    return filled

"""Layers in device memory: call them with tensors, or submit now and take the result later."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from moeaccel.arithmetic import from_bfloat16
from moeaccel.config import TOP_K_MAX
from moeaccel.formats import whole_blocks
from moeaccel.host.errors import (
    CommandFailed,
    DeviceClosed,
    HandleConsumed,
    InvalidOption,
    InvalidTensor,
    LimitExceeded,
    OutOfDeviceMemory,
)
from moeaccel.host.memory import COMMAND_ALIGNMENT, Allocation
from moeaccel.host.options import seconds
from moeaccel.host.process import Bound
from moeaccel.host.report import (
    ActivationReport,
    WeightReport,
    measure_activations,
    sample_rows,
)
from moeaccel.host.rings import Command
from moeaccel.host.tensors import (
    Like,
    Tensor,
    element_type,
    elements,
    float32,
    indices,
    shape_of,
)
from moeaccel.image import ExpertShape, LinearShape
from moeaccel.interface.commands import ElementType, Opcode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["CallStatistics", "Experts", "Handle", "Linear"]

logger = logging.getLogger(__name__)


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
    _sample: tuple[int, NDArray[np.float32], int] | None = field(
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
        return measure_activations(rows, planes, step=step)


@dataclass
class _Part:
    """One command of a call: rows ``[first, first + count)`` of x."""

    command: Command
    y_address: int
    first: int
    count: int
    fetched: bool = False


class Handle(Bound):
    """A call on its way, from ``submit``; ``sync`` takes its result, in any order.

    When it is dropped without ``sync``, its buffers go back once the device has finished with them.
    While it is kept they go back when the device's memory runs short: its result then waits here.
    """

    def __init__(self, layer: _Layer, x: NDArray[Any], d_out: int, like: Like) -> None:
        self._layer = layer
        self._parts: list[_Part] = []
        self._y = np.zeros((len(x), d_out), x.dtype)
        self._like = like
        self._sample: tuple[int, NDArray[np.float32], int] | None = None
        self._consumed = False

    @property
    def cycles(self) -> int:
        """Cycles of the commands whose results were taken: all of them after ``sync``."""
        return self.statistics.cycles

    @property
    def statistics(self) -> CallStatistics:
        """What the call cost; complete after ``sync``."""
        done = [part.command.completion for part in self._parts
                if part.fetched and part.command.completion is not None]
        return CallStatistics(sum(c.cycles for c in done), len(self._parts), len(self._y),
                              sum(c.underflows for c in done), self._sample)

    def _fetch(self) -> None:
        """Take the rows of y that are there, and give their buffers back."""
        for part in self._parts:
            if not part.fetched and part.command.completion is not None:
                if part.command.error() is None:
                    rows = self._y[part.first : part.first + part.count]
                    columns = whole_blocks(rows.shape[1])
                    raw = self._layer.device.transport.memory_read(
                        part.y_address, rows.itemsize * part.count * columns)
                    stored = raw.view(rows.dtype.newbyteorder("<")).reshape(-1, columns)
                    rows[:] = stored[:, : rows.shape[1]]
                part.fetched = True
            if part.fetched:
                part.command.give_back()

    def _error(self) -> CommandFailed | None:
        """Return what went wrong first."""
        return next(filter(None, (part.command.error() for part in self._parts)), None)

    def _abandon(self) -> None:
        """Give every buffer back as soon as its command is complete: nobody waits for it."""
        for part in self._parts:
            part.command.give_back()


class _Layer(Bound):
    """What experts and linear layers have in common: images, a descriptor, calls in parts.

    ``d_in`` and ``d_out`` are the caller's; in memory x and y are filled up to whole blocks.
    """

    def __init__(self, device: Device, images: Allocation, descriptor: Allocation, *, d_in: int,
                 d_out: int, planes: int, grid_exponent: int, report: WeightReport) -> None:
        self._device = device
        self._images: Allocation | None = images
        self._descriptor = descriptor
        self._d_in, self._d_out = d_in, d_out
        self._planes = planes
        self._grid_exponent = grid_exponent
        self._report = report
        self._calls, self._looks = 0, True
        self._last: CallStatistics | None = None

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
        return self._last

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
        with device._lock:
            if handle._consumed:
                raise HandleConsumed("handle must be used once; its result was already taken")
            for part in handle._parts:
                device.wait(part.command, timeout_s=timeout_s)
                handle._fetch()
            self._last = handle.statistics
            device._last_cycles = handle.cycles
            error = handle._error()
            result = None if error else handle._like(handle._y)
            last, look = self._last, self._is_looked_at()
            handle._consumed = True
        if look:  # others need not wait for it
            self._look_at_x(last)
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
                for command in device.in_flight:
                    if self._images in command.keep:
                        device.wait(command)
                self._images.free()
                self._descriptor.free()
            self._images = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()

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
        tokens, d_in = shape_of("x", x, "T", str(self._d_in))
        if d_in != self._d_in:
            raise InvalidTensor(
                f"x must have the shape (T, {self._d_in}) of this layer, not {tuple(x.shape)}")
        return tokens

    def _submit(self, opcode: Opcode, x: NDArray[Any], ids: NDArray[np.int32],
                weights: NDArray[np.float32], like: Like) -> Handle:
        """Cut a call into commands that fit the device, and send them."""
        handle = Handle(self, x, self._d_out, like)
        top_k = ids.shape[1]
        if not top_k:
            return handle
        if len(x):
            step, rows = sample_rows(x)
            if element_type(rows) is ElementType.BFLOAT16:
                rows = from_bfloat16(rows)
            handle._sample = step, rows, self._planes
        x = _whole_rows(x)
        config = self._device.config
        most = min(config.max_tokens, config.max_assignments // top_k)
        first = 0
        try:
            with self._device._lock:
                self._device._handles.add(handle)
                while first < len(x):
                    rows = slice(first, min(first + most, len(x)))
                    try:
                        self._send(handle, opcode, first, x[rows], ids[rows], weights[rows])
                    except OutOfDeviceMemory:
                        most = (rows.stop - first) // 2
                        if not most:
                            raise
                    else:
                        first = rows.stop
        except BaseException:
            handle._abandon()
            raise
        return handle

    def _send(self, handle: Handle, opcode: Opcode, first: int, x: NDArray[Any],
              ids: NDArray[np.int32], weights: NDArray[np.float32]) -> None:
        """Send one command of a call, and note it in the handle."""
        device = self._device
        images = self._images
        if images is None:
            raise DeviceClosed("layer must not be used after it was closed; load it again")
        tokens, top_k = ids.shape
        inputs = [x, ids, weights] if opcode is Opcode.EXPERTS else [x]
        y_elements = tokens * whole_blocks(self._d_out)
        sizes = [array.nbytes for array in inputs] + [x.itemsize * y_elements, 8 * y_elements]
        offsets = list(_offsets(sizes))
        device._take()  # what completed meanwhile gives its buffers back
        buffers = device.memory.allocate(offsets[-1] + sizes[-1], top=True)
        # The command keeps buffers and weights alive, whatever happens to handle and layer.
        command = Command(opcode.name, (images, self._descriptor), buffers=buffers,
                          first_token=first)
        try:
            data = np.zeros(offsets[len(inputs)], np.uint8)
            for array, offset in zip(inputs, offsets, strict=False):
                data[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            base = buffers.address
            device.transport.memory_write(base, data)
            io = element_type(x)
            fields = {"opcode": int(opcode), "tokens": tokens, "top_k": top_k,
                      "x_type": io, "y_type": io,
                      "layer_address": self._descriptor.address, "x_address": base,
                      "y_address": base + offsets[-2], "workspace_address": base + offsets[-1]}
            if opcode is Opcode.EXPERTS:
                fields |= {"ids_address": base + offsets[1], "weights_address": base + offsets[2]}
            device.submit(fields, command)
            handle._parts.append(_Part(command, fields["y_address"], first, tokens))
        except BaseException:
            command.give_back()
            if command not in device.in_flight:
                buffers.free()
            raise


def _offsets(sizes: list[int]) -> Iterator[int]:
    """Yield the aligned offset of each buffer when they follow one another."""
    offset = 0
    for size in sizes:
        yield offset
        offset += -(-size // COMMAND_ALIGNMENT) * COMMAND_ALIGNMENT


def _whole_rows(x: NDArray[Any]) -> NDArray[Any]:
    """Return x with its rows filled up with zeros to whole blocks."""
    tokens, d_in = x.shape
    if d_in == whole_blocks(d_in):
        return x
    filled = np.zeros((tokens, whole_blocks(d_in)), x.dtype)
    filled[:, :d_in] = x
    return filled


class Experts(_Layer):
    """The experts of one layer in device memory; from :meth:`Device.load_experts`.

    ``y[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t])``, plus that of all shared
    experts, which have the last entries of the table: every token has a pair with each, of weight
    1. That is 8 bytes more a token and expert, and the device knows no difference.
    """

    def __init__(self, device: Device, shapes: Sequence[ExpertShape], images: Allocation,
                 descriptor: Allocation, planes: int, grid_exponent: int,
                 report: WeightReport, shared: int = 0) -> None:
        d_model = shapes[0].d_model
        super().__init__(device, images, descriptor, d_in=d_model, d_out=d_model, planes=planes,
                         grid_exponent=grid_exponent, report=report)
        routed = len(shapes) - shared
        self._shapes, self._shared_shapes = tuple(shapes[:routed]), tuple(shapes[routed:])

    @property
    def shapes(self) -> tuple[ExpertShape, ...]:
        """Formats, dimensions and activation of each expert; the dimensions are the caller's."""
        return self._shapes

    @property
    def shared_shapes(self) -> tuple[ExpertShape, ...]:
        """Those of each shared expert."""
        return self._shared_shapes

    @property
    def shape(self) -> ExpertShape:
        """The shape of every expert.

        Raises
        ------
        InvalidOption
            If they differ, see :attr:`shapes`.
        """
        found = set(self._shapes)
        if len(found) > 1:
            raise InvalidOption(f"shape must be that of all experts, but there are {len(found)}; "
                                "ask for shapes")
        return self._shapes[0]

    @property
    def num_experts(self) -> int:
        """Number of experts, without the shared ones."""
        return len(self._shapes)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Any:
        """Return y, (T, H); see :meth:`submit` and :meth:`sync`."""
        return self._call(self.submit(x, ids, weights))

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor) -> Handle:
        """Send a call to the device and return a handle for :meth:`sync`.

        The call is cut into as many commands as the device's limits on tokens and assignments, and
        its free memory, ask for. When ring or memory is full this waits for room.

        Parameters
        ----------
        x : float tensor, (T, H)
            Any T, also 0. A torch tensor in bfloat16 goes to the device as it is, and y comes back
            so, rounded once; all else goes and comes as float32.
        ids : integer tensor, (T, K)
            Experts of each token, at most 16 with the shared ones; those below 0 or from E on are
            skipped.
        weights : float tensor, (T, K)

        Raises
        ------
        InvalidTensor, LimitExceeded
            Before anything is sent.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        tokens = self._check_x(x)
        shape = shape_of("ids", ids, "T", "K")
        if shape[0] != tokens:
            raise InvalidTensor(f"ids must have the shape (T, K) with T = {tokens}, not {shape}")
        shared = len(self._shared_shapes)
        if shape[1] + shared > TOP_K_MAX:
            raise LimitExceeded(
                f"ids must have at most {TOP_K_MAX - shared} experts for each token, not "
                f"{shape[1]}" + (f": {shared} of {TOP_K_MAX} are shared" if shared else ""))
        found = shape_of("weights", weights, "T", "K")
        if found != shape:
            raise InvalidTensor(f"weights must have the shape of ids, {shape}, not {found}")
        pairs, scores = indices("ids", ids, self.num_experts), float32("weights", weights)
        if shared:
            always = np.arange(shared, dtype=np.int32) + self.num_experts
            pairs = np.hstack([pairs, np.tile(always, (tokens, 1))])
            scores = np.hstack([scores, np.ones((tokens, shared), np.float32)])
        return self._submit(Opcode.EXPERTS, elements("x", x), pairs, scores, Like.of(x))


class Linear(_Layer):
    """A linear layer in device memory, ``y = x W^T``; from :meth:`Device.load_linear`."""

    def __init__(self, device: Device, shape: LinearShape, images: Allocation,
                 descriptor: Allocation, planes: int, grid_exponent: int,
                 report: WeightReport) -> None:
        super().__init__(device, images, descriptor, d_in=shape.d_in, d_out=shape.d_out,
                         planes=planes, grid_exponent=grid_exponent, report=report)
        self._shape = shape

    @property
    def shape(self) -> LinearShape:
        """Format and dimensions, the caller's."""
        return self._shape

    def __call__(self, x: Tensor) -> Any:
        """Return y, (T, N); see :meth:`submit` and :meth:`sync`."""
        return self._call(self.submit(x))

    def submit(self, x: Tensor) -> Handle:
        """Send a call to the device and return a handle for :meth:`sync`.

        Parameters
        ----------
        x : float tensor, (T, K)
            Any T, also 0. bfloat16 as in :meth:`Experts.submit`.

        Raises
        ------
        InvalidTensor
            Before anything is sent.
        OutOfDeviceMemory
            If not even the buffers of one token fit.
        """
        tokens = self._check_x(x)
        ids = np.zeros((tokens, 1), np.int32)
        return self._submit(Opcode.GEMM, elements("x", x), ids, ids.astype(np.float32), Like.of(x))

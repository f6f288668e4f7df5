"""A device: load weights into its memory, run commands, read its counters."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from moeaccel.closing import Closing
from moeaccel.config import AcceleratorConfig
from moeaccel.host import weights
from moeaccel.host.calls import Pending
from moeaccel.host.errors import (
    DeviceClosed,
    DeviceStopped,
    DeviceTimeout,
    HostError,
    InvalidOption,
    LinkLost,
)
from moeaccel.host.identity import check_config, check_version
from moeaccel.host.layers import Experts, Handle, Linear
from moeaccel.host.memory import COMMAND_ALIGNMENT, PAGE, Allocator
from moeaccel.host.moe import Routes
from moeaccel.host.options import seconds, whole
from moeaccel.host.prefetch import Prefetches
from moeaccel.host.process import Bound, Inherited
from moeaccel.host.registers import RegisterAccess, fields_of, mask
from moeaccel.host.residents import Residents
from moeaccel.host.rings import Command, CommandRings, Completion
from moeaccel.host.stacks import Stack
from moeaccel.host.tensors import Tensor
from moeaccel.host.transports.base import Transport
from moeaccel.host.weights import Format, Formats, Progress, Shared
from moeaccel.image import Expert
from moeaccel.interface.commands import Opcode

__all__ = ["Command", "Device"]

logger = logging.getLogger(__name__)

_SPURIOUS_INTERRUPTS = 64

_LOOKS_A_CHECK, _EAGER_LOOKS, _PAUSE_S = 64, 1000, 2e-5
"""When polling: how often errors are looked for, and pauses of what takes longer than some looks,
a millisecond on a card."""


class Device(Routes, Prefetches, Bound, Closing, Inherited):
    """An accelerator behind a transport; see :func:`moeaccel.host.open_device`.

    Every method may be called from several threads: a lock lets one at a time through. A thread
    that waits for a result does not hold it, so that others submit meanwhile; but where the
    transport serves one thread at a time (:attr:`Transport.waits_beside`) it does, unless it polls.

    Every method may be interrupted by an exception (Ctrl-C, a signal's handler, a callback) at any
    moment: the next call works, and nothing is lost but the interrupted call's own result. A
    process that was forked finds the device closed; it cannot be copied or pickled.

    Parameters
    ----------
    transport : :class:`Transport`
        Closed with the device.
    config : :class:`AcceleratorConfig`
        What the device was built from.
    timeout_s : :class:`float`
        How long a wait for a completion may take, more than 0.
    ring_log2 : :class:`int`
        log2 of the entries of the command rings, 1 to 8: all but one may be in flight.
    watchdog_cycles : :class:`int`
        Cycles without progress until the device ends a command by itself; 0: never.
    polling : :class:`bool`
        Ask the device again and again whether a command has completed, instead of waiting for its
        interrupt: some microseconds sooner, and a core is busy with it.

    Raises
    ------
    DeviceNotFound
        If ID or VERSION is not that of a device that this driver knows.
    ConfigMismatch
        If CONFIG_HASH is not that of ``config``.
    """

    def __init__(self, transport: Transport, config: AcceleratorConfig, *, timeout_s: float = 30.0,
                 ring_log2: int = 4, watchdog_cycles: int = 1 << 24, polling: bool = False) -> None:
        if not isinstance(polling, bool):
            raise InvalidOption(f"polling must be True or False, not {polling!r}")
        if not (timeout_s := seconds("timeout_s", timeout_s)):
            raise InvalidOption("timeout_s must be more than 0 seconds, not 0; a single sync() may "
                                "have 0, not to wait")
        watchdog_cycles = whole("watchdog_cycles", watchdog_cycles, least=0, most=(1 << 32) - 1)
        ring_log2 = whole("ring_log2", ring_log2, least=1, most=8)
        if not PAGE < transport.memory_bytes <= 1 << config.address_bits:
            raise InvalidOption(
                f"memory_bytes must be more than {PAGE} and fit {config.address_bits} address "
                f"bits, not {transport.memory_bytes:,}")
        self._transport: Transport | None = transport
        self._why_closed = "it was closed, open it again"
        self._config = config
        self._timeout_s = timeout_s
        self._watchdog_cycles = watchdog_cycles
        self._polling, self._waits_beside = polling, transport.waits_beside
        self._registers = RegisterAccess(transport)
        self._lock = threading.RLock()
        self._handles: weakref.WeakSet[Handle | Pending] = weakref.WeakSet()
        self._resetting = False
        self._last_cycles = 0
        check_version(self._registers)
        check_config(self._registers, config)
        # Every channel has the same addresses, and one owner for each: images use them on all
        # channels, all else on channel 0. Address 0 belongs to nobody: a forgotten address is then
        # a window violation.
        size = (transport.memory_bytes - PAGE) // COMMAND_ALIGNMENT * COMMAND_ALIGNMENT
        self._residents = Residents(
            transport, [config.device_address(channel, 0) for channel in range(config.channels)])
        self._memory = Allocator(PAGE, size, before_use=self._forget)
        self._rings = CommandRings(transport, self._memory, entries_log2=ring_log2,
                                   polling=polling)
        self._memory.make_room = self._make_room  # there is none to make before there are rings
        self.reset()
        Inherited.__init__(self)

    # -- properties --------------------------------------------------------------------------------
    @property
    def config(self) -> AcceleratorConfig:
        """What the device was built from."""
        return self._config

    @property
    def transport(self) -> Transport:
        """The way to the device.

        Raises
        ------
        DeviceClosed
            After :meth:`close`.
        """
        return self._check_open()

    def _check_open(self) -> Transport:
        if self._transport is None:
            raise DeviceClosed(f"device must be open; {self._why_closed}")
        return self._transport

    def _check_ready(self) -> None:
        """Check that it is open, and finish a reset that was interrupted."""
        self._check_open()
        if self._resetting:
            self.reset()

    def _forked(self) -> None:
        self._orphan, self._transport = self._transport, None  # not closed: it is the parent's
        self._lock = threading.RLock()  # the thread that held it is not in this process
        self._why_closed = ("it belongs to the process that opened it, of which this one is a "
                            "fork; open another one here, or start processes by 'spawn'")

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, or this process is a fork of the device's."""
        return self._transport is None

    @property
    def memory(self) -> Allocator:
        """The device's memory."""
        return self._memory

    @property
    def last_cycles(self) -> int:
        """Cycles of the call whose result was taken last."""
        return self._last_cycles

    @property
    def total_cycles(self) -> int:
        """Cycles of every completion taken since the device was opened."""
        return self._rings.cycles

    @property
    def in_flight(self) -> tuple[Command, ...]:
        """Commands that were sent and whose completion was not taken yet, oldest first."""
        return self._rings.commands

    # -- weights -----------------------------------------------------------------------------------
    def load_experts(self, gate_up: Stack, down: Stack, *, activation: str = "silu",
                     gated: bool = True, limit: float | None = None,
                     limit_behind: bool = False, second_up: bool = False,
                     weight_format: Formats = "int4_g32", activation_bits: int = 16,
                     grid_exponent: int | None = None, x_rms: float = 1.0,
                     progress: Progress | None = None, quantiser: str = "search",
                     calibration: tuple[Tensor, Tensor] | None = None,
                     prune: str | None = None, row_blocks: int = 1,
                     gate_up_bias: Stack | None = None, down_bias: Stack | None = None,
                     shared: Shared | None = None, shared_format: Format | None = None,
                     identity: int = 0) -> Experts:
        """Quantise the experts of one layer and put them into the device's memory.

        Parameters
        ----------
        gate_up : float tensor, (E, 2 I, H)
            Gate rows, then up rows, of each expert; (E, I, H) if not ``gated``. Or a sequence of E
            matrices, taken one by one. Any H and I: memory holds them filled up with zeros to
            multiples of 32.
        down : float tensor, (E, H, I)
            Or a sequence of E matrices.
        activation : :class:`str`
            One of :data:`moeaccel.activations.ACTIVATIONS`.
        gated : :class:`bool`
            h = activation(gate) * up; else there are no up rows, and h = activation(gate).
        limit : :class:`float`, optional
            Gate rows are at most that before the activation, and up rows at most that far from 0;
            a number with at most 8 significant bits. ``limit_behind``: not gate, its activation.
        second_up : :class:`bool`
            gate_up is (E, 3 I, H): h = activation(gate) * up * second up (OpenMoE).
        weight_format : :class:`str`, or a sequence of str
            One of :data:`moeaccel.formats.ALL_FORMATS`, or one for each expert. Where gate and up
            have another format than down, or experts other widths I, see :meth:`load_quantised`.
        activation_bits : :class:`int`
            8 or 16.
        grid_exponent : :class:`int`, optional
            Outputs are summed on a grid of ``2**grid_exponent``, from -100 to 60; weighted outputs
            below ``2**(grid_exponent + 43)`` fit. When left out, :mod:`moeaccel.grid` chooses it
            from the weights: outputs ``2**-16`` times the typical one keep a relative error of
            ``2**-10``, those up to ``2**16`` times the typical one fit. Read it as
            ``experts.grid_exponent``.
        x_rms : :class:`float`
            Root mean square of the elements of x for which it is chosen.
        progress : callable, optional
            Called with (experts uploaded, experts in all).
        quantiser : :class:`str`
            ``"search"``: scales of little squared error. ``"amax"``: from each group's largest
            magnitude alone. ``"gptq"``: error feedback, which asks for a calibration and takes
            seconds an expert. See :mod:`moeaccel.formats.quantisers`.
        calibration : pair of tensors, optional
            x, (T, H), and ids, (T, K), of tokens that went through this layer: what quantising
            makes worse is then counted by the inputs that the weights meet.
        prune : :class:`str`, optional
            For N:M formats (``int4_g32+2:4``): ``"magnitude"`` makes their pattern, and the error
            of ``experts.report`` is with what that costs. When left out weights must have it: in
            4-bit formats a gate row and its up row have one together, and so have rows r and r +
            channels of down, where ``r // channels`` is even. Refused where no format has one.
        row_blocks : :class:`int`
            Blocks into which the hidden rows of each expert are cut, a divisor of I. A call may
            then take the leading ones only (``leading_blocks=``), and pays for no others; rows
            should be in the order of their importance. Each block is an expert of the device, with
            a rounding of its own; biases of down are the first one's.
        gate_up_bias : float tensor, (E, 2 I), optional
            Added to gate and up rows before anything else is done with them; (E, I) if not
            ``gated``. Or a sequence of E vectors. They become bfloat16.
        down_bias : float tensor, (E, H), optional
            Added to an expert's output, before its routing weight.
        shared : pair of float tensors, or a sequence of pairs, optional
            gate_up, (2 I', H), and down, (H, I'), of a shared expert, or a dense MLP parallel to
            the experts: every token goes through it, with weight 1, in the same command. I' may
            differ from I; activation, limit and ``gated`` are those of all. Each takes one of a
            token's 16 places.
        shared_format : :class:`str`, optional
            Its weight format, where it is not that of the experts.
        identity : :class:`int`
            So many identity experts: ids from E on add their weight times x, as the device has
            quantised it (``activation_bits``). They are one matrix, of H times H / 2 bytes in
            ``mxfp4``, which is read for as many tokens as a pass takes.

        Raises
        ------
        InvalidOption, LimitExceeded
            Before anything is sent.
        InvalidTensor, FormatError
            Before anything is sent: for the shapes of stacks, or of expert 0 in a sequence, and for
            a format or an activation that there is not, or that the device has not. As experts are
            taken, one by one: for the shapes of later ones, and for types or values that cannot be
            quantised, NaN for one. The experts before it have been sent then; their memory is free
            again, and as long as nothing else takes its place, loading them again there sends them
            no second time.
        OutOfDeviceMemory
            If the images do not fit.
        UploadError
            If an image does not read back.
        """
        return weights.load_experts(
            self, gate_up, down, activation=activation, gated=gated, limit=limit,
            limit_behind=limit_behind, second_up=second_up, weight_format=weight_format,
            activation_bits=activation_bits, grid_exponent=grid_exponent, x_rms=x_rms,
            progress=progress, quantiser=quantiser, calibration=calibration, prune=prune,
            row_blocks=row_blocks, gate_up_bias=gate_up_bias, down_bias=down_bias, shared=shared,
            shared_format=shared_format, identity=identity)

    def load_quantised(self, experts: Sequence[Expert], *, activation: str | None = None,
                       activation_bits: int = 16, grid_exponent: int | None = None,
                       x_rms: float = 1.0, progress: Progress | None = None,
                       shared: Sequence[Expert] = (), identity: int = 0) -> Experts:
        """Put experts that are quantised already into memory.

        Parameters
        ----------
        experts : sequence of :class:`moeaccel.image.Expert`
            All of one d_model; they may differ in all else. Rows of ``gate_up`` alternate: g0, u0,
            g1, u1, ... (:func:`moeaccel.image.interleave_gate_up`), other than in
            :meth:`load_experts`; :meth:`moeaccel.image.Expert.quantise` makes them so.
        activation : :class:`str`, optional
            Of all experts, instead of their own.
        shared : sequence of :class:`moeaccel.image.Expert`
            Every token goes through them, with weight 1.
        identity : :class:`int`
            As in :meth:`load_experts`.

        See :meth:`load_experts` for the rest; the grid is chosen from the quantised weights. Those
        of a file (:func:`moeaccel.host.importers.open_quantised`) go as its images, unless these
        are for another array, and have the grid of the checkpoint's weights.

        Raises
        ------
        FormatError
            If an integer, a scale or an exponent is none that the format has, or an array has
            another type or shape; before anything is sent.
        """
        return weights.load_quantised(
            self, experts, activation=activation, activation_bits=activation_bits,
            grid_exponent=grid_exponent, x_rms=x_rms, progress=progress, shared=shared,
            identity=identity)

    def load_linear(self, weight: Tensor, *, weight_format: str = "int4_g32",
                    activation_bits: int = 16, grid_exponent: int | None = None,
                    x_rms: float = 1.0, quantiser: str = "search",
                    prune: str | None = None, bias: Tensor | None = None) -> Linear:
        """Quantise the matrix of a linear layer, (N, K) float, and put it into memory, with a bias,
        (N,), if there is one.

        See :meth:`load_experts`.
        """
        return weights.load_linear(
            self, weight, weight_format=weight_format, activation_bits=activation_bits,
            grid_exponent=grid_exponent, x_rms=x_rms, quantiser=quantiser, prune=prune, bias=bias)

    def _forget(self, address: int, size: int) -> None:
        with self._lock:
            self._residents.forget(address, size)

    # -- commands ----------------------------------------------------------------------------------
    def submit(self, values: Mapping[str, int], command: Command) -> Command:
        """Send a command, waiting for room in the ring; what it is made of is the caller's affair.

        Parameters
        ----------
        values : mapping
            Fields of :data:`moeaccel.interface.commands.SUBMISSION`; the tag is chosen here.
        command : :class:`Command`
            What to complete, returned.

        Raises
        ------
        DeviceTimeout
            If no room comes.
        """
        with self._lock:
            self._room(command.name).submit(values, command)
            return command

    def _room(self, name: str) -> CommandRings:
        """Return the rings, ready, when they have room for a command."""
        if self._transport is None or self._resetting:
            self._check_ready()
        while self._rings.full:
            # Taking may also find that an interrupted submission never rang.
            if not self._take() and self._rings.full:
                self._wait_for_progress(f"room in the submission ring for {name}",
                                        self._timeout_s)
        return self._rings

    def wait(self, command: Command, *, timeout_s: float | None = None) -> Completion:
        """Wait until a command has completed, whatever its status.

        Parameters
        ----------
        command : :class:`Command`
        timeout_s : :class:`float`, optional
            The device's when left out; 0: look once, do not wait.

        Raises
        ------
        DeviceTimeout
            If it does not; the command stays in flight.
        DeviceStopped
            If the device has stopped, see there.
        InvalidOption
            If ``timeout_s`` is no such number.
        """
        timeout_s = self._timeout_s if timeout_s is None else seconds("timeout_s", timeout_s)
        if command.completion is None:
            with self._lock:
                self._check_ready()
                if command.completion is None and not self._rings.announced:
                    self._take()
        while command.completion is None:
            self._wait_for_progress(f"completion of {command.name}", timeout_s, command)
        return command.completion

    def fence(self) -> None:
        """Wait until everything submitted before has completed."""
        command = self.submit({"opcode": Opcode.FENCE}, Command("FENCE"))
        self.wait(command)
        if error := command.error():
            raise error

    def _take(self) -> bool:
        """Take the completions that are there; return whether there were any."""
        self._check_ready()
        return bool(self._rings.take())

    def _make_room(self) -> bool:
        """Get device memory back that need not be held; return whether there was any."""
        with self._lock:
            free = self._memory.free_bytes
            self._take()
            for handle in list(self._handles):
                handle._fetch()
            if self._memory.free_bytes > free:
                return True
            if self._rings.in_flight:
                self._wait_for_progress("room in the device's memory", self._timeout_s)
                return True
            gc.collect()  # what was dropped may hold itself
            return self._memory.free_bytes > free

    def _wait_for_progress(self, what: str, timeout_s: float,
                           command: Command | None = None) -> None:
        """Wait for at least one completion, or that of a command."""
        if self._polling:
            if self._polled(timeout_s, command):
                return
        else:
            for _ in range(_SPURIOUS_INTERRUPTS):
                if not self._interrupted(timeout_s):
                    break
                with self._lock:
                    if command is not None and command.completion is not None:
                        return  # another thread took it
                    self._check_ready()
                    # Clear first, look second: what completes in between raises it again.
                    if self._rings.interrupted():
                        return
                    self._check_running()
        with self._lock:
            if self._take() or (command is not None and command.completion is not None):
                return  # completed, but the interrupt got lost
            self._check_running()
            raise DeviceTimeout(
                f"{what} must come within {timeout_s:g} s, but did not; {self._state()}; call "
                "device.reset(), or open the device with a larger timeout_s")

    def _interrupted(self, timeout_s: float) -> bool:
        """Wait for the interrupt; without the lock where the transport allows it."""
        transport = self._check_open()
        if self._waits_beside:
            return transport.wait_interrupt(timeout_s)
        with self._lock:
            return self._check_open().wait_interrupt(timeout_s)

    def _polled(self, timeout_s: float, command: Command | None) -> bool:
        """Ask until something has completed and return True, or False when the time is over."""
        end = time.monotonic() + timeout_s
        looks = 0
        while True:
            with self._lock:
                if self._take() or (command is not None and command.completion is not None):
                    return True
                looks += 1
                if not looks % _LOOKS_A_CHECK:
                    self._check_running()
            if time.monotonic() >= end:
                return False
            if looks > _EAGER_LOOKS:
                time.sleep(_PAUSE_S)

    def _check_running(self) -> None:
        if value := self._registers.read("ERROR_STATUS"):
            errors = fields_of("ERROR_STATUS", value)
            raise DeviceStopped(
                f"device must run, but has stopped: ERROR_STATUS is {value:#x} "
                f"({', '.join(errors)}); were rings or window changed, or is memory smaller than "
                "the device was told? call device.reset()", errors)

    def _state(self) -> str:
        status = self._registers.read("STATUS")
        busy = ", ".join(fields_of("STATUS", status))
        return (f"STATUS is {status:#x} ({busy or 'idle'}), SQ_HEAD "
                f"{self._registers.read('SQ_HEAD')} of SQ_TAIL {self._registers.read('SQ_TAIL')}")

    # -- control -----------------------------------------------------------------------------------
    def counters(self) -> dict[str, int]:
        """Return the event counters of :data:`moeaccel.interface.registers.COUNTERS` by name."""
        with self._lock:
            self._check_ready()
            return self._registers.counters()

    def abort(self) -> None:
        """End the running command: taking its result raises :class:`CommandAborted`."""
        with self._lock:
            self._check_ready()
            self._registers.write("CONTROL", mask("CONTROL", "abort"))

    def reset(self) -> None:
        """Bring the device back to its first state; weights in its memory stay, counters are 0.

        Commands in flight are dropped: taking their results raises :class:`CommandAborted`.

        Raises
        ------
        DeviceTimeout
            If the device does not finish its reset.
        """
        with self._lock:
            self.transport.reconnect()
            done = mask("IRQ_STATUS", "reset_done")
            everything = done | mask("IRQ_STATUS", "completion")
            registers = self._registers
            transport = self.transport
            self._resetting = True  # until it has gone through, whoever comes next begins with it
            registers.write("ENABLE", 0)
            registers.write("IRQ_ENABLE", done)
            registers.write("ERROR_ENABLE", 0)
            registers.write("IRQ_STATUS", everything)
            registers.write("CONTROL", mask("CONTROL", "soft_reset"))
            if not (transport.wait_interrupt(self._timeout_s)
                    or registers.read("IRQ_STATUS") & done):
                raise DeviceTimeout(
                    f"soft reset must finish within {self._timeout_s:g} s, but did not; "
                    f"{self._state()}; switch the device off and on")
            self._rings.reset()
            self._may_hold = False
            registers.write64("WINDOW_BASE", PAGE)
            registers.write64("WINDOW_LIMIT", PAGE + self._memory.size)
            registers.write("WATCHDOG", self._watchdog_cycles)
            registers.write("IRQ_STATUS", everything)
            registers.write("ERROR_STATUS", mask("ERROR_STATUS"))
            registers.write("IRQ_ENABLE",
                            0 if self._polling else mask("IRQ_ENABLE", "completion"))
            registers.write("ERROR_ENABLE", mask("ERROR_ENABLE"))
            registers.write("ENABLE", 1)
            self._resetting = False

    def close(self) -> None:
        """Stop the device and let it go; a second call does nothing."""
        with self._lock:
            if self._transport is None:
                return
            transport = self._transport
            try:
                if self._rings.in_flight:
                    with contextlib.suppress(HostError):
                        self.reset()
                with contextlib.suppress(LinkLost):
                    self._registers.write("ENABLE", 0)
            finally:
                self._rings.drop()
                try:
                    transport.close()
                finally:
                    self._transport = None

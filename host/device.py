"""A device: open it, load weights into its memory, run commands, read its counters."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from moeaccel.commands import Opcode, Status
from moeaccel.config import AcceleratorConfig, preset
from moeaccel.host import weights
from moeaccel.host.errors import (
    CommandFailed,
    DeviceClosed,
    DeviceTimeout,
    HostError,
    InvalidOption,
    LinkLost,
    UnsupportedTransport,
    command_error,
)
from moeaccel.host.identity import check_config, check_version
from moeaccel.host.layers import Experts, Linear
from moeaccel.host.memory import COMMAND_ALIGNMENT, PAGE, Allocator
from moeaccel.host.registers import RegisterAccess, mask
from moeaccel.host.residents import Residents
from moeaccel.host.rings import CommandRings, Completion
from moeaccel.host.tensors import Tensor
from moeaccel.host.transports.base import Transport
from moeaccel.host.weights import Progress, Stack
from moeaccel.image import (
    Expert,
)

if TYPE_CHECKING:
    from moeaccel.host.transports.xdma import XdmaTransport

__all__ = ["Command", "Device", "open_device"]

logger = logging.getLogger(__name__)

_SPURIOUS_INTERRUPTS = 64


class Command:
    """A command on its way: what it is, what it needs alive, and how it ended.

    Parameters
    ----------
    name : :class:`str`
        For messages.
    keep : sequence
        Whatever must stay in device memory until it has completed.
    first_token : :class:`int`
        Row of the caller's x that is this command's first token.
    """

    def __init__(self, name: str, keep: Sequence[object] = (), *, first_token: int = 0) -> None:
        self.name = name
        self.keep = keep
        self.first_token = first_token
        self.completion: Completion | None = None

    def error(self) -> CommandFailed | None:
        """Return why it failed; None if it succeeded or is not complete."""
        done = self.completion
        if done is None or done.status == Status.OK:
            return None
        return command_error(done.status, done.detail, done.address, first_token=self.first_token)


class Device:
    """An accelerator behind a transport; see :func:`open_device`.

    Every method may be called from several threads: a lock lets one at a time through. A thread
    that waits for a result holds the lock; the device executes commands in order anyway.

    Parameters
    ----------
    transport : :class:`Transport`
        Closed with the device.
    config : :class:`AcceleratorConfig`
        What the device was built from.
    timeout_s : :class:`float`
        How long a wait for a completion may take.
    ring_log2 : :class:`int`
        log2 of the entries of the command rings, 1 to 8: all but one may be in flight.
    watchdog_cycles : :class:`int`
        Cycles without progress until the device ends a command by itself; 0: never.

    Raises
    ------
    DeviceNotFound
        If ID or VERSION is not that of a device that this driver knows.
    ConfigMismatch
        If CONFIG_HASH is not that of ``config``.
    """

    def __init__(self, transport: Transport, config: AcceleratorConfig, *, timeout_s: float = 30.0,
                 ring_log2: int = 4, watchdog_cycles: int = 1 << 24) -> None:
        if not timeout_s > 0:
            raise InvalidOption(f"timeout_s must be more than 0 seconds, not {timeout_s}")
        if not 0 <= watchdog_cycles < 1 << 32:
            raise InvalidOption(f"watchdog_cycles must fit 32 bits, not {watchdog_cycles}")
        if not PAGE < transport.memory_bytes <= 1 << config.address_bits:
            raise InvalidOption(
                f"memory_bytes must be more than {PAGE} and fit {config.address_bits} address "
                f"bits, not {transport.memory_bytes:,}")
        self._transport: Transport | None = transport
        self._config = config
        self._timeout_s = timeout_s
        self._watchdog_cycles = watchdog_cycles
        self._registers = RegisterAccess(transport)
        self._lock = threading.RLock()
        self._pending: dict[int, Command] = {}
        self._last_cycles = 0
        self._total_cycles = 0
        check_version(self._registers)
        check_config(self._registers, config)
        # Every channel has the same addresses, and one owner for each: images use them on all
        # channels, all else on channel 0. Address 0 belongs to nobody: a forgotten address is then
        # a window violation.
        size = (transport.memory_bytes - PAGE) // COMMAND_ALIGNMENT * COMMAND_ALIGNMENT
        self._residents = Residents(
            transport, [config.device_address(channel, 0) for channel in range(config.channels)])
        self._memory = Allocator(PAGE, size, before_use=self._forget)
        self._rings = CommandRings(transport, self._memory, entries_log2=ring_log2)
        self.reset()

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
            raise DeviceClosed("device must be open; it was closed, open it again")
        return self._transport

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
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
        return self._total_cycles

    # -- weights -----------------------------------------------------------------------------------
    def load_experts(self, gate_up: Stack, down: Stack, *, activation: str = "silu",
                     weight_format: str = "int4_g32", activation_bits: int = 16,
                     grid_exponent: int | None = None, x_rms: float = 1.0,
                     progress: Progress | None = None) -> Experts:
        """Quantise the experts of one layer and put them into the device's memory.

        Parameters
        ----------
        gate_up : float tensor, (E, 2 I, H)
            Gate rows, then up rows, of each expert. Or a sequence of E matrices, taken one by one.
            Any H and I: memory holds them filled up with zeros to multiples of 32.
        down : float tensor, (E, H, I)
            Or a sequence of E matrices.
        activation : :class:`str`
            Of the gate: ``"silu"``.
        weight_format : :class:`str`
            One of :data:`moeaccel.formats.FORMATS`.
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

        Raises
        ------
        InvalidTensor, InvalidOption, LimitExceeded, FormatError
            Before anything is sent.
        OutOfDeviceMemory
            If the images do not fit.
        UploadError
            If an image does not read back.
        """
        return weights.load_experts(
            self, gate_up, down, activation=activation, weight_format=weight_format,
            activation_bits=activation_bits, grid_exponent=grid_exponent, x_rms=x_rms,
            progress=progress)

    def load_quantised(self, experts: Sequence[Expert], *, activation: str = "silu",
                       activation_bits: int = 16, grid_exponent: int | None = None,
                       x_rms: float = 1.0, progress: Progress | None = None) -> Experts:
        """Put experts that are quantised already, all of one format and shape, into memory.

        Parameters
        ----------
        experts : sequence of :class:`moeaccel.image.Expert`
            Rows of ``gate_up`` alternate: g0, u0, g1, u1, ...
            (:func:`moeaccel.image.interleave_gate_up`), other than in :meth:`load_experts`;
            :meth:`moeaccel.image.Expert.quantise` makes them so.

        See :meth:`load_experts` for the rest; the grid is chosen from the quantised weights.

        Raises
        ------
        FormatError
            If an integer, a scale or an exponent is none that the format has, or an array has
            another type or shape; before anything is sent.
        """
        return weights.load_quantised(
            self, experts, activation=activation, activation_bits=activation_bits,
            grid_exponent=grid_exponent, x_rms=x_rms, progress=progress)

    def load_linear(self, weight: Tensor, *, weight_format: str = "int4_g32",
                    activation_bits: int = 16, grid_exponent: int | None = None,
                    x_rms: float = 1.0) -> Linear:
        """Quantise the matrix of a linear layer, (N, K) float, and put it into memory.

        See :meth:`load_experts`.
        """
        return weights.load_linear(
            self, weight, weight_format=weight_format, activation_bits=activation_bits,
            grid_exponent=grid_exponent, x_rms=x_rms)

    def _forget(self, address: int, size: int) -> None:
        with self._lock:
            self._residents.forget(address, size)

    # -- commands ----------------------------------------------------------------------------------
    def submit(self, values: Mapping[str, int], command: Command) -> Command:
        """Send a command, waiting for room in the ring; what it is made of is the caller's affair.

        Parameters
        ----------
        values : mapping
            Fields of :data:`moeaccel.commands.SUBMISSION`; the tag is chosen here.
        command : :class:`Command`
            What to complete, returned.

        Raises
        ------
        DeviceTimeout
            If no room comes.
        """
        with self._lock:
            self._take()
            while self._rings.full:
                self._wait_for_progress(f"room in the submission ring for {command.name}",
                                        self._timeout_s)
            self._pending[self._rings.submit(values)] = command
            return command

    def wait(self, command: Command, *, timeout_s: float | None = None) -> Completion:
        """Wait until a command has completed, whatever its status.

        Raises
        ------
        DeviceTimeout
            If it does not; the command stays in flight.
        """
        with self._lock:
            if command.completion is None:
                self._take()
            while command.completion is None:
                self._wait_for_progress(f"completion of {command.name}",
                                        timeout_s or self._timeout_s)
            return command.completion

    def fence(self) -> None:
        """Wait until everything submitted before has completed."""
        command = self.submit({"opcode": Opcode.FENCE}, Command("FENCE"))
        self.wait(command)
        if error := command.error():
            raise error

    def _take(self) -> bool:
        """Take the completions that are there; return whether there were any."""
        self._check_open()
        completions = self._rings.take()
        for completion in completions:
            self._pending.pop(completion.tag).completion = completion
            self._total_cycles += completion.cycles
        return bool(completions)

    def _wait_for_progress(self, what: str, timeout_s: float) -> None:
        """Wait for at least one completion."""
        for _ in range(_SPURIOUS_INTERRUPTS):
            if not self.transport.wait_interrupt(timeout_s):
                break
            # Clear first, look second: what completes in between raises the interrupt again.
            self._registers.write("IRQ_STATUS", mask("IRQ_STATUS", "completion"))
            if self._take():
                return
        if self._take():  # completed, but the interrupt got lost
            return
        raise DeviceTimeout(
            f"{what} must come within {timeout_s:g} s, but did not; {self._state()}; call "
            "device.reset(), or open the device with a larger timeout_s")

    def _state(self) -> str:
        status = self._registers.read("STATUS")
        busy = ", ".join(name for name in ("busy", "draining") if status & mask("STATUS", name))
        return (f"STATUS is {status:#x} ({busy or 'idle'}), SQ_HEAD "
                f"{self._registers.read('SQ_HEAD')} of SQ_TAIL {self._registers.read('SQ_TAIL')}")

    # -- control -----------------------------------------------------------------------------------
    def counters(self) -> dict[str, int]:
        """Return the event counters of :data:`moeaccel.registers.COUNTERS` by name."""
        with self._lock:
            self._check_open()
            return self._registers.counters()

    def abort(self) -> None:
        """End the running command: taking its result raises :class:`CommandAborted`."""
        with self._lock:
            self._check_open()
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
            registers.write("ENABLE", 0)
            registers.write("IRQ_ENABLE", done)
            registers.write("IRQ_STATUS", everything)
            registers.write("CONTROL", mask("CONTROL", "soft_reset"))
            if not (transport.wait_interrupt(self._timeout_s)
                    or registers.read("IRQ_STATUS") & done):
                raise DeviceTimeout(
                    f"soft reset must finish within {self._timeout_s:g} s, but did not; "
                    f"{self._state()}; switch the device off and on")
            self._drop_pending()
            self._rings.reset()
            registers.write64("WINDOW_BASE", PAGE)
            registers.write64("WINDOW_LIMIT", PAGE + self._memory.size)
            registers.write("WATCHDOG", self._watchdog_cycles)
            registers.write("IRQ_STATUS", everything)
            registers.write("IRQ_ENABLE", mask("IRQ_ENABLE", "completion"))
            registers.write("ENABLE", 1)

    def _drop_pending(self) -> None:
        for tag, command in self._pending.items():
            command.completion = Completion(tag, Status.ABORTED)
        self._pending.clear()

    def close(self) -> None:
        """Stop the device and let it go; a second call does nothing."""
        with self._lock:
            if self._transport is None:
                return
            transport = self._transport
            try:
                if self._pending:
                    with contextlib.suppress(HostError):
                        self.reset()
                with contextlib.suppress(LinkLost):
                    self._registers.write("ENABLE", 0)
            finally:
                self._drop_pending()
                self._transport = None
                transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.close()


def open_device(spec: str | Transport, config: str | AcceleratorConfig | None = None, *,
                memory_bytes: int | None = None, timeout_s: float = 30.0, ring_log2: int = 4,
                watchdog_cycles: int = 1 << 24, record: str | Path | None = None,
                **options: Any) -> Device:
    """Open a device.

    Parameters
    ----------
    spec : :class:`str` or :class:`Transport`
        ``"golden"``: the bit-exact model. ``"rtl"``: the Verilated hardware in this process.
        ``"serial:PORT"``: a board at a serial port; option ``baud``. ``"xdma:N"``: a PCIe card.
        ``"replay:FILE"``: a recorded session. A transport is used as it is.
    config : :class:`str` or :class:`AcceleratorConfig`, optional
        What the device was built from: a preset's name, or a configuration; when left out,
        ``"ulx3s"`` at a serial port, the preset that a PCIe card names, else ``"small"``.
    memory_bytes : :class:`int`, optional
        Size of the memory on each channel. A model's costs only what is used; 4 GiB when left out.
        A PCIe card's is that of an Alveo U55C when left out. A board at a serial port or a
        recording says itself how much it has.
    timeout_s, ring_log2, watchdog_cycles
        See :class:`Device`.
    record : path, optional
        File to which the session is recorded, for ``"replay:FILE"``.
    **options
        Passed to the transport.

    Raises
    ------
    UnsupportedTransport
        For a specification that this version does not know.
    DeviceNotFound, ConfigMismatch
        If something else answers, or nothing.
    PortUnavailable
        If there is no such port, or it may not be opened.
    """
    if isinstance(spec, str) and spec.startswith("xdma:"):
        transport = _open_xdma(spec, None if config is None else preset(config), memory_bytes,
                               options)
        config = transport.config
    else:
        if config is None:
            config = "ulx3s" if isinstance(spec, str) and spec.startswith("serial:") else "small"
        config = preset(config)
        transport = spec if isinstance(spec, Transport) else _open_transport(
            spec, config, memory_bytes, options)
    try:
        if record is not None:
            from moeaccel.host.transports.record import RecordTransport

            transport = RecordTransport(transport, record, config)
        return Device(transport, config, timeout_s=timeout_s, ring_log2=ring_log2,
                      watchdog_cycles=watchdog_cycles)
    except BaseException:
        transport.close()
        raise


def _open_xdma(spec: str, config: AcceleratorConfig | None, memory_bytes: int | None,
               options: dict[str, Any]) -> XdmaTransport:
    from moeaccel.host.transports.xdma import XdmaTransport

    number = spec.partition(":")[2]
    if not number.isdecimal():
        raise UnsupportedTransport(
            f"device must be 'xdma:N' with the N of /dev/xdmaN_user, not {spec!r}")
    return XdmaTransport(int(number), config, memory_bytes=memory_bytes, **options)


def _open_transport(spec: str, config: AcceleratorConfig, memory_bytes: int | None,
                    options: dict[str, Any]) -> Transport:
    if spec == "golden":
        from moeaccel.host.transports.golden import GoldenTransport

        return GoldenTransport(
            config, memory_bytes=memory_bytes or min(1 << 32, 1 << config.address_bits), **options)
    if spec == "rtl":
        from moeaccel.host.transports.rtl import RtlTransport

        return RtlTransport(config, memory_bytes=memory_bytes, **options)
    kind, _, name = spec.partition(":")
    known = "'golden', 'rtl', 'serial:PORT', 'xdma:N' or 'replay:FILE'"
    if kind in ("serial", "replay") and name:
        if memory_bytes is not None:
            raise InvalidOption(f"memory_bytes must be left out for {kind}:..., which says itself "
                                f"how much there is, not {memory_bytes}")
        if kind == "serial":
            from moeaccel.host.transports.serial import SerialTransport

            return SerialTransport(name, **options)
        from moeaccel.host.transports.record import ReplayTransport

        return ReplayTransport(name, config, **options)
    raise UnsupportedTransport(f"device must be {known}, not {spec!r}")

"""Bus models for cocotb benches: an AXI4 memory, an AXI4-Lite master, clock, reset and interrupt.

The only file that knows cocotbext-axi. Benches see bytes, register values and
:class:`moeaccel.sim.cosim.memory.StallModel`, the same description of back-pressure that the
co-simulation has.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from typing import Any

from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge, SimTimeoutError, with_timeout
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiResp, AxiSlave

from moeaccel.sim.cosim.memory import StallModel
from moeaccel.sim.errors import RegisterResponseError, SimulationError, SimulationTimeout

# cocotbext-axi 0.1.28 uses names that cocotb 2.1 deprecates and still has.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"cocotbext\.axi(\..*)?")

CLOCK_NS = 10
"""Clock period."""

REGISTER_TIMEOUT_CYCLES = 10_000

_PAGE_BYTES = 4096


async def start(dut: Any, *, reset_cycles: int = 4) -> None:
    """Start the clock and give a reset; to be called when the bus models are there.

    They forget what they were asked when ``rst`` is high.
    """
    resets = [dut.rst, *([dut.mem_rst] if hasattr(dut, "mem_rst") else [])]
    for reset in resets:
        reset.value = 1
    Clock(dut.clk, CLOCK_NS, unit="ns").start()
    await ClockCycles(dut.clk, reset_cycles)
    for reset in resets:
        reset.value = 0
    await RisingEdge(dut.clk)


async def wait_high(dut: Any, signal: Any, *, max_cycles: int) -> None:
    """Wait until a signal of the clock domain, such as ``dut.irq``, is high.

    Raises
    ------
    SimulationTimeout
        If it stays low for `max_cycles`.
    """
    if not signal.value:
        try:
            await with_timeout(RisingEdge(signal), max_cycles * CLOCK_NS, "ns")
        except SimTimeoutError:
            raise SimulationTimeout(
                f"{signal._name} stayed low for {max_cycles} cycles") from None
    await RisingEdge(dut.clk)


class MemoryBus:
    """A memory behind an AXI4 master of the design, with a back door.

    Bytes that nobody wrote are zero. Bursts are answered in order, one after another; reads take
    their data when a beat is queued, writes take effect beat by beat. A burst that crosses 4 KiB or
    has its WLAST elsewhere than on its last beat fails the test.

    Parameters
    ----------
    dut
        cocotb's handle of the top level, with ports ``clk`` and ``rst``.
    name : str
        Prefix of the port: ``axi_mem`` for ``axi_mem__araddr``.
    stalls : StallModel, optional
        Random pauses: of ready on AR, AW and W, of valid on R and B.
    seed : int
        Of the pauses.
    """

    def __init__(self, dut: Any, name: str = "axi_mem", *, stalls: StallModel | None = None,
                 seed: int = 0) -> None:
        _quiet(dut, name)
        self._store = _Store()
        bus = AxiBus.from_prefix(dut, f"{name}_")
        slave = AxiSlave(bus, dut.clk, dut.rst, target=self._store)
        self._channels = _channels(slave.read_if, slave.write_if)
        self.set_stalls(stalls, seed=seed)

    def set_stalls(self, stalls: StallModel | None, *, seed: int = 0) -> None:
        """Pause from now on as `stalls` says; not at all for None."""
        _set_stalls(self._channels, stalls, seed)

    def read(self, address: int, count: int) -> bytes:
        """Return bytes, by the back door."""
        return self._store.get(address, count)

    def write(self, address: int, data: bytes) -> None:
        """Set bytes, by the back door."""
        self._store.put(address, data)

    def inject_error(self, address: int, count: int) -> None:
        """Answer SLVERR to every beat that touches a range; such writes have no effect."""
        self._store.errors.append(range(address, address + count))

    def clear_errors(self) -> None:
        """Take back what :meth:`inject_error` did."""
        self._store.errors.clear()

    @property
    def touched(self) -> tuple[int, int]:
        """First byte that the design has read or written, and the first byte behind the last."""
        return self._store.low, self._store.high


class RegisterBus:
    """The AXI4-Lite master for a slave of the design: 32-bit registers.

    Parameters
    ----------
    dut
        cocotb's handle of the top level, with ports ``clk`` and ``rst``.
    name : str
        Prefix of the port: ``axil`` for ``axil__araddr``.
    stalls : StallModel, optional
        Random pauses: of valid on AR, AW and W, of ready on R and B.
    seed : int
        Of the pauses.
    """

    def __init__(self, dut: Any, name: str = "axil", *, stalls: StallModel | None = None,
                 seed: int = 0) -> None:
        _quiet(dut, name)
        self._master = AxiLiteMaster(AxiLiteBus.from_prefix(dut, f"{name}_"), dut.clk, dut.rst)
        self._channels = _channels(self._master.read_if, self._master.write_if)
        self.set_stalls(stalls, seed=seed)

    def set_stalls(self, stalls: StallModel | None, *, seed: int = 0) -> None:
        """Pause from now on as `stalls` says; not at all for None."""
        _set_stalls(self._channels, stalls, seed)

    async def read(self, address: int) -> int:
        """Return a register's value.

        Raises
        ------
        RegisterResponseError
            If the answer is an error.
        SimulationTimeout
            If there is none.
        """
        answer = await self._finish("read", address, self._master.read(address, 4))
        return int.from_bytes(answer.data, "little")

    async def write(self, address: int, value: int) -> None:
        """Set a register; see :meth:`read`."""
        await self._finish("write", address,
                           self._master.write(address, value.to_bytes(4, "little")))

    async def _finish(self, what: str, address: int, access: Any) -> Any:
        try:
            answer = await with_timeout(access, REGISTER_TIMEOUT_CYCLES * CLOCK_NS, "ns")
        except SimTimeoutError:
            raise SimulationTimeout(f"Register {what} at {address:#05x} got no answer within "
                                    f"{REGISTER_TIMEOUT_CYCLES} cycles") from None
        if answer.resp != AxiResp.OKAY:
            raise RegisterResponseError(
                f"Register {what} at {address:#05x} was answered with {answer.resp.name}",
                address=address, response=int(answer.resp))
        return answer


class _Store:
    """Sparse bytes; the slave calls :meth:`read` and :meth:`write` for each beat."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self.errors: list[range] = []
        self.low, self.high = 1 << 64, 0

    async def read(self, address: int, count: int) -> bytes:
        self._touch(address, count)
        return self.get(address, count)

    async def write(self, address: int, data: bytes) -> None:
        self._touch(address, len(data))
        self.put(address, data)

    def get(self, address: int, count: int) -> bytes:
        out = bytearray(count)
        for page, offset, place, size in _pieces(address, count):
            kept = self._pages.get(page)
            if kept is not None:
                out[place:place + size] = kept[offset:offset + size]
        return bytes(out)

    def put(self, address: int, data: bytes) -> None:
        for page, offset, place, size in _pieces(address, len(data)):
            kept = self._pages.setdefault(page, bytearray(_PAGE_BYTES))
            kept[offset:offset + size] = data[place:place + size]

    def _touch(self, address: int, count: int) -> None:
        self.low, self.high = min(self.low, address), max(self.high, address + count)
        if any(address < bad.stop and bad.start < address + count for bad in self.errors):
            raise SimulationError(f"Injected error at {address:#x}")  # the slave answers SLVERR


def _pieces(address: int, count: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (page, offset in it, offset in the data, bytes) of a range."""
    done = 0
    while done < count:
        page, offset = divmod(address + done, _PAGE_BYTES)
        size = min(_PAGE_BYTES - offset, count - done)
        yield page, offset, done, size
        done += size


def _quiet(dut: Any, name: str) -> None:
    """Keep the models of a port from logging every transaction, and injected errors."""
    logging.getLogger(f"cocotb.{dut._name}.{name}_").setLevel(logging.ERROR)


def _channels(read_if: Any, write_if: Any) -> dict[str, Any]:
    return {
        "ar": read_if.ar_channel, "r": read_if.r_channel,
        "aw": write_if.aw_channel, "w": write_if.w_channel, "b": write_if.b_channel,
    }


def _set_stalls(channels: dict[str, Any], stalls: StallModel | None, seed: int) -> None:
    for name, channel in channels.items():
        probability = getattr(stalls, name) if stalls else 0
        if probability:
            assert stalls is not None
            pauses = _pauses(random.Random(f"{seed} {name}"), probability, stalls.length)
            channel.set_pause_generator(pauses)
        else:
            channel.clear_pause_generator()
            channel.pause = False


def _pauses(draw: random.Random, probability: float, length: int) -> Iterator[bool]:
    while True:
        if draw.random() < probability:
            for _ in range(draw.randint(1, length)):
                yield True
        else:
            yield False

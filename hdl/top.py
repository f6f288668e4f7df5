"""The accelerator: AXI4-Lite registers, rings, engine, AXI4 memory ports."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from amaranth import *
from amaranth.hdl import Shape
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel import __version__
from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.boards.global_buffer import GlobalBuffer
from moeaccel.hdl.control.command_processor import CommandProcessor
from moeaccel.hdl.control.counters import Counters
from moeaccel.hdl.control.register_file import RegisterFile
from moeaccel.hdl.engine import EVENTS, READERS, STREAMER, Engine
from moeaccel.hdl.layouts import channel_name
from moeaccel.hdl.memory.axi import AXI4LiteSignature, AXI4Signature
from moeaccel.hdl.memory.memory_port import ID_BITS, MemoryPort
from moeaccel.hdl.verilog.verilog_target import add_replicas, generate
from moeaccel.interface.registers import (
    ADDRESS_BITS,
    BUFFER_COUNTERS,
    REGISTERS,
    VERSION_VALUE,
)

__all__ = ["Accelerator", "description", "generate_verilog", "members"]

MODULE = "top"
"""Name of the Verilog module."""


def members(config: AcceleratorConfig) -> dict[str, Any]:
    """Return the members of the accelerator's signature."""
    memory = AXI4Signature(config.address_bits, 8 * config.port_bytes, ID_BITS)
    return {
        "axil": In(AXI4LiteSignature(ADDRESS_BITS)),
        **{channel_name("axi_mem", c): Out(memory) for c in range(config.channels)},
        "mem_rst": In(1),
        "irq": Out(1),
        "busy": Out(1),
    }


class Accelerator(wiring.Component):
    """The whole accelerator.

    ::

        axil --> RegisterFile <--> CommandProcessor --> job --> Engine
                     ^                    |                        |
                  Counters <----------- events                     |
        axi_mem <-------------------- MemoryPort <-----------------+
        axi_mem1, ... <-------------- MemoryPort <----- weights ---+

    Everything but weights is in the memory of channel 0. Weights of an expert lie at the same
    address of each channel, and the memory window holds on every channel. Where a fault's address
    is reported, the channel is above the address in its memory (``config.device_address``); of
    several channels that have one, the lowest is reported.

    Reset: everything but memory's content, at any time. Memory may go on answering what was asked
    before, on any channel: see :class:`MemoryPort`. Until it has, commands wait.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    family : :class:`str`
        FPGA family of the multipliers.

    Members
    -------
    axil : :py:`In(AXI4LiteSignature(ADDRESS_BITS))`
    axi_mem : :py:`Out(AXI4Signature(config.address_bits, 8 * config.port_bytes, ID_BITS))`
        Channel 0; ``axi_mem1``, ``axi_mem2``, ...: the other channels, which only read.
    mem_rst : :py:`In(1)`
        High with a reset, for a cycle or more: the memories, or the ways to them, are reset, too,
        and answer nothing that was asked before.
    irq : :py:`Out(1)`
        Level: an enabled interrupt is pending.
    busy : :py:`Out(1)`
        A command is being executed, or a reset waits for memory.
    """

    def __init__(self, config: AcceleratorConfig, family="generic"):
        self._config = config
        self._family = family
        super().__init__(members(config))

    def elaborate(self, platform):
        m = Module()
        config = self._config
        m.submodules.registers = registers = RegisterFile(config)
        m.submodules.counters = counters = Counters(config)
        m.submodules.commands = commands = CommandProcessor(config)
        router = bool(config.router)
        m.submodules.port = port = MemoryPort(
            config, readers=1 + len(READERS) + router, writers=2 + router)
        ports = [port, *add_replicas(
            m, platform, "port", functools.partial(MemoryPort, config, readers=1, writers=0),
            range(1, config.channels))]
        m.submodules.engine_reset = engine_reset = GlobalBuffer(self._family)
        m.domains.engine = ClockDomain(local=True)
        m.d.comb += [engine_reset.i.eq(commands.o_engine_reset),
                     ClockSignal("engine").eq(ClockSignal()),
                     ResetSignal("engine").eq(engine_reset.o)]
        engine = Engine(config, self._family)
        m.submodules.engine = DomainRenamer("engine")(engine)

        wiring.connect(m, outside=wiring.flipped(self.axil), registers=registers.axil)
        for c, one in enumerate(ports):
            outside = getattr(self, channel_name("axi_mem", c))
            wiring.connect(m, outside=wiring.flipped(outside), port=one.axi_mem)
        wiring.connect(m, commands=commands.reader, port=port.reader0)
        wiring.connect(m, commands=commands.writer, port=port.writer0)
        wiring.connect(m, engine=engine.combiner_writer, port=port.writer1)
        for i, name in enumerate(READERS, start=1):
            wiring.connect(m, engine=getattr(engine, name), port=getattr(port, f"reader{i}"))
        for c, one in enumerate(ports[1:], start=1):
            wiring.connect(m, engine=getattr(engine, channel_name(STREAMER, c)), port=one.reader0)
        if router:  # behind all others: it works alone
            reader, writer = f"reader{1 + len(READERS)}", "writer2"
            wiring.connect(m, engine=engine.router, port=getattr(port, reader))
            wiring.connect(m, engine=engine.router_writer, port=getattr(port, writer))
        wiring.connect(m, commands=commands.o_job, engine=engine.i_job)

        m.d.comb += [
            self.irq.eq(registers.irq),
            self.busy.eq(commands.busy | commands.draining),
            registers.ro_sq_head.eq(commands.sq_head),
            registers.ro_cq_tail.eq(commands.cq_tail),
            registers.ro_status.eq(Cat(commands.busy, commands.draining)),
            registers.set_irq_status_completion.eq(commands.o_irq),
            registers.set_irq_status_reset_done.eq(commands.o_reset_done),
            *(getattr(registers, f"set_error_status_{f.name}").eq(commands.o_error[f.offset])
              for f in REGISTERS["ERROR_STATUS"].fields),
            registers.clear.eq(commands.o_reset_done),
            commands.enable.eq(registers.rw_enable[0]),
            commands.sq_base.eq(registers.rw_sq_base),
            commands.cq_base.eq(registers.rw_cq_base),
            commands.ring_log2.eq(registers.rw_ring_log2),
            commands.sq_tail.eq(registers.rw_sq_tail),
            commands.cq_head.eq(registers.rw_cq_head),
            commands.watchdog.eq(registers.rw_watchdog),
            commands.error.eq(registers.w1c_error_status.any()),
            commands.i_abort.eq(registers.pulse_control_abort),
            commands.i_soft_reset.eq(registers.pulse_control_soft_reset),
            commands.i_done.eq(engine.o_done),
            commands.i_result.eq(engine.o_result),
            commands.progress.eq(Cat(one.read_beat for one in ports).any() | port.write_beat
                                 | engine.o_progress),
            commands.idle.eq(Cat(one.idle for one in ports).all()),
            commands.fault_window.eq(Cat(one.fault_window for one in ports).any()),
            commands.fault_bus.eq(Cat(one.fault_bus for one in ports).any()),
            *(one.flush.eq(commands.flush) for one in ports),
            *(one.forget.eq(self.mem_rst) for one in ports),
            *(one.clear_faults.eq(commands.clear_faults) for one in ports),
        ]
        *others, fault_address = (
            one.fault_address | c << config.address_bits for c, one in enumerate(ports))
        for one, address in reversed(list(zip(ports, others, strict=False))):
            reported = Mux(commands.fault_window, one.fault_window, one.fault_bus)
            fault_address = Mux(reported, address, fault_address)
        m.d.comb += commands.fault_address.eq(fault_address)
        # Bits that no address has must not be cut off: they would widen the window.
        for name in ("window_base", "window_limit"):
            register = getattr(registers, f"rw_{name}")
            beyond = register[config.address_bits:].any()
            bound = Signal(config.address_bits + 1, name=name)
            m.d.sync += bound.eq(Mux(beyond, 1 << config.address_bits, register))
            m.d.comb += [getattr(one, name).eq(bound) for one in ports]
        weights = port.read_beat_reader == 1 + READERS.index(STREAMER)
        m.d.comb += [
            counters.clear.eq(commands.o_reset_done),
            counters.bytes_read_weights.eq(
                (port.read_beat & weights) + sum(one.read_beat for one in ports[1:])),
            counters.bytes_read_other.eq(port.read_beat & ~weights),
            counters.bytes_written.eq(port.write_beat),
            counters.commands.eq(commands.count_commands),
            counters.tokens.eq(commands.count_tokens),
            counters.overflows.eq(commands.count_overflows),
            counters.underflows.eq(commands.count_underflows),
            *(getattr(counters, name).eq(getattr(engine, f"count_{name}"))
              for name in (*EVENTS, *(BUFFER_COUNTERS if config.buffer_slots else ()))),
        ]
        if config.buffer_slots:
            m.d.comb += engine.i_forget.eq(commands.o_forget)
        for name in registers.signature.members:
            if hasattr(counters, name):
                m.d.comb += getattr(registers, name).eq(getattr(counters, name))
        return m


class _Module(wiring.Component):
    """The accelerator as a module of its own, with ports ``clk`` and ``rst``, which is registered.

    Straight from a port, the reset would make every register's next state depend on an input:
    Verilator would evaluate it all once more in each cycle, a third of its time. Registers see the
    reset a cycle late, and registers of the bus are not ready until then.

    Members
    -------
    clk, rst : :py:`In(1)`
        Reset is synchronous, active high, held for 2 cycles or more; ``mem_rst`` is a reset, too.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        super().__init__({
            "clk": In(1), "rst": In(1), **dict(accelerator.signature.members)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        m.submodules.accelerator = accelerator = self._accelerator
        reset = Signal(init=1, reset_less=True)
        forget = Signal(init=1, reset_less=True)
        m.d.sync += [reset.eq(self.rst | self.mem_rst), forget.eq(self.mem_rst)]
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(reset)]
        outside = {path: value for path, _, value in self.signature.flatten(self)}
        for path, member, inside in accelerator.signature.flatten(accelerator):
            if path == ("mem_rst",):
                m.d.comb += inside.eq(forget)
            elif member.flow == In:
                m.d.comb += inside.eq(outside[path])
            elif path[0] == "axil" and path[-1].endswith("ready"):
                m.d.comb += outside[path].eq(inside & ~reset)
            else:
                m.d.comb += outside[path].eq(inside)
        return m


def generate_verilog(config: AcceleratorConfig, *, family: str = "generic",
                     simulation: bool = False) -> str:
    """Return the accelerator's Verilog, module ``top``; ``simulation`` as for ``generate``."""
    return generate(_Module(Accelerator(config, family)), MODULE, simulation=simulation)


def description(config: AcceleratorConfig) -> dict[str, Any]:
    """Return what a system needs beside the Verilog: ports, configuration and register map."""
    signature = wiring.Signature(members(config))
    ports = [{"name": name, "direction": "input", "width": 1} for name in ("clk", "rst")]
    ports += [
        {"name": "__".join(map(str, path)),
         "direction": "input" if member.flow == In else "output",
         "width": Shape.cast(member.shape).width}
        for path, member, _ in signature.flatten(signature.create())
    ]
    return {
        "module": MODULE,
        "version": __version__,
        "interface_version": f"{VERSION_VALUE:#010x}",
        "ports": ports,
        "config": dataclasses.asdict(config),
        "digest": f"{config.digest:#010x}",
        "registers": [
            {"name": r.name, "address": r.address, "access": r.access.value, "reset": r.reset,
             "text": r.text, "fields": [dataclasses.asdict(f) for f in r.fields]}
            for r in REGISTERS.values()
        ],
    }

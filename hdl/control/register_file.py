"""The AXI4-Lite slave that moeaccel.interface.registers describes."""

import functools
import operator

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl.memory.axi import AXI4LiteSignature
from moeaccel.interface.registers import (
    ADDRESS_BITS,
    REGISTERS,
    Access,
    Register,
    built_values,
)

_PAGE_BITS = 4
_OKAY = 0
_SLVERR = 2

CLEARED_BY_SOFT_RESET = ("SQ_TAIL", "CQ_HEAD")
"""Doorbells: a soft reset empties the rings, so both their ends return to 0."""


def _constants(config: AcceleratorConfig) -> dict[str, int]:
    """Return the read-only registers that never change."""
    constants = {
        r.name: r.reset for r in REGISTERS.values() if r.access is Access.RO and r.reset != 0
    }
    return constants | built_values(config)


def _pair(register: Register) -> str | None:
    """Return the name of the 64-bit value whose low word this register is."""
    name, _, half = register.name.rpartition("_")
    return name if half == "LO" and f"{name}_HI" in REGISTERS else None


class RegisterFile(wiring.Component):
    """Hold the registers of ``moeaccel.interface.registers.REGISTERS`` behind AXI4-Lite.

    ::

        axil --> [address, data] --> write decode --> RW, W1C storage --> rw_*, irq
                                                 \\-> W1P ------------> pulse_*
             <-- [data, response] <-- read decode <-- storage, constants, ro_*

    Every member is generated from the table:

    * RW: ``rw_<register>``; pairs ``<X>_LO``, ``<X>_HI`` also as 64-bit ``rw_<x>``;
      ``stb_<register>`` pulses in the first cycle in which a written value shows.
    * RO: ``ro_<register>``, except constants (registers with a reset value, ``built_values``).
    * W1P: ``pulse_<register>_<field>``, one cycle.
    * W1C: ``w1c_<register>``; ``set_<register>_<field>`` sets the bit, also in the cycle in which
      a host clears it.
      ``irq`` is high while a bit of ``<X>_STATUS`` and its bit of ``<X>_ENABLE`` are both 1.

    Names are in lower case. Byte strobes are honoured in RW, W1P and W1C. Registers with fields
    hold the bits of their fields only; other bits read 0. Writes to RO registers are ignored.
    An address without a register reads 0, ignores writes and answers SLVERR.

    Latency: BVALID 2 cycles after the later of address and data, RVALID 3 cycles after the address;
    one read and one write at a time, a write every 3 and a read every 4 cycles at best.
    Reset: reset values of the table, everything else 0.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Its digest is the CONFIG_HASH register.

    Members
    -------
    axil : :py:`In(AXI4LiteSignature(ADDRESS_BITS))`
    clear : :py:`In(1)`
        A soft reset has finished: the registers in CLEARED_BY_SOFT_RESET return to 0.
    irq : :py:`Out(1)`
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        members = {"axil": In(AXI4LiteSignature(ADDRESS_BITS)), "clear": In(1), "irq": Out(1)}
        for register in REGISTERS.values():
            name = register.name.lower()
            match register.access:
                case Access.RO if register.name not in _constants(config):
                    members[f"ro_{name}"] = In(32)
                case Access.RW:
                    members[f"rw_{name}"] = Out(32, init=register.reset)
                    members[f"stb_{name}"] = Out(1)
                    if pair := _pair(register):
                        members[f"rw_{pair.lower()}"] = Out(64)
                case Access.W1P:
                    for field in register.fields:
                        members[f"pulse_{name}_{field.name}"] = Out(field.bits)
                case Access.W1C:
                    members[f"w1c_{name}"] = Out(32)
                    for field in register.fields:
                        members[f"set_{name}_{field.name}"] = In(field.bits)
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        axil = self.axil
        constants = _constants(self._config)

        # One write at a time: address and data may come in any order.
        aw_held = Signal()
        aw_word = Signal(ADDRESS_BITS - 2)
        w_held = Signal()
        w_data = Signal(32)
        w_strobes = Signal(4)
        write = Signal()
        m.d.comb += [
            axil.awready.eq(~aw_held),
            axil.wready.eq(~w_held),
            write.eq(aw_held & w_held & ~axil.bvalid),
        ]
        with m.If(axil.awvalid & axil.awready):
            m.d.sync += [aw_held.eq(1), aw_word.eq(axil.awaddr[2:])]
        with m.If(axil.wvalid & axil.wready):
            m.d.sync += [w_held.eq(1), w_data.eq(axil.wdata), w_strobes.eq(axil.wstrb)]
        with m.If(axil.bvalid & axil.bready):
            m.d.sync += axil.bvalid.eq(0)
        with m.If(write):
            m.d.sync += [aw_held.eq(0), w_held.eq(0), axil.bvalid.eq(1)]

        # One read at a time, in two steps: a register of each page, then the page.
        ar_held = Signal()
        ar_word = Signal(ADDRESS_BITS - 2)
        ar_select = Signal(1 << _PAGE_BITS)  # the word within its page, a bit for each
        looked_up = Signal()
        read = Signal()
        m.d.comb += [axil.arready.eq(~ar_held), read.eq(looked_up & ~axil.rvalid)]
        m.d.sync += looked_up.eq(ar_held & ~read)
        with m.If(axil.arvalid & axil.arready):
            m.d.sync += [ar_held.eq(1), ar_word.eq(axil.araddr[2:]),
                         ar_select.eq(1 << axil.araddr[2:2 + _PAGE_BITS])]
        with m.If(axil.rvalid & axil.rready):
            m.d.sync += axil.rvalid.eq(0)
        with m.If(read):
            m.d.sync += [ar_held.eq(0), axil.rvalid.eq(1)]

        mask = Signal(32)
        m.d.comb += mask.eq(Cat(bit.replicate(8) for bit in w_strobes))

        values = {}  # what a read of each register returns
        selected = {}  # the cycle behind ``write``: data and strobes are still there
        for register in REGISTERS.values():
            name = register.name.lower()
            used = sum((1 << f.bits) - 1 << f.offset for f in register.fields) or 0xFFFF_FFFF
            selected[register.name] = Signal(name=f"write_{name}")
            if register.name in constants:
                values[register.name] = C(constants[register.name], 32)
                continue
            match register.access:
                case Access.RO:
                    values[register.name] = getattr(self, f"ro_{name}")
                case Access.RW:
                    value = values[register.name] = getattr(self, f"rw_{name}")
                    m.d.sync += getattr(self, f"stb_{name}").eq(selected[register.name])
                    with m.If(selected[register.name]):
                        m.d.sync += value.eq(((w_data & mask) | (value & ~mask)) & used)
                    if register.name in CLEARED_BY_SOFT_RESET:
                        with m.If(self.clear):
                            m.d.sync += value.eq(0)
                case Access.W1P:
                    for field in register.fields:
                        part = slice(field.offset, field.offset + field.bits)
                        m.d.sync += getattr(self, f"pulse_{name}_{field.name}").eq(
                            (w_data & mask)[part] & selected[register.name].replicate(field.bits))
                case Access.W1C:
                    value = values[register.name] = getattr(self, f"w1c_{name}")
                    keep = Signal(32, name=f"{name}_keep")
                    m.d.comb += keep.eq(~(w_data & mask & selected[register.name].replicate(32)))
                    for field in register.fields:
                        part = slice(field.offset, field.offset + field.bits)
                        m.d.sync += value[part].eq(
                            (value & keep)[part] | getattr(self, f"set_{name}_{field.name}"))
            if register.access is Access.RW and (pair := _pair(register)):
                m.d.comb += getattr(self, f"rw_{pair.lower()}").eq(
                    Cat(getattr(self, f"rw_{name}"), getattr(self, f"rw_{pair.lower()}_hi")))

        pending = [
            (values[register.name] & values[enable]).any()
            for register in REGISTERS.values() if register.access is Access.W1C
            if (enable := register.name.replace("_STATUS", "_ENABLE")) in values
        ]
        m.d.sync += self.irq.eq(Cat(*pending).any())

        m.d.sync += [signal.eq(0) for signal in selected.values()]
        with m.If(write):
            m.d.sync += axil.bresp.eq(_SLVERR)
            with m.Switch(aw_word):
                for register in REGISTERS.values():
                    with m.Case(register.address >> 2):
                        m.d.sync += [selected[register.name].eq(1), axil.bresp.eq(_OKAY)]
        pages = {}
        for register in REGISTERS.values():
            page, word = divmod(register.address >> 2, 1 << _PAGE_BITS)
            pages.setdefault(page, {})[word] = values.get(register.name, C(0, 32))
        with m.If(read):
            m.d.sync += [axil.rresp.eq(_SLVERR), axil.rdata.eq(0)]
        for page, words in pages.items():
            found = Signal(name=f"found{page}")
            value = Signal(32, name=f"page{page}")
            m.d.sync += [
                found.eq(Cat(ar_select[word] for word in words).any()),
                value.eq(functools.reduce(operator.or_, (
                    source & ar_select[word].replicate(32) for word, source in words.items()))),
            ]
            with m.If(read & found & (ar_word[_PAGE_BITS:] == page)):
                m.d.sync += [axil.rresp.eq(_OKAY), axil.rdata.eq(value)]
        return m

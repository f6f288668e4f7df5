"""Event counters of the accelerator, as moeaccel.interface.registers.COUNTERS lists them."""

from amaranth import *
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from moeaccel.config import AcceleratorConfig
from moeaccel.hdl import layouts
from moeaccel.hdl.weights.expert_buffer import amount_bits
from moeaccel.interface.registers import BUFFER_COUNTERS, COUNTERS

COUNTER_BITS = 48


def _amount_bits(name: str, config: AcceleratorConfig) -> int:
    """Return the bits of what a counter may advance by in one cycle."""
    return {
        "tokens": config.max_tokens.bit_length(),
        "assignments": config.max_assignments.bit_length(),
        "overflows": layouts.output_count_bits(config),
        "underflows": layouts.output_count_bits(config),
        "bytes_read_weights": config.channels.bit_length(),
        **{of_buffer: amount_bits(config) for of_buffer in BUFFER_COUNTERS
           if of_buffer.startswith("bytes")},
    }.get(name, 1)


def counters_of(config: AcceleratorConfig) -> list[str]:
    """Return the counters that there are."""
    return [name for name, _ in COUNTERS if config.buffer_slots or name not in BUFFER_COUNTERS]


class Counters(wiring.Component):
    """Count events in 48-bit counters, one for each entry of
    ``moeaccel.interface.registers.COUNTERS``; those of an expert buffer where there is one.

    A counter shows an event 2 cycles after it; every counter takes an event each cycle. ``clear``
    shows 2 cycles after it and wins over events of its cycle, the one before and the one after, so
    that a soft reset leaves zeros. A reset is one that clears a cycle later.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
        Widths of amounts; bytes of a beat.

    Members
    -------
    busy, starved_weights, ... : :py:`In(1)` or wider
        One input for each counter, named as the counter. ``bytes_*``: beats of ``port_bytes``
        bytes, at most one; of weights, one of each channel; of an expert buffer, as many as a slot
        has of each. ``tokens``, ``assignments``,
        ``overflows``, ``underflows``: the amount, 0 when there is nothing to add. Others: a strobe.
    clear : :py:`In(1)`
        Set every counter to 0.
    ro_busy_lo, ro_busy_hi, ... : :py:`Out(32)`
        The counters under the names of RegisterFile's inputs.
    """

    def __init__(self, config):
        if not isinstance(config, AcceleratorConfig):
            raise TypeError(f"config must be an AcceleratorConfig, not {config!r}")
        self._config = config
        members = {"clear": In(1)}
        for name in counters_of(config):
            members[name] = In(_amount_bits(name, config))
            members[f"ro_{name}_lo"] = Out(32)
            members[f"ro_{name}_hi"] = Out(32)
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        # Reset and clear in one register: hundreds of others read it.
        clearing = Signal(init=1)
        m.d.sync += clearing.eq(self.clear)
        for name in counters_of(self._config):
            event = getattr(self, name)
            shift = exact_log2(self._config.port_bytes) if name.startswith("bytes_") else 0
            amount = Signal.like(event, name=f"amount_{name}", reset_less=True)
            # The low bits of a count of bytes never change.
            total = Signal(COUNTER_BITS - shift, name=f"total_{name}", reset_less=True)
            m.d.sync += [amount.eq(event), total.eq(total + amount)]
            with m.If(clearing):
                m.d.sync += [amount.eq(0), total.eq(0)]
            m.d.comb += Cat(getattr(self, f"ro_{name}_lo"), getattr(self, f"ro_{name}_hi")).eq(
                Cat(C(0, shift), total))
        return m

"""The 16-bit single-data-rate SDRAM: its size, its pins, its commands and its limits."""

from __future__ import annotations

import enum as python_enum
from dataclasses import dataclass, fields

from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["BURST_WORDS", "CHIP_BYTES", "MODE_REGISTER", "SdramCommand", "SdramSignature",
           "SdramTiming"]

BANK_BITS = 2
ROW_BITS = 13
COLUMN_BITS = 9
CHIP_BYTES = 2 << (BANK_BITS + ROW_BITS + COLUMN_BITS)
"""Bytes of the chip: 4 banks of 8192 rows of 512 words of 16 bits."""

BURST_WORDS = 4
"""Words that one column command moves: a beat of 64 bits."""

CAS_LATENCY = 3
MODE_REGISTER = CAS_LATENCY << 4 | 2
"""What the chip is set to: CAS latency 3, sequential bursts of 4 words, for writes too."""

POWER_UP_REFRESHES = 8

_NS = 10**9


class SdramCommand(python_enum.IntEnum):
    """A command as ``ras_n, cas_n, we_n`` (most significant first) with ``cs_n`` low."""

    MODE = 0b000
    REFRESH = 0b001
    PRECHARGE = 0b010
    ACTIVATE = 0b011
    WRITE = 0b100
    READ = 0b101
    TERMINATE = 0b110
    NOP = 0b111


class SdramSignature(wiring.Signature):
    """A 16-bit SDRAM, seen from its controller; the clock is that of the domain."""

    def __init__(self):
        super().__init__({
            "cke": Out(1),
            "cs_n": Out(1),
            "ras_n": Out(1),
            "cas_n": Out(1),
            "we_n": Out(1),
            "ba": Out(BANK_BITS),
            "a": Out(ROW_BITS),
            "dqm": Out(2),
            "dq_o": Out(16),
            "dq_oe": Out(1),
            "dq_i": In(16),
        })


@dataclass(frozen=True, kw_only=True)
class SdramTiming:
    """Limits of a chip in nanoseconds, and in cycles of a clock.

    The names are those of data sheets without their leading t. Properties give cycles: the least
    that are allowed, or the most in ``ras_max`` and ``refresh``.

    Parameters
    ----------
    clock_hz : :class:`int`
        The clock.
    rc_ns, rfc_ns : :class:`int`
        From one activation of a bank to its next; from a refresh to any command.
    ras_ns, ras_max_ns : :class:`int`
        From a bank's activation to its precharge, least and most.
    rcd_ns, rp_ns : :class:`int`
        From activation to column command; from precharge to activation or refresh.
    rrd_ns, wr_ns, mrd_ns : :class:`int`
        Between activations of two banks; from the last word written to the precharge; from setting
        the mode to any command. At least 2 cycles each.
    refresh_ns : :class:`int`
        Mean time between refreshes.
    power_up_ns : :class:`int`
        From power and clock to the first command.
    """

    clock_hz: int
    rc_ns: int
    rfc_ns: int
    ras_ns: int
    ras_max_ns: int
    rcd_ns: int
    rp_ns: int
    rrd_ns: int
    wr_ns: int
    mrd_ns: int
    refresh_ns: int
    power_up_ns: int

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer, not {value!r}")

    @classmethod
    def ulx3s(cls, *, clock_hz):
        """Return limits that all chips of the ULX3S keep.

        The largest (for ``ras_max_ns`` the smallest) of the data sheets' figures for AS4C16M16SA-6
        and -7, W9825G6KH-6 and IS42S16160G-7; 8192 refreshes in 64 ms.
        """
        return cls(clock_hz=clock_hz, rc_ns=63, rfc_ns=63, ras_ns=42, ras_max_ns=100_000, rcd_ns=21,
                   rp_ns=21, rrd_ns=14, wr_ns=14, mrd_ns=14, refresh_ns=64_000_000 // 8192,
                   power_up_ns=200_000)

    def _least(self, nanoseconds, floor=1):
        return max(floor, -(-nanoseconds * self.clock_hz // _NS))

    def _most(self, nanoseconds):
        return nanoseconds * self.clock_hz // _NS

    @property
    def rc(self):
        """Least cycles between activations of a bank."""
        return self._least(self.rc_ns)

    @property
    def rfc(self):
        """Least cycles from a refresh to any command."""
        return self._least(self.rfc_ns)

    @property
    def ras(self):
        """Least cycles from activation to precharge."""
        return self._least(self.ras_ns)

    @property
    def ras_max(self):
        """Most cycles from activation to precharge."""
        return self._most(self.ras_max_ns)

    @property
    def rcd(self):
        """Least cycles from activation to column command."""
        return self._least(self.rcd_ns)

    @property
    def rp(self):
        """Least cycles from precharge to activation or refresh."""
        return self._least(self.rp_ns)

    @property
    def rrd(self):
        """Least cycles between activations of two banks."""
        return self._least(self.rrd_ns, 2)

    @property
    def wr(self):
        """Least cycles from the last word written to the precharge."""
        return self._least(self.wr_ns, 2)

    @property
    def mrd(self):
        """Least cycles from setting the mode to any command."""
        return self._least(self.mrd_ns, 2)

    @property
    def refresh(self):
        """Most cycles between refreshes, on average."""
        return self._most(self.refresh_ns)

    @property
    def power_up(self):
        """Least cycles from power to the first command."""
        return self._least(self.power_up_ns)

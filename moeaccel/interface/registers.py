"""The register map, described once: hardware, driver, JSON, C header and documentation come from
it.

Registers are 32 bits wide; 64-bit values are two registers, low word first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from moeaccel.config import AcceleratorConfig


class Access(enum.Enum):
    """What a host may do with a register."""

    RO = "ro"
    """Driven by the hardware."""
    RW = "rw"
    """Holds what was written."""
    W1P = "w1p"
    """Writing 1 gives a one-cycle pulse; reads 0."""
    W1C = "w1c"
    """Set by the hardware, cleared by writing 1."""


@dataclass(frozen=True)
class RegisterField:
    """Bits ``[offset, offset + bits)`` of a register."""

    name: str
    offset: int
    bits: int
    text: str


@dataclass(frozen=True)
class Register:
    """One 32-bit register at a byte address."""

    name: str
    address: int
    access: Access
    text: str
    fields: tuple[RegisterField, ...] = ()
    reset: int = 0


ID_VALUE = 0x4145_4F4D  # "MOEA" in memory order
VERSION_VALUE = 0x0002_0003
ADDRESS_BITS = 12


def _fields(*rows: tuple[str, int, int, str]) -> tuple[RegisterField, ...]:
    return tuple(RegisterField(*row) for row in rows)


COUNTERS: tuple[tuple[str, str], ...] = (
    ("busy", "Cycles in which the array started a step."),
    ("starved_weights", "Cycles with work in which the array waited for weights."),
    ("starved_activations", "Cycles with work in which the array waited for x or h."),
    ("stalled_output", "Cycles with work in which the array waited for room behind it."),
    ("idle", "Cycles without work for the array; the five add up to all cycles since reset."),
    ("bytes_read_weights", "Bytes of expert images read."),
    ("bytes_read_other", "All other bytes read."),
    ("bytes_written", "Bytes written."),
    ("tokens", "Tokens of commands that have run, without WINDOW or BUS_ERROR."),
    ("expert_passes", "Passes over an expert's weights."),
    ("assignments", "Token-expert pairs computed."),
    ("overflows", "Weighted outputs beyond the grid, of the same commands."),
    ("commands", "Commands completed."),
    ("underflows", "Weighted outputs that the grid made zero, of the same commands."),
    ("buffer_hits", "Passes of which the expert buffer had weights."),
    ("buffer_misses", "Passes of which it had none; 0, as the other four, where there is none."),
    ("bytes_buffered", "Bytes of expert images taken from the expert buffer, on all channels."),
    ("bytes_prefetched", "Bytes of bytes_read_weights that PREFETCH brought."),
    ("bytes_wasted", "Bytes of these that gave way to another expert, or were forgotten, unused."),
)
"""Event counters, 48 bits wide, two registers each from COUNTERS_BASE on; new ones come last."""

BUFFER_COUNTERS = ("buffer_hits", "buffer_misses", "bytes_buffered", "bytes_prefetched",
                   "bytes_wasted")
"""Those of an expert buffer."""

COUNTERS_BASE = 0x100

_ERRORS = _fields(
    ("ring_log2", 0, 1, "RING_LOG2 is not from 1 to 8."),
    ("sq_base", 1, 1, "SQ_BASE is not aligned, or its ring does not end within the address space."),
    ("cq_base", 2, 1, "CQ_BASE is not aligned, or its ring does not end within the address space."),
    ("completion_window", 3, 1, "A completion is outside the memory window: it was not written."),
    ("completion_bus", 4, 1, "Memory answered the write of a completion with an error."),
)

_PLAIN: tuple[Register, ...] = (
    Register("ID", 0x000, Access.RO, "Reads 0x41454F4D.", reset=ID_VALUE),
    Register(
        "VERSION",
        0x004,
        Access.RO,
        "Interface version, major in the high half.",
        reset=VERSION_VALUE,
    ),
    Register("CONFIG_HASH", 0x008, Access.RO, "AcceleratorConfig.digest of this build."),
    Register(
        "CONTROL",
        0x010,
        Access.W1P,
        "Requests.",
        _fields(
            ("soft_reset", 0, 1, "Drop all work, drain the memory port, empty the rings."),
            ("abort", 1, 1, "End the running command with ABORTED; later ones run."),
        ),
    ),
    Register(
        "ENABLE",
        0x014,
        Access.RW,
        "Fetch submissions.",
        _fields(("enable", 0, 1, "1: fetch and execute.")),
    ),
    Register(
        "STATUS",
        0x018,
        Access.RO,
        "State.",
        _fields(
            ("busy", 0, 1, "A command is being executed."),
            ("draining", 1, 1, "Waiting for memory to answer before a reset."),
        ),
    ),
    Register(
        "IRQ_STATUS",
        0x020,
        Access.W1C,
        "Pending interrupts.",
        _fields(
            ("completion", 0, 1, "A completion was written."),
            ("reset_done", 1, 1, "A soft reset has finished."),
        ),
    ),
    Register(
        "IRQ_ENABLE",
        0x024,
        Access.RW,
        "Interrupts that drive irq.",
        _fields(("completion", 0, 1, "See IRQ_STATUS."), ("reset_done", 1, 1, "See IRQ_STATUS.")),
    ),
    Register(
        "ERROR_STATUS",
        0x028,
        Access.W1C,
        "What stopped the device. While a bit is 1 nothing is fetched, and a completion that was "
        "not written waits; when all are cleared it is written again. Registers of the rings are "
        "looked at while ENABLE or STATUS.busy is 1.",
        _ERRORS,
    ),
    Register(
        "ERROR_ENABLE",
        0x02C,
        Access.RW,
        "Errors that drive irq.",
        tuple(replace(field, text="See ERROR_STATUS.") for field in _ERRORS),
    ),
    Register("SQ_BASE_LO", 0x030, Access.RW, "Submission ring, 64-byte aligned."),
    Register("SQ_BASE_HI", 0x034, Access.RW, "Submission ring, high word."),
    Register("CQ_BASE_LO", 0x038, Access.RW, "Completion ring, 64-byte aligned."),
    Register("CQ_BASE_HI", 0x03C, Access.RW, "Completion ring, high word."),
    Register("RING_LOG2", 0x040, Access.RW, "log2 of the entries of both rings, 1 to 8.", reset=1),
    Register("SQ_TAIL", 0x044, Access.RW, "Doorbell: index behind the last valid submission."),
    Register(
        "CQ_HEAD", 0x048, Access.RW, "Doorbell: index of the first completion not yet consumed."
    ),
    Register("SQ_HEAD", 0x04C, Access.RO, "Index of the next submission to fetch."),
    Register(
        "CQ_TAIL", 0x050, Access.RO,
        "Index of the next completion to write; those before it are whole."
    ),
    Register(
        "WINDOW_BASE_LO", 0x058, Access.RW, "First byte that bursts may touch, on every channel."
    ),
    Register("WINDOW_BASE_HI", 0x05C, Access.RW, "High word."),
    Register(
        "WINDOW_LIMIT_LO",
        0x060,
        Access.RW,
        "First byte behind the window; 0 at reset: nothing is allowed.",
    ),
    Register("WINDOW_LIMIT_HI", 0x064, Access.RW, "High word."),
    Register(
        "WATCHDOG", 0x068, Access.RW, "Cycles without progress until a command is ended; 0: never."
    ),
    Register(
        "MEMORY_STATE",
        0x06C,
        Access.RW,
        "For the driver; memory may lose its content whenever this returns to 0.",
        _fields(("listed", 0, 1, "Page 0 of memory lists what it holds.")),
    ),
    Register(
        "EXPERT_BUFFER",
        0x070,
        Access.RO,
        "Size of the expert buffer; 0: there is none.",
        _fields(
            ("slots", 0, 8, "Experts of which it holds leading beats."),
            ("beats_log2", 8, 8, "log2 of the beats of each, on every channel."),
        ),
    ),
)

_COUNTERS = tuple(
    Register(
        f"{name.upper()}_{half}",
        COUNTERS_BASE + 8 * i + 4 * j,
        Access.RO,
        text if j == 0 else "High word; read high, low, high.",
    )
    for i, (name, text) in enumerate(COUNTERS)
    for j, half in enumerate(("LO", "HI"))
)

REGISTERS: dict[str, Register] = {register.name: register for register in _PLAIN + _COUNTERS}
"""Every register by name, in address order."""


def built_values(config: AcceleratorConfig) -> dict[str, int]:
    """Return what the registers read that say how a device was built."""
    slots, beats_log2 = REGISTERS["EXPERT_BUFFER"].fields
    log2 = max(1, config.buffer_beats).bit_length() - 1
    return {"CONFIG_HASH": config.digest,
            "EXPERT_BUFFER": config.buffer_slots << slots.offset | log2 << beats_log2.offset}

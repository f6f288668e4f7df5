"""Experts brought into the device's expert buffer before they are used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import numpy as np

from moeaccel.config import AcceleratorConfig
from moeaccel.host.errors import InvalidOption, LimitExceeded
from moeaccel.host.layers import Experts
from moeaccel.host.memory import COMMAND_ALIGNMENT
from moeaccel.host.options import whole
from moeaccel.host.rings import Command
from moeaccel.interface.commands import Opcode

if TYPE_CHECKING:
    from moeaccel.host.device import Device

__all__ = ["Prefetches", "check_buffer", "most_bytes"]

_IDS = COMMAND_ALIGNMENT // 4
"""Ids that fill a block of memory."""


def check_buffer(config: AcceleratorConfig) -> int:
    """Check that a device has an expert buffer, and return how many entries a PREFETCH may name.

    Raises
    ------
    LimitExceeded
        If it has none.
    """
    if not config.buffer_slots:
        raise LimitExceeded(f"config must have an expert buffer, and {config.name!r} has none; "
                            "take one with buffer_slots and buffer_beats")
    return min(config.buffer_slots, config.max_tokens)


def most_bytes(layer: Experts, expert: int) -> int:
    """Return how many bytes of an expert come, on all channels, when nothing of it is there."""
    config, blocks = layer.device.config, layer.row_blocks
    return config.channels * sum(
        min(config.buffer_beats * config.port_bytes, shape.image_bytes - shape.header_bytes)
        for shape in layer.shapes[expert * blocks : (expert + 1) * blocks])


class Prefetches:
    """What a device does that has an expert buffer; a base of :class:`moeaccel.host.device.Device`.

    The buffer has what memory had when PREFETCH ran. So whoever changes an image empties it first,
    as uploads do; nothing else that the driver writes can be one.
    """

    _may_hold = False
    """Whether something was brought since the buffer was emptied."""

    def prefetch(self, layer: Experts, ids: Iterable[int]) -> Command:
        """Bring experts of a layer into the expert buffer, where they are not there already.

        A command like any other, behind those submitted before, and not waited for: what fails is
        found by :meth:`Device.wait` and :meth:`Command.error`. As many leading bytes come as a slot
        has; calls take what is there from it, and the rest from memory. Bits are the same.

        Parameters
        ----------
        layer : :class:`Experts`
            Of this device.
        ids : iterable of int
            From 0 to its ``num_experts`` - 1, in any order, at least one; at most as many different
            ones, times its ``row_blocks``, as the buffer has slots.

        Raises
        ------
        LimitExceeded
            If the device has no expert buffer, or not so many slots, or tokens of a command.
        InvalidOption
            For another device's layer, or an id that it has not.
        """
        device = cast("Device", self)
        most = check_buffer(device.config)
        if not isinstance(layer, Experts) or layer.device is not device:
            raise InvalidOption("layer must be one of this device's load_experts(), not "
                                f"{type(layer).__name__} of another")
        if not isinstance(ids, Iterable):
            raise InvalidOption("ids must be some numbers of experts, such as [0, 3], not "
                                f"{type(ids).__name__}")
        named = list(dict.fromkeys(
            whole("ids", expert, least=0, most=layer.num_experts - 1,
                  unit=", those of the layer's experts") for expert in ids))
        blocks = layer.row_blocks
        entries = [blocks * expert + block for expert in named for block in range(blocks)]
        if not 1 <= len(entries) <= most:
            parts = f" of {blocks} row blocks each" if blocks > 1 else ""
            raise LimitExceeded(f"ids must name from 1 to {most // blocks} different experts{parts}"
                                f", as the buffer has {most} slots, not {len(named)}")
        padded = np.full(-(-len(entries) // _IDS) * _IDS, -1, "<i4")
        padded[: len(entries)] = entries
        with device._lock:
            kept = layer._kept()
            device._take()  # what completed meanwhile gives its buffers back
            buffers = device.memory.allocate(padded.nbytes, top=True)
            command = Command("PREFETCH", kept, buffers=buffers)
            command.give_back()  # nobody reads them
            try:
                device.transport.memory_write(buffers.address, padded.view(np.uint8))
                self._may_hold = True
                return device.submit({
                    "opcode": int(Opcode.PREFETCH), "tokens": len(entries), "top_k": 1,
                    "layer_address": kept[1].address, "ids_address": buffers.address}, command)
            except BaseException:
                if command not in device.in_flight:
                    buffers.free()
                raise

    def forget_experts(self) -> None:
        """Empty the expert buffer, behind what was submitted before, if anything was brought.

        For those who change an image in the device's memory without this driver; uploads do it.
        """
        device = cast("Device", self)
        with device._lock:
            if self._may_hold:
                device.submit({"opcode": int(Opcode.FORGET)}, Command("FORGET"))
                self._may_hold = False

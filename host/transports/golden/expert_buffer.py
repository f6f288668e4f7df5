"""The expert buffer of the golden device, and its counters."""

from __future__ import annotations

import copy
from dataclasses import replace

from moeaccel.config import AcceleratorConfig
from moeaccel.golden import expert_buffer
from moeaccel.host.transports.golden.register_file import RegisterFile

__all__ = ["ExpertBuffer"]


class ExpertBuffer(expert_buffer.ExpertBuffer[int]):
    """What the device holds of images, by their address; bytes are those on each channel.

    Only which bytes it has is modelled. Hardware keeps what they were when they came; here they are
    those that memory has now, so the two differ where the host changes an image that is held.

    Parameters
    ----------
    config : :class:`AcceleratorConfig`
    registers : :class:`RegisterFile`
        Whose counters count what it does.
    """

    def __init__(self, config: AcceleratorConfig, registers: RegisterFile) -> None:
        super().__init__(config.buffer_slots, config.buffer_beats * config.port_bytes,
                         unit=config.port_bytes)
        self._channels = config.channels
        self._registers = registers

    def snapshot(self) -> object:
        """Return what it holds, for :meth:`restore`."""
        return copy.deepcopy(self._held) if self.slots else {}

    def restore(self, snapshot: object) -> None:
        """Hold what it held then."""
        assert isinstance(snapshot, dict)
        self._held = snapshot

    def reset(self) -> None:
        """Forget all, and count nothing."""
        self._held = {}

    def load(self, key: int, image_bytes: int, *, most: int | None = None) -> int:
        before = replace(self.counts)
        moved = super().load(key, image_bytes, most=most)
        self._count(before)
        self._registers.count(bytes_read_weights=self._channels * moved)
        return moved

    def use(self, key: int, image_bytes: int) -> int:
        if not self.slots:
            return 0
        before = replace(self.counts)
        valid = super().use(key, image_bytes)
        self._count(before)
        return valid

    def forget(self) -> None:
        before = replace(self.counts)
        super().forget()
        self._count(before)

    def _count(self, before: expert_buffer.Counts) -> None:
        """Count what has happened since."""
        now, channels = self.counts, self._channels
        self._registers.count(
            buffer_hits=now.hits + now.partial - before.hits - before.partial,
            buffer_misses=now.misses - before.misses,
            bytes_buffered=channels * (now.hit_bytes - before.hit_bytes),
            bytes_prefetched=channels * (now.fetched_bytes - before.fetched_bytes),
            bytes_wasted=channels * (now.wasted_bytes - before.wasted_bytes))

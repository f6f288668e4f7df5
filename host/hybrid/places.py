"""Where the only copy of each image of a layer is: in the accelerator's memory, or away from it.

An image that is away is held as the accelerator had it, bit for bit, and its place there is free
for others; its entry of the expert table leads to address 0, which no command may read. Every step
leaves the image where it was, or where it goes, whatever goes wrong: bytes are read before a place
is given up, and forgotten after they were written. An entry that could not be written is written
first thing at the next call.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeaccel.host.errors import DeviceClosed
from moeaccel.host.layers import Experts
from moeaccel.host.memory import PAGE, Allocation
from moeaccel.host.transports.base import Bytes
from moeaccel.host.weights import upload
from moeaccel.image import expert_table
from moeaccel.interface.commands import ENTRY_BYTES

__all__ = ["Places", "bring_home", "image_parts"]


class Places:
    """The images of a layer, each in memory of its own; stands in the place of their allocation.

    Parameters
    ----------
    whole : :class:`Allocation`
        Of all images.
    sizes : sequence of :class:`int`
        Of each.
    """

    def __init__(self, whole: Allocation, sizes: Sequence[int]) -> None:
        self._parts: list[Allocation | None] = [*whole.split(sizes)]
        self._away: dict[int, list[Bytes]] = {}
        self._unwritten: set[int] = set()

    @classmethod
    def of(cls, experts: Experts) -> Places:
        """Return those of a layer, whose images have one copy from now on.

        Raises
        ------
        DeviceClosed
            If it was closed.
        """
        images = _images(experts)
        if not isinstance(images, Places):
            images = experts._images = cls(images, [s.memory_bytes for s in experts.shapes])
        return images

    @property
    def away(self) -> list[int]:
        """Experts whose images are not in the accelerator's memory."""
        return sorted(self._away)

    def free(self) -> None:
        """Give all memory back."""
        for part in self._parts:
            if part is not None:
                part.free()

    def parts(self, experts: Experts, expert: int) -> list[Bytes]:
        """Return the bytes of an image on each channel, wherever it is."""
        held = self._away.get(expert)
        part = self._parts[expert]
        if held is not None:
            return held
        assert part is not None
        return _read(experts, part.address, experts.shapes[expert].memory_bytes)

    def take(self, experts: Experts, expert: int) -> None:
        """Let an image be away from the accelerator's memory, and its place there be free.

        Commands in flight still find it: they are waited for, and no other begins meanwhile.
        """
        part = self._parts[expert]
        if part is None:
            return
        with experts.device._lock:
            experts._drain()
            held = self.parts(experts, expert)
            self._unwritten.add(expert)
            self._away[expert] = held
            self.settle(experts)
            self._parts[expert] = None
            part.free()

    def give_back(self, experts: Experts, expert: int) -> None:
        """Bring an image back into the accelerator's memory, wherever there is room.

        Raises
        ------
        OutOfDeviceMemory
            If others took the room; the image stays where it is.
        """
        if expert not in self._away:
            return
        part = self._parts[expert]
        device, size = experts.device, experts.shapes[expert].memory_bytes
        if part is None:
            part = device.memory.allocate(size, alignment=PAGE, keeps=True)
            with device._lock:
                device._residents.enter(part.address, [size])
            upload(device, part.address, self._away[expert], f"expert {expert}")
            self._parts[expert] = part
        self._unwritten.add(expert)
        del self._away[expert]
        self.settle(experts)

    def settle(self, experts: Experts) -> None:
        """Write the entries of the expert table that changed."""
        device = experts.device
        for expert in sorted(self._unwritten):
            shape, part = experts.shapes[expert], self._parts[expert]
            here = expert not in self._away and part is not None
            address = part.address + shape.header_bytes if here and part is not None else 0
            with device._lock:
                device.transport.memory_write(
                    experts._descriptor.address + ENTRY_BYTES * (1 + expert),
                    expert_table([shape], [address]))
            self._unwritten.discard(expert)


def _images(experts: Experts) -> Allocation | Places:
    images = experts._images
    if images is None:
        raise DeviceClosed("layer must not be used after it was closed; load it again")
    return images


def _read(experts: Experts, address: int, size: int) -> list[Bytes]:
    config, device = experts.device.config, experts.device
    with device._lock:
        return [device.transport.memory_read(config.device_address(channel, address), size)
                for channel in range(experts.shapes[0].channels)]


def image_parts(experts: Experts, expert: int) -> list[Bytes]:
    """Return the bytes of an image on each channel, header and all.

    Raises
    ------
    DeviceClosed
        If the layer was closed.
    """
    images = _images(experts)
    if isinstance(images, Places):
        return images.parts(experts, expert)
    before = sum(shape.memory_bytes for shape in experts.shapes[:expert])
    return _read(experts, images.address + before, experts.shapes[expert].memory_bytes)


def bring_home(experts: Experts) -> None:
    """Bring all images of a layer back into the accelerator's memory, for whoever runs it next.

    Raises
    ------
    OutOfDeviceMemory
        If others took the room; what is away stays there.
    """
    images = _images(experts)
    if isinstance(images, Places):
        images.settle(experts)
        for expert in images.away:
            images.give_back(experts, expert)

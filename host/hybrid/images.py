"""Images of experts, read back from the accelerator's memory: what moves to the torch device."""

from __future__ import annotations

import itertools

from moeaccel.host.errors import DeviceClosed
from moeaccel.host.layers import Experts
from moeaccel.image import Expert, unpack_section

__all__ = ["image_bytes", "read_expert"]


def image_bytes(experts: Experts, expert: int) -> int:
    """Return how many bytes an image has without its header, on all channels."""
    shape = experts.shapes[expert]
    return shape.channels * sum(s.words * s.word_bytes for s in shape.sections)


def read_expert(experts: Experts, expert: int) -> Expert:
    """Return an expert as it is in the accelerator's memory, filled up to whole blocks.

    Raises
    ------
    DeviceClosed
        If the layer was closed.
    """
    images = experts._images
    if images is None:
        raise DeviceClosed("layer must not be used after it was closed; load it again")
    shape = experts.shapes[expert]
    address = images.address + shape.header_bytes + sum(
        one.memory_bytes for one in itertools.islice(experts.shapes, expert))
    config, device = experts.device.config, experts.device
    matrices = []
    for index, section in enumerate(shape.sections):
        size = section.words * section.word_bytes
        with device._lock:
            words = [device.transport.memory_read(config.device_address(channel, address), size)
                     for channel in range(shape.channels)]
        matrices.append(unpack_section(words, section, together=1 if index else shape.rows_of_h))
        address += size
    gate_up, down = matrices
    return Expert(gate_up, down, shape.activation, shape.limit, shape.gate_limit)

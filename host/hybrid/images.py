"""Images of experts, read back from the accelerator's memory: what moves to the torch device."""

from __future__ import annotations

from moeaccel.host.hybrid.places import image_parts
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
    shape = experts.shapes[expert]
    parts = image_parts(experts, expert)
    matrices, begin = [], shape.header_bytes
    for index, section in enumerate(shape.sections):
        end = begin + section.words * section.word_bytes
        matrices.append(unpack_section([part[begin:end] for part in parts], section,
                                       together=1 if index else shape.rows_of_h))
        begin = end
    gate_up, down = matrices
    return Expert(gate_up, down, shape.activation, shape.limit, shape.gate_limit)

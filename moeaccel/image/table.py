"""The expert table: for each expert of a layer, what the device must know to stream its image."""

from __future__ import annotations

from collections.abc import Sequence

from moeaccel.activations import activation
from moeaccel.image.expert import ExpertShape, LinearShape, gate_limit_bits, limit_bits
from moeaccel.interface.commands import EXPERT, Operand, Sink, encode

__all__ = ["expert_table", "sinks", "table_entry"]


def sinks(shape: ExpertShape | LinearShape) -> tuple[Sink, ...]:
    """Return where the results of each section go."""
    if isinstance(shape, LinearShape):
        return (Sink.COMBINE,)
    return (Sink.ACTIVATION_PRODUCT if shape.second_up else
            Sink.ACTIVATION if shape.gated else Sink.ACTIVATION_ROWS), Sink.COMBINE


def table_entry(shape: ExpertShape | LinearShape, image_address: int) -> dict[str, int]:
    """Return the fields of an expert's entry (:data:`moeaccel.interface.commands.EXPERT`).

    Parameters
    ----------
    shape : :class:`ExpertShape` or :class:`LinearShape`
    image_address : :class:`int`
        Of the first word, ``shape.header_bytes`` behind the image's first byte.
    """
    sections = shape.sections
    entry = {"sections": len(sections), "image_address": image_address}
    if isinstance(shape, ExpertShape):
        entry |= {"activation": activation(shape.activation).code, "d_expert": shape.down.k,
                  "limit": limit_bits(shape.limit),
                  "gate_limit": gate_limit_bits(shape.gate_limit)}
    for index, (section, sink) in enumerate(zip(sections, sinks(shape), strict=True)):
        entry |= {
            f"format{index}": section.format.code,
            f"operand{index}": int(Operand.HIDDEN if index else Operand.X),
            f"sink{index}": int(sink),
            f"bias{index}": int(section.biased),
            f"words{index}": section.words}
    return entry


def expert_table(shapes: Sequence[ExpertShape | LinearShape], addresses: Sequence[int]) -> bytes:
    """Return the table of experts with these shapes, 64 bytes each.

    Parameters
    ----------
    shapes : sequence of :class:`ExpertShape` or :class:`LinearShape`
    addresses : sequence of :class:`int`
        Of the first words of their images.
    """
    return b"".join(encode(EXPERT, table_entry(shape, address))
                    for shape, address in zip(shapes, addresses, strict=True))

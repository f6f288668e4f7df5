"""Images: built from an expert or a matrix, checked, and taken apart again.

The fields of a header are in docs/images.md; dimensions are in whole blocks, and zeros fill it up.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from moeaccel.errors import ImageError
from moeaccel.formats import ALL_FORMATS, BLOCK, QuantisedMatrix, WeightFormat, whole_blocks
from moeaccel.image.expert import HEADER_BYTES, Expert, ExpertShape, LinearShape
from moeaccel.image.sections import Bytes, deal, pack_section, unpack_section
from moeaccel.image.table import sinks
from moeaccel.interface.commands import SECTIONS_MAX, Sink

__all__ = ["HEADER_USED", "MAGIC", "VERSION", "build_image", "build_linear_image", "check_image",
           "unpack_image"]

MAGIC = 0x4558_4F4D  # "MOXE" in memory order
VERSION = 3
_HEAD = struct.Struct("<IHBBBB2B2B2BII2I")
_CRC = struct.Struct("<I")
HEADER_USED = _HEAD.size + _CRC.size
"""Bytes of a header that are not always 0."""


def build_image(
    gate_up: QuantisedMatrix,
    down: QuantisedMatrix,
    row_multipliers: int,
    *,
    channel: int = 0,
    channels: int = 1,
) -> Bytes:
    """Return the image of one expert, or a channel's part of it, header included.

    Dimensions are filled up with zeros to multiples of 32, and the header has those.

    Parameters
    ----------
    gate_up : :class:`QuantisedMatrix`
        As of an :class:`Expert`.
    down : :class:`QuantisedMatrix`
        (d_model, d_expert); its format may be another one.
    row_multipliers : :class:`int`
        Of the array that will read it.
    channel, channels : :class:`int`
    """
    filled = Expert(gate_up, down).filled()
    shape = filled.shape(row_multipliers, channels)
    payload = np.concatenate([
        pack_section(deal(matrix, row_multipliers, channel, channels, together), row_multipliers)
        for matrix, together in ((filled.gate_up, shape.rows_of_h), (filled.down, 1))])
    head = _header(shape, shape.d_model, shape.d_expert, channel, payload)
    return np.concatenate([head, payload])


def build_linear_image(
    matrix: QuantisedMatrix, row_multipliers: int, *, channel: int = 0, channels: int = 1
) -> Bytes:
    """Return the image of one linear layer, (d_out, d_in), or a channel's part of it; filled up as
    in :func:`build_image`."""
    d_out, d_in = (whole_blocks(dim) for dim in matrix.integers.shape)
    matrix = matrix.filled(d_out, d_in)
    shape = LinearShape(
        matrix.format, d_out, d_in, row_multipliers, channels, matrix.bias is not None)
    payload = pack_section(deal(matrix, row_multipliers, channel, channels, 1), row_multipliers)
    return np.concatenate([_header(shape, d_out, d_in, channel, payload), payload])


def _header(shape: ExpertShape | LinearShape, first_dim: int, second_dim: int, channel: int,
            payload: Bytes) -> Bytes:
    """Return an image's header for its payload."""
    sections = shape.sections
    none = [0] * (SECTIONS_MAX - len(sections))
    head = _HEAD.pack(
        MAGIC, VERSION, len(sections), shape.row_multipliers, channel, shape.channels - 1,
        *[section.format.code for section in sections], *none, *sinks(shape), *none,
        *[int(section.biased) for section in sections], *none,
        first_dim, second_dim,
        *[section.words for section in sections], *none)
    raw = head + _CRC.pack(zlib.crc32(payload.data, zlib.crc32(head)))
    return np.frombuffer(raw.ljust(shape.header_bytes, b"\0"), np.uint8)


def check_image(image: Bytes, *, channel: int = 0) -> ExpertShape:
    """Check an image's header and CRC-32 and return its shape.

    Activation and limit are not the image's: an expert table names them.

    Parameters
    ----------
    image : uint8 array
    channel : :class:`int`
        Whose part it must be.

    Raises
    ------
    ImageError
        Naming what is wrong.
    """
    if len(image) < HEADER_BYTES:
        raise ImageError(f"image must be at least {HEADER_BYTES} bytes, not {len(image)}")
    raw = image[:HEADER_BYTES].tobytes()
    (magic, version, sections, row_multipliers, found_channel, last_channel, code, down_code, sink,
     last_sink, biased, down_biased, d_model, d_expert, *words) = _HEAD.unpack_from(raw)
    if magic != MAGIC:
        raise ImageError(
            f"image must start with {MAGIC:#010x}, not {magic:#010x}; this is no expert image"
        )
    if version != VERSION:
        raise ImageError(f"image version must be {VERSION}, not {version}; build the image again")
    if sections != 2:
        raise ImageError(
            f"image must have the 2 sections of an expert, not {sections}; a linear layer has 1")
    fmt, down_format = _format(code, "gate and up"), _format(down_code, "down")
    if found_channel != channel:
        raise ImageError(
            f"image must be the part of channel {channel}, not of {found_channel} of "
            f"{last_channel + 1} channels"
        )
    if (not d_model or not d_expert or not row_multipliers
            or d_model % BLOCK or d_expert % BLOCK):
        raise ImageError(
            f"image dimensions must be positive multiples of {BLOCK}, not {d_model} and "
            f"{d_expert}, for 1 row multiplier or more, not {row_multipliers}; its header was "
            "damaged, load it again"
        )
    shape = ExpertShape(fmt, d_model, d_expert, row_multipliers, last_channel + 1,
                        down_format=down_format, gated=sink != Sink.ACTIVATION_ROWS,
                        second_up=sink == Sink.ACTIVATION_PRODUCT,
                        gate_up_biased=bool(biased), down_biased=bool(down_biased))
    if (sink, last_sink) != sinks(shape):
        raise ImageError(f"image sinks must be {[int(s) for s in sinks(shape)]}, or 2 or 3 in the "
                         f"first place, not {[sink, last_sink]}; its header was damaged, load it "
                         "again")
    if biased > 1 or down_biased > 1:
        raise ImageError(f"image must say of biases that they are there, 1, or not, 0, not "
                         f"{[biased, down_biased]}; its header was damaged, load it again")
    if words != [s.words for s in shape.sections] or len(image) < shape.image_bytes:
        raise ImageError(
            f"image must be {shape.image_bytes} bytes for its header, "
            f"not {len(image)}; it is truncated"
        )
    (crc,) = _CRC.unpack_from(raw, _HEAD.size)
    payload = np.ascontiguousarray(image[shape.header_bytes : shape.image_bytes])
    found = zlib.crc32(payload.data, zlib.crc32(raw[: _HEAD.size]))
    if found != crc:
        raise ImageError(
            f"image CRC-32 must be {crc:#010x}, not {found:#010x}; it was damaged, load it again"
        )
    return shape


def _format(code: int, what: str) -> WeightFormat:
    """Return the format with that code."""
    for fmt in ALL_FORMATS.values():
        if fmt.code == code:
            return fmt
    raise ImageError(f"image format code of {what} must be one of "
                     f"{[f.code for f in ALL_FORMATS.values()]}, not {code}")


def unpack_image(*parts: Bytes) -> Expert:
    """Check an expert's image and return the expert: the inverse of :func:`build_image`.

    Parameters
    ----------
    *parts : uint8 array
        The parts of all channels, in their order.

    Raises
    ------
    ImageError
        Naming what is wrong.
    """
    shapes = {check_image(part, channel=channel) for channel, part in enumerate(parts)}
    if len(shapes) != 1 or (shape := shapes.pop()).channels != len(parts):
        raise ImageError(
            f"parts must be all those of one image, not {len(parts)} of {sorted(map(str, shapes))}")
    split = shape.header_bytes + shape.gate_up.words * shape.gate_up.word_bytes
    return Expert(
        unpack_section([p[shape.header_bytes : split] for p in parts], shape.gate_up,
                       together=shape.rows_of_h),
        unpack_section([p[split : shape.image_bytes] for p in parts], shape.down))

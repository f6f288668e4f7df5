"""Images: built from an expert or a matrix, checked, and taken apart again."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from moeaccel.errors import ImageError
from moeaccel.formats import BLOCK, FORMATS, QuantisedMatrix, whole_blocks
from moeaccel.image.expert import HEADER_BYTES, Expert, ExpertShape, LinearShape
from moeaccel.image.sections import Bytes, deal, pack_section, unpack_section

__all__ = ["MAGIC", "VERSION", "build_image", "build_linear_image", "check_image", "unpack_image"]

MAGIC = 0x4558_4F4D  # "MOXE" in memory order
VERSION = 1
HEADER = struct.Struct("<IHBBIIIIIBB")


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
        unpack_section([p[shape.header_bytes : split] for p in parts], shape.gate_up, paired=True),
        unpack_section([p[split : shape.image_bytes] for p in parts], shape.down, paired=False))


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
        (2 d_expert, d_model), rows interleaved (:func:`interleave_gate_up`).
    down : :class:`QuantisedMatrix`
        (d_model, d_expert).
    row_multipliers : :class:`int`
        Of the array that will read it.
    channel, channels : :class:`int`
    """
    filled = Expert(gate_up, down).filled()
    gate_up, down = filled.gate_up, filled.down
    shape = ExpertShape(gate_up.format, gate_up.integers.shape[1], down.integers.shape[1],
                        row_multipliers, channels)
    payload = np.concatenate([
        pack_section(deal(matrix, row_multipliers, channel, channels, together), row_multipliers)
        for matrix, together in ((gate_up, 2), (down, 1))])
    words = shape.gate_up.words, shape.down.words
    head = _header(shape, shape.d_model, shape.d_expert, words, channel, payload)
    return np.concatenate([head, payload])


def build_linear_image(
    matrix: QuantisedMatrix, row_multipliers: int, *, channel: int = 0, channels: int = 1
) -> Bytes:
    """Return the image of one linear layer, (d_out, d_in), or a channel's part of it; filled up as
    in :func:`build_image`."""
    d_out, d_in = (whole_blocks(dim) for dim in matrix.integers.shape)
    matrix = matrix.filled(d_out, d_in)
    shape = LinearShape(matrix.format, d_out, d_in, row_multipliers, channels)
    payload = pack_section(deal(matrix, row_multipliers, channel, channels, 1), row_multipliers)
    head = _header(shape, shape.d_out, shape.d_in, (0, shape.section.words), channel, payload)
    return np.concatenate([head, payload])


def _header(
    shape: ExpertShape | LinearShape,
    first_dim: int,
    second_dim: int,
    words: tuple[int, int],
    channel: int,
    payload: Bytes,
) -> Bytes:
    """Return an image's header for its payload."""
    raw = HEADER.pack(
        MAGIC,
        VERSION,
        shape.format.code,
        shape.row_multipliers,
        first_dim,
        second_dim,
        *words,
        zlib.crc32(payload.data),
        channel,
        shape.channels - 1,
    )
    return np.frombuffer(raw.ljust(shape.header_bytes, b"\0"), np.uint8)


def check_image(image: Bytes, *, channel: int = 0) -> ExpertShape:
    """Check an image's header and CRC-32 and return its shape.

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
    (magic, version, code, row_multipliers, d_model, d_expert, gate_up, down, crc, found_channel,
     last_channel) = HEADER.unpack_from(image.tobytes())
    if magic != MAGIC:
        raise ImageError(
            f"image must start with {MAGIC:#010x}, not {magic:#010x}; this is no expert image"
        )
    if version != VERSION:
        raise ImageError(f"image version must be {VERSION}, not {version}; build the image again")
    fmt = next((f for f in FORMATS.values() if f.code == code), None)
    if fmt is None:
        raise ImageError(
            f"image format code must be one of {[f.code for f in FORMATS.values()]}, not {code}"
        )
    if found_channel != channel:
        raise ImageError(
            f"image must be the part of channel {channel}, not of {found_channel} of "
            f"{last_channel + 1} channels"
        )
    if not d_model or not d_expert or d_model % BLOCK or d_expert % BLOCK:
        raise ImageError(
            f"image dimensions must be positive multiples of {BLOCK}, not {d_model} and "
            f"{d_expert}; its header was damaged, load it again"
        )
    shape = ExpertShape(fmt, d_model, d_expert, row_multipliers, last_channel + 1)
    if (gate_up, down) != (shape.gate_up.words, shape.down.words) or len(image) < shape.image_bytes:
        raise ImageError(
            f"image must be {shape.image_bytes} bytes for its header, "
            f"not {len(image)}; it is truncated"
        )
    found = zlib.crc32(np.ascontiguousarray(image[shape.header_bytes : shape.image_bytes]).data)
    if found != crc:
        raise ImageError(
            f"image CRC-32 must be {crc:#010x}, not {found:#010x}; it was damaged, load it again"
        )
    return shape

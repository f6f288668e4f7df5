"""Expert images: an expert's weights in the order in which the device consumes them.

An image is a header, then a section for each matrix: the gate/up rows, then the down rows, each in
a format of its own; that of a linear layer has one section. Everything after the header is a
sequence of *array words* of ``32 * row_multipliers`` bytes. A tile is ``R`` consecutive rows (R =
2 * row_multipliers in 4-bit formats, else row_multipliers); gate and up rows alternate (g0, u0, g1,
u1, ...), so that a pair is always in one tile. For each section::

    for tile in tiles:
        if tile % tiles_per_row_word == 0:
            row word: R int16 row exponents for each of the next tiles; of a section with biases R
                row exponents, then R bfloat16 biases, for each
        for step in range(K / 32):
            if step % steps_per_group == 0:
                if entry % entries_per_scale_word == 0:
                    scale word: R scales for each of the next groups
                entry += 1
            if N:M, before the first and each fourth step of the section:
                pattern word: the places of the weights of the next 4 steps
            weight word: R x 32 weights, of N:M formats those that are stored

Where the device has several channels, an image has a part for each, a whole image with a header of
its own, and all parts of an expert lie at the same address, each in its channel's memory. Rows are
dealt one by one: row r of down is row ``r // channels`` of the part of channel ``r % channels``,
and so it is with pairs of gate and up, or fours with second up rows. A part's last tile is filled
up with rows of zeros, for which the device has no output.

Inside a weight word, byte ``rm * 32 + k`` holds column k of row rm (8-bit), or of rows 2 rm (low
nibble) and 2 rm + 1 (high nibble). In 2-bit formats a word has two steps, the first in the lower
halves of all nibbles; the last word of a tile may have one, and scales come in pairs. In N:M
formats byte ``rm * 32 + 4 g + N p + j`` holds the j-th stored one of columns 4 g to 4 g + 3 of row,
or pair of rows, ``4 / N * rm + p``; two bits at the same place of a step's quarter of a pattern
word say which column. Entries of row and scale words are packed from the least significant bit, row
0 first; numbers are little-endian. Padding at the end of a section is zero.
"""

from moeaccel.image.expert import (
    ALIGNMENT,
    HEADER_BYTES,
    Expert,
    ExpertShape,
    LinearShape,
    gate_limit_bits,
    interleave_gate_up,
    limit_bits,
)
from moeaccel.image.images import (
    HEADER_USED,
    VERSION as IMAGE_VERSION,
    build_image,
    build_linear_image,
    check_image,
    unpack_image,
)
from moeaccel.image.sections import (
    STEPS_PER_PATTERN_WORD,
    Section,
    pack_section,
    unpack_section,
)
from moeaccel.image.table import expert_table, table_entry

__all__ = [
    "ALIGNMENT", "HEADER_BYTES", "HEADER_USED", "IMAGE_VERSION", "STEPS_PER_PATTERN_WORD", "Expert",
    "ExpertShape", "LinearShape", "Section", "build_image", "build_linear_image", "check_image",
    "expert_table", "gate_limit_bits", "interleave_gate_up", "limit_bits", "pack_section",
    "table_entry", "unpack_image", "unpack_section"]

"""Expert images: an expert's weights in the order in which the device consumes them.

An image is a header, then a section for each matrix: the gate/up rows, then the down rows, each in
a format of its own; that of a linear layer has one section. Everything after the header is a
sequence of *array words* of ``32 * row_multipliers`` bytes. docs/images.md has the order of the
words and every bit of them; :class:`Section` has the numbers.
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

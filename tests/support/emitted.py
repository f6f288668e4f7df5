"""What the smallest configuration is emitted as; making it takes a while."""

import functools

from moeaccel.config import PRESETS
from moeaccel.hdl.verilog.emission import emit


@functools.cache
def emitted(family):
    """Return the files of ``tiny``, called ``core``, for a family of multipliers."""
    return emit(PRESETS["tiny"], family=family, name="core")

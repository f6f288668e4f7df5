"""Cycles that the RTL took, of small commands on ``tiny`` behind an ideal memory.

tests/system/test_cycles.py measures many more; these need no simulator. Each was measured there,
and is to be measured again when the cycles of the RTL change.
"""

import numpy as np
import pytest

from moeaccel.config import PRESETS
from moeaccel.cycles import expert_cycles, linear_cycles
from moeaccel.formats import weight_format
from moeaccel.image import ExpertShape, Section

TINY = PRESETS["tiny"]
EACH = (0, 1, 2, 3)


@pytest.mark.parametrize(("latency", "name", "d_model", "d_expert", "planes", "experts", "ids",
                          "cycles"), [
    # One expert, tokens for one pass, and for several.
    (1, "mxfp4", 64, 224, 2, 4, [[0]], 3280),
    (1, "mxint8", 32, 32, 2, 1, [[0]] * 5, 1980),
    (7, "mxint8", 160, 64, 1, 2, [[1], [1]], 4659),
    (7, "int4_g32", 160, 32, 1, 1, [[0]] * 5, 3600),
    (1, "int4_g64", 64, 32, 1, 1, [[0]] * 5, 1682),
    (40, "int4_g32", 160, 32, 1, 3, [[1, 0], [2, 1], [0, 1]], 5788),
    # Passes that keep their tokens, and such that do not: partial sums come and go.
    (7, "int4_g64", 32, 160, 1, 4, [EACH] * 3, 7241),
    (1, "int4_g64", 32, 96, 2, 4, [[3, 2, 0, 1], [3, 0, 1, 2], [3, 2, 1, 0], EACH], 7877),
    (40, "mxfp4", 32, 192, 2, 2, [[0, 1]] * 5, 10861),
    (40, "mxint8", 32, 128, 1, 3, [[0], [2], [0], [1]], 5581),
    # Tokens without an expert: their rows of zeros are written while entries are read.
    (40, "mxfp4", 64, 64, 1, 3, [[2, -1, -1], [1, -1, 0]], 3182),
    (1, "mxint8", 224, 32, 1, 2, [[1], [-1], [1], [1], [0]], 7360),
    (7, "mxfp4", 96, 32, 1, 2, [[1], [-1]], 1065),
])
def test_experts(latency, name, d_model, d_expert, planes, experts, ids, cycles):
    shape = ExpertShape(weight_format(name), d_model, d_expert, TINY.row_multipliers)
    assert expert_cycles(
        TINY, shape, np.array(ids), experts, planes=planes, latency=latency) == cycles


@pytest.mark.parametrize(("latency", "name", "d_in", "d_out", "planes", "tokens", "cycles"), [
    (7, "int4_g128", 64, 64, 2, 1, 565),
    (40, "mxfp4", 64, 32, 2, 4, 1005),
    (40, "mxint8", 96, 32, 1, 1, 874),
])
def test_gemm(latency, name, d_in, d_out, planes, tokens, cycles):
    section = Section(weight_format(name), d_out, d_in, TINY.row_multipliers)
    assert linear_cycles(TINY, section, tokens, planes=planes, latency=latency) == cycles

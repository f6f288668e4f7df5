"""Requests are as long as the configuration allows, and their counts of beats hold them."""

import pytest

from moeaccel.config import PRESETS
from moeaccel.hdl import layouts
from moeaccel.interface.commands import ENTRY_BYTES

TINY = PRESETS["tiny"]
MANY = TINY.replace(name="many pairs", max_assignments=1 << 17, max_tokens=1 << 16,
                    token_groups=64)
LONG = TINY.replace(name="long rows", max_dim=32768, tile_words=1024)
LEAST = TINY.replace(name="least", max_dim=64, max_assignments=16, port_bytes=64,
                     quantiser_lanes=8)


@pytest.mark.parametrize("config", [*PRESETS.values(), MANY, LONG, LEAST], ids=lambda c: c.name)
def test_every_request_fits_its_count_of_beats(config):
    sizes = {
        "entry": ENTRY_BYTES, "ids": 4 * config.max_assignments, "x": 4 * config.max_dim,
        "y": 4 * config.max_dim, "partial sums": 8 * config.max_dim,
        "weights": config.max_burst_beats * config.port_bytes,
    }
    most = max(-(-size // config.port_bytes) for size in sizes.values())
    assert layouts.most_beats(config) == most
    assert layouts.read_request(config)["beats"].width == most.bit_length()

import dataclasses
import json
import re

import pytest

from moeaccel.config import PRESETS, AcceleratorConfig, preset
from moeaccel.errors import ConfigurationError
from moeaccel.formats import ALL_FORMATS, FORMATS


@pytest.mark.parametrize("name", PRESETS)
def test_accumulator_holds_the_largest_sum(name):
    config = PRESETS[name]
    for fmt in config.weight_formats:
        scale = (2047 if fmt.real_scale else 1) << fmt.max_shift
        largest = config.max_steps * 32 * 128 * fmt.max_integer * scale << 11
        assert largest < 1 << (config.accumulator_bits - 1)
        assert largest <= 1 << 53  # a float64 product of integers never rounds


def test_widths_close_at_the_largest_dimension():
    config = PRESETS["wide512"].replace(max_dim=32768, tile_words=1024)
    assert config.accumulator_bits <= 54


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("port_bytes", 12, "a power of two from 8 to 64"),
        ("channels", 64, "a power of two from 1 to 32"),
        ("row_multipliers", 1, "a power of two from 2 to 16"),
        ("token_lanes", 3, "a power of two from 2 to 64"),
        ("max_dim", 100, "a multiple of 32 from 64 to 32768"),
        ("quantiser_lanes", 32, "a power of two from 1 to 4"),
        ("y_banks", 4, "a power of two from 1 to 2"),
        ("results_per_cycle", 3, "a power of two from 1 to 2"),
        ("tile_words", 4, "a power of two from 16"),
        ("address_bits", 8, "from 16 to 64"),
        ("router", ("tanh",), "a tuple of different ones of softmax, sigmoid, sqrt_softplus"),
        ("router", ("softmax", "softmax"), "a tuple of different ones of softmax"),
        ("router_top_k", 17, "from 1 to 16"),
        ("router_modes", ("prior", "prior"), "a tuple of different ones of threshold, top_p"),
        ("router_modes", ("prior",), "empty without a router"),
        ("buffer_slots", 65, "from 0 to 64"),
        ("buffer_slots", -1, "from 0 to 64"),
        ("buffer_beats", 64, "0 without buffer_slots"),
        ("formats", (), "a tuple of different ones of mxint8"),
        ("formats", ("int4_g32", "int4_g32"), "a tuple of different ones of mxint8"),
        ("formats", ("int5",), "a tuple of different ones of mxint8"),
        ("formats", ("mxint8",), "with a 4-bit format among them"),
    ],
)
def test_bad_field_is_named(field, value, expected):
    message = f"{field} must be {expected}.*not {re.escape(repr(value))}"
    with pytest.raises(ConfigurationError, match=message):
        PRESETS["tiny"].replace(**{field: value})


def test_sums_that_leave_keep_up_with_the_port():
    with pytest.raises(ConfigurationError, match=r"quantiser_lanes must be .* from 8 to 32, not 4"):
        PRESETS["small"].replace(quantiser_lanes=4)


@pytest.mark.parametrize("beats", [0, 4, 100, 1 << 17])
def test_beats_of_a_buffer(beats):
    """At least an array word, of 8 beats here."""
    with pytest.raises(ConfigurationError, match="buffer_beats must be a power of two from 8 to "
                                                 f"65536, not {beats}"):
        PRESETS["tiny"].replace(buffer_slots=2, buffer_beats=beats)


def test_a_field_that_there_is_not_is_named():
    with pytest.raises(ConfigurationError, match=r"among name, .*port_bytes, .*, not bogus"):
        PRESETS["tiny"].replace(bogus=1, port_bytes=16)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        ConfigurationError,
        match="tiny, small, ulx3s, wide512, hbm32, peer256, ulx3s-router, ulx3s-sparse, "
              "wide512-sparse, hbm32-full, not 'huge'",
    ):
        preset("huge")


def test_digest_depends_on_every_field_but_the_name():
    config = PRESETS["tiny"]
    assert config.replace(name="other").digest == config.digest
    changed = {
        "port_bytes": 16,
        "channels": 2,
        "row_multipliers": 4,
        "token_lanes": 4,
        "token_groups": 4,
        "max_dim": 512,
        "max_experts": 32,
        "max_tokens": 128,
        "max_assignments": 512,
        "read_ahead_beats": 256,
        "tile_words": 32,
        "quantiser_lanes": 1,
        "address_bits": 32,
        "formats": ("mxfp4",),
        "y_banks": 2,
        "results_per_cycle": 2,
    }
    digests = {config.replace(**{field: value}).digest for field, value in changed.items()}
    assert len(digests) == len(changed) and config.digest not in digests


def test_digest_and_widths_depend_on_what_formats_mean(monkeypatch):
    config = PRESETS["tiny"]
    digest = config.digest
    narrow = config.replace(formats=("mxfp4",))
    assert narrow.accumulator_bits == config.accumulator_bits - 1  # a block of mxfp4 has 31 bits
    monkeypatch.setitem(ALL_FORMATS, "mxfp4", dataclasses.replace(FORMATS["mxfp4"], max_shift=14))
    assert config.digest != digest


def test_codes_beyond_the_first_four_have_room():
    for config in PRESETS.values():
        assert max(f.code for f in config.weight_formats) < 1 << config.format_bits


def test_a_device_address_has_the_channel_above_the_address():
    config = PRESETS["tiny"].replace(channels=4, address_bits=29)
    assert config.device_address_bits == 31
    assert config.device_address(3, 0x1000) == 3 << 29 | 0x1000
    with pytest.raises(ConfigurationError, match="address_bits must be from 16 to 62, not 63"):
        config.replace(address_bits=63)


def test_configuration_is_immutable():
    with pytest.raises(AttributeError):
        PRESETS["tiny"].port_bytes = 64  # type: ignore[misc]
    assert isinstance(PRESETS["tiny"], AcceleratorConfig)


def test_a_configuration_survives_json():
    config = PRESETS["tiny"]
    again = AcceleratorConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and again.digest == config.digest


def test_a_router_is_part_of_the_device_if_it_is_there():
    tiny = PRESETS["tiny"]
    assert tiny.replace(router_top_k=8).digest == tiny.digest  # of nothing
    digests = {tiny.digest} | {
        tiny.replace(router=scores, router_top_k=k).digest
        for scores in (("softmax",), ("softmax", "sigmoid")) for k in (8, 16)}
    assert len(digests) == 5
    config = tiny.replace(router=["sigmoid", "softmax"])  # as JSON has it
    assert [score.key for score in config.router_scores] == ["softmax", "sigmoid"]
    assert config.router_codes == (0, 1)
    assert config.digest == config.replace(router=("softmax", "sigmoid")).digest


def test_modes_are_part_of_the_device_if_they_are_there():
    routes = PRESETS["tiny"].replace(router=("softmax",))
    digests = {routes.replace(router_modes=modes).digest
               for modes in ((), ("threshold",), ("top_p",), ("threshold", "top_p"))}
    assert len(digests) == 4 and routes.digest in digests
    assert (routes.threshold_max, routes.selection_codes) == (0, (0, 1, 2))
    config = routes.replace(router_modes=["threshold", "mixer"])  # as JSON has it
    assert config.router_modes == ("threshold", "mixer")
    assert (config.threshold_max, config.top_p_max, config.selection_codes) == (
        65536, 0, (0, 1, 2, 3))
    assert config.digest == config.replace(router_modes=("mixer", "threshold")).digest
    with pytest.raises(ConfigurationError, match="router_top_k must be at least 2 with the mode"):
        config.replace(router_top_k=1)

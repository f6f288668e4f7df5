import pytest

from moeaccel.config import PRESETS
from moeaccel.host import errors
from moeaccel.host.plugins.transformers.choice import LayerDims, choose, memory_size
from moeaccel.zoo import models


def test_small_models_get_the_small_configuration():
    config, memory = choose([LayerDims(128, 1024, 768)] * 2, "int4_g32")
    assert config is PRESETS["small"]
    assert memory == 1 << 32
    assert choose([], "int4_g32").config is PRESETS["small"]


@pytest.mark.parametrize("fmt", ["int4_g32", "mxint8"])
def test_every_published_model_gets_one_that_fits(fmt):
    published = [m for m in models().values() if m.d_expert and m.n_experts]
    assert len(published) > 80
    for model in published:
        layer = LayerDims.padded(model.n_experts, model.d_model, model.d_expert)
        layers = [layer] * (model.n_moe_layers or model.n_layers or 1)
        if not layer.possible:
            with pytest.raises(errors.LimitExceeded, match="in any configuration"):
                choose(layers, fmt)
            continue
        config, memory = choose(layers, fmt)
        assert layer.fits(config), model.name
        assert len(layers) * layer.image_bytes(config, fmt) < memory <= 1 << config.address_bits


def test_dimensions_are_counted_as_the_device_has_them():
    assert LayerDims.padded(4, 1, 33) == LayerDims(4, 32, 64)


def test_experts_without_up_rows_need_two_thirds_of_the_memory():
    gated, plain = (LayerDims(64, 1024, 1024, gated=gated).image_bytes(PRESETS["small"], "mxint8")
                    for gated in (True, False))
    assert plain == pytest.approx(gated * 2 / 3, rel=0.01)


def test_a_configuration_without_the_activation_does_not_fit():
    silu_only = PRESETS["small"].replace(activations=("silu",))
    assert LayerDims(4, 64, 64).fits(silu_only)
    assert not LayerDims(4, 64, 64, activation="relu").fits(silu_only)


def test_larger_than_a_preset():
    config, memory = choose([LayerDims(8, 6144, 32768)] * 64, "mxint8")
    assert (config.name, config.max_dim) == ("wide512-enlarged", 32768)
    assert memory > 64 * 8 * 3 * 6144 * 32768
    config, _ = choose([LayerDims(1024, 16384, 16384)] * 80, "mxint8")
    assert config.address_bits == 46


def test_a_configuration_that_was_chosen_stays():
    config, memory = choose([LayerDims(64, 2048, 1024)], "int4_g32", config=PRESETS["hbm32"])
    assert config is PRESETS["hbm32"]
    assert memory == 1 << config.address_bits


def test_a_larger_one_keeps_what_the_smaller_one_could_do():
    small = choose([LayerDims(4, 64, 64)], "int4_g32")
    wide = choose([LayerDims(4, 2048, 64)], "int4_g32", least=small)
    assert wide.memory_bytes == 2 * small.memory_bytes
    assert choose([LayerDims(4, 64, 64)], "int4_g32", least=wide).config is PRESETS["wide512"]


@pytest.mark.parametrize(("text", "size"), [
    ("64GiB", 64 << 30), ("64 gib", 64 << 30), ("1.5G", 3 << 29), ("512MB", 512_000_000),
    ("8192", 8192), ("8193B", 3 * 4096), ("2T", 2 << 40),
])
def test_sizes(text, size):
    assert memory_size("MOEACCEL_MEMORY", text) == size


@pytest.mark.parametrize("text", [
    "", "0", "1KiB", "4096", "-1GiB", "lots", "64PiB", "1GiBs", "1000TiB", "nan", "50%"])
def test_sizes_that_are_none(text):
    with pytest.raises(errors.InvalidOption, match=f"MOEACCEL_MEMORY must be .*, not {text!r}"):
        memory_size("MOEACCEL_MEMORY", text)

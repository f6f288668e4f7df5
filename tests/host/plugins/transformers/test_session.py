import logging
import os

import pytest
import torch

import moeaccel.host.transformers_plugin as plugin
from moeaccel.config import PRESETS
from moeaccel.errors import MoeAccelError
from moeaccel.host import errors
from moeaccel.host.plugins.transformers.session import _close_own
from moeaccel.host.transports.golden import GoldenTransport
from tests.support.experts import CALL, toy
from tests.support.models import FOUR, config_of, make


@torch.no_grad()
def test_the_environment_names_the_device(environment, ids):
    for name, value in (("DEVICE", "golden"), ("CONFIG", "tiny"), ("WEIGHT_FORMAT", "mxfp4"),
                        ("ACTIVATION_BITS", "8"), ("MEMORY", "64MiB")):
        environment.setenv(f"MOEACCEL_{name}", value)
    session = plugin.current_session()
    assert session.device.config.name == "tiny"
    assert session.device.transport.memory_bytes == 64 << 20
    assert (session.weight_format, session.activation_bits) == ("mxfp4", 8)
    make(config_of("Mixtral", **FOUR), "moeaccel")(ids)
    assert session.device.counters()["commands"] == 2


def test_the_defaults(environment):
    session = plugin.current_session()
    assert session.device.config is PRESETS["small"]
    assert session.device.transport.memory_bytes == 1 << 32
    assert (session.weight_format, session.activation_bits) == ("int4_g32", 16)
    assert plugin.current_session() is session


@pytest.mark.parametrize(("name", "value", "error"), [
    ("ACTIVATION_BITS", "12", "MOEACCEL_ACTIVATION_BITS must be one of 8, 16, not 12"),
    ("ACTIVATION_BITS", "many", "MOEACCEL_ACTIVATION_BITS must be one of 8, 16, not 'many'"),
    ("WEIGHT_FORMAT", "int3", "MOEACCEL_WEIGHT_FORMAT must be one of .*int4_g32.*, not 'int3'"),
    ("MEMORY", "much", "MOEACCEL_MEMORY must be a size such as 64GiB"),
    ("CONFIG", "giant", "config must be one of .*not 'giant'"),
    ("DEVICE", "cloud", "device must be .*not 'cloud'"),
])
def test_variables_that_make_no_sense(environment, name, value, error):
    environment.setenv(f"MOEACCEL_{name}", value)
    with pytest.raises(MoeAccelError, match=error):
        plugin.current_session()


def test_arguments_go_before_the_environment(environment):
    environment.setenv("MOEACCEL_WEIGHT_FORMAT", "mxfp4")
    environment.setenv("MOEACCEL_ACTIVATION_BITS", "8")
    plugin.use_device(None, weight_format="mxint8")
    session = plugin.current_session()
    assert (session.weight_format, session.activation_bits) == ("mxint8", 8)


@pytest.mark.parametrize(("device", "options", "error"), [
    ("golden", {}, r"a Device, from open_device\(\), a Cluster of some, or None, not str"),
    (0, {}, "device must be a Device.*not int"),
    (None, {"weight_format": "int3"}, "weight_format must be one of .*not 'int3'"),
    (None, {"weight_format": 4}, "weight_format must be one of .*not 4"),
    (None, {"weight_format": ["int4_g32"]}, "weight_format must be one of"),
    (None, {"activation_bits": "16"}, "activation_bits must be one of 8, 16, not '16'"),
    (None, {"activation_bits": 16.0}, "activation_bits must be one of 8, 16, not 16.0"),
    (None, {"grid_exponent": "low"}, "grid_exponent must be an integer, not 'low'"),
    (None, {"verify": True}, "verify must be one of sampled, full, not True"),
    (None, {"unsupported": "host"}, "unsupported must be one of refuse, eager, not 'host'"),
])
def test_arguments_that_make_no_sense(environment, device, options, error):
    with pytest.raises(errors.InvalidOption, match=error):
        plugin.use_device(device, **options)


# -- where nobody chose
def mixtral(**more):
    return make(config_of("Mixtral", **(FOUR | more)), "moeaccel")


@torch.no_grad()
def test_the_first_layer_chooses_what_fits_its_model(environment, ids, caplog):
    caplog.set_level(logging.INFO)
    model = mixtral(intermediate_size=1056)
    model(ids)
    device = plugin.current_session().device
    assert device.config is PRESETS["wide512"]
    assert device.counters()["commands"] == 2
    record = next(r for r in caplog.records if "chosen to fit" in r.message)
    assert record.levelno == logging.WARNING
    assert "config and memory chosen to fit the model: config 'wide512' with 4096 MiB" in (
        record.message)
    assert "MOEACCEL_MEMORY" in record.message


@torch.no_grad()
def test_memory_holds_all_layers_of_the_model(environment):
    module = toy()
    module.config.num_hidden_layers = 100_000
    module(*CALL)
    assert plugin.current_session().device.transport.memory_bytes == 8 << 30


@torch.no_grad()
def test_a_larger_layer_gets_a_larger_device_and_the_others_follow(environment, ids, caplog):
    small, large = mixtral(), mixtral(intermediate_size=1056)
    before = small(ids).logits
    first = plugin.current_session().device
    large(ids)
    second = plugin.current_session().device
    assert second is not first
    assert second.config.max_dim >= 1056
    assert torch.equal(small(ids).logits, before)
    assert plugin.current_session().device is second
    assert second.counters()["commands"] == 4
    assert "layers on the device of config 'small' before it move" in caplog.text


@torch.no_grad()
def test_memory_grows_when_a_layer_does_not_fit(environment, monkeypatch):
    import moeaccel.host.plugins.transformers.choice as choice

    monkeypatch.setattr(choice, "SMALLEST_MEMORY", 1 << 20)
    monkeypatch.setattr(choice, "_COMMANDS_IN_FLIGHT", 2)
    modules = [toy() for _ in range(24)]
    for module in modules:
        module.config.num_hidden_layers = 1

    def sizes():
        for module in modules:
            module(*CALL)
            yield plugin.current_session().device.transport.memory_bytes

    assert sorted(set(sizes())) == [1 << 20, 1 << 21]
    # Where the user chose, that is that.
    environment.setenv("MOEACCEL_MEMORY", "1MiB")
    plugin.release()
    plugin.use_device(None)
    with pytest.raises(errors.OutOfDeviceMemory):
        list(sizes())


@torch.no_grad()
def test_what_the_user_chose_stays(environment, ids):
    environment.setenv("MOEACCEL_CONFIG", "small")
    with pytest.raises(errors.LimitExceeded, match="config 'small', not 1056"):
        mixtral(intermediate_size=1056)(ids)


def test_a_fork_does_not_close_what_its_parent_opened(environment):
    """Its exit does: a serial port's last bytes would be sent twice."""
    closed = []

    class Port(GoldenTransport):
        def close(self):
            closed.append(self)

    transport = Port(PRESETS["tiny"], memory_bytes=1 << 20)
    _close_own(transport, os.getpid() + 1)
    assert not closed
    _close_own(transport, os.getpid())
    assert closed == [transport]

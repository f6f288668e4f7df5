"""What registers say of a device, whatever reads them."""

from moeaccel.config import PRESETS
from moeaccel.interface.registers import built_values


def test_what_says_how_a_device_was_built():
    tiny = PRESETS["tiny"]
    assert built_values(tiny) == {"CONFIG_HASH": tiny.digest, "EXPERT_BUFFER": 0}
    buffered = tiny.replace(buffer_slots=5, buffer_beats=1024)
    assert built_values(buffered)["EXPERT_BUFFER"] == 5 | 10 << 8
    assert buffered.digest != tiny.digest

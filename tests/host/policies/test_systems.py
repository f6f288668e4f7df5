import pytest

from moeaccel.host.policies.errors import UnknownPolicy
from moeaccel.host.policies.systems import SYSTEMS, Part, System, system

SURVEY = ("mixtral-offloading", "moe-infinity", "fiddler", "pre-gated", "sida", "edgemoe",
          "swapmoe", "hobbit", "promoe", "expertflow", "adapmoe", "daop", "fmoe", "moe-lightning",
          "cache-conditional", "read-me", "monde", "duplex")


def test_every_system_of_the_survey_has_its_row():
    assert not set(SURVEY) - set(SYSTEMS)
    for name in SURVEY:
        assert SYSTEMS[name].source.startswith("arXiv") and SYSTEMS[name].title


def test_lossy_is_what_changes_routes():
    lossy = {name for name, s in SYSTEMS.items() if not s.lossless}
    assert lossy == {"pre-gated", "sida", "swapmoe", "hobbit", "adapmoe", "cache-conditional",
                     "ktransformers", "lynx"}


def test_unknown_parts_and_systems():
    assert system("daop") is SYSTEMS["daop"]
    with pytest.raises(UnknownPolicy, match=r"policy must be one of moeaccel, .*did you mean daop"):
        system("doap")
    with pytest.raises(UnknownPolicy, match="residency must be one of"):
        System(name="x", title="x", source="", placement=Part("scan"), residency=Part("fifo"))


def test_parts_say_their_options():
    assert str(Part("monde", {"alpha": 1.0, "ceil": True})) == "monde (alpha 1.0, ceil True)"
    assert str(Part("lru")) == "lru"
